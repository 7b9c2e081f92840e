// Linear layers' products, written once for every instruction set.

#include "kernels.h"

#include <type_traits>

#include "block.h"
#include "few_columns.h"

namespace nearpeak::linear::NEARPEAK_ISA {
namespace {

template <class Function>
void with_product(const Product& p, const Block& block, float* scratch, Function function) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        Arena arena(scratch);
        BlockProduct<T> product(p, block, arena);
        function(product, arena);
    });
}

int64_t scratch(const Product& p, const Block& block) {
    int64_t floats = 0;
    with_product(p, block, nullptr, [&](auto&, const Arena& arena) { floats = arena.floats(); });
    return floats;
}

void multiply(const Product& p, const Block& block, float* scratch) {
    with_product(p, block, scratch, [](auto& product, const Arena&) { product.run(); });
}

int64_t few_columns_scratch(const Product& p) {
    Arena arena(nullptr);
    FewColumns<float>(p, arena);
    return arena.floats();
}

void few_columns(const Product& p, int64_t begin, int64_t end, float* scratch) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        Arena arena(scratch);
        FewColumns<T>(p, arena).run(begin, end);
    });
}

}  // namespace

const Kernels kernels = {scratch, multiply, kFewColumns, few_columns_scratch, few_columns};

}  // namespace nearpeak::linear::NEARPEAK_ISA
