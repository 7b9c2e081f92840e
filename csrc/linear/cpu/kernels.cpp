// Linear layers' products with a weight in floats, written once for every instruction set.

#include "kernels.h"

#include <type_traits>

#include "block.h"
#include "few_columns.h"
#include "tile_columns.h"

namespace nearpeak::linear::NEARPEAK_ISA {
namespace {

#ifdef NEARPEAK_HAS_TILES
// Up to so many columns vectors are as fast as tiles, beyond so many blocks are (AMX machine; see few_columns.h).
constexpr int64_t kVectorColumns = 2, kTileColumns = 64;
#endif

int64_t most_few_columns([[maybe_unused]] const Product& p) {
#ifdef NEARPEAK_HAS_TILES
    if (p.dtype == Dtype::bfloat16) return kTileColumns;
#endif
    return kFewColumns;
}

template <class Function>
void with_product(const Product& p, const Block& block, float* scratch, Function function) {
    with_type(p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        Arena arena(scratch);
        BlockProduct<T, false> product(p, block, arena);
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

// Calls function(columns, arena) with what multiplies p's few columns.
template <class Function>
void with_few_columns(const Product& p, float* scratch, Function function) {
    Arena arena(scratch);
#ifdef NEARPEAK_HAS_TILES
    if (p.dtype == Dtype::bfloat16 && p.columns > kVectorColumns) {
        TileColumns columns(p, arena);
        return function(columns, arena);
    }
#endif
    with_type(p.dtype, [&](auto* t) {
        FewColumns<std::remove_pointer_t<decltype(t)>> columns(p, arena);
        function(columns, arena);
    });
}

int64_t few_columns_scratch(const Product& p) {
    int64_t floats = 0;
    with_few_columns(p, nullptr, [&](auto&, const Arena& arena) { floats = arena.floats(); });
    return floats;
}

void few_columns(const Product& p, int64_t begin, int64_t end, float* scratch) {
    with_few_columns(p, scratch, [&](auto& columns, const Arena&) { columns.run(begin, end); });
}

}  // namespace

const Kernels kernels = {scratch, multiply, most_few_columns, few_columns_scratch, few_columns, nullptr};

}  // namespace nearpeak::linear::NEARPEAK_ISA
