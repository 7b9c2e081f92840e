// Linear layers' products with a quantised weight, written once for every instruction set.

#include <type_traits>

#include "byte_block.h"
#include "byte_columns.h"
#include "kernels.h"
#include "quantized_columns.h"

namespace nearpeak::linear::NEARPEAK_ISA {
namespace {

int64_t most_few_columns(const Product& p) {
    if (p.rounded) return kFewByteColumns;
    const int64_t most = p.dtype == Dtype::bfloat16 ? kFewQuantizedColumns<bfloat16> : kFewQuantizedColumns<float>;
    return p.columns <= most && FloatX::serves(p) ? most : 0;
}

// Calls function(product, arena) with what multiplies a block.
template <class Function>
void with_product(const Product& p, const Block& block, float* scratch, Function function) {
    Arena arena(scratch);
    if (p.rounded) {
        ByteBlockProduct product(p, block, arena);
        return function(product, arena);
    }
    with_type(p.dtype, [&](auto* t) {
        BlockProduct<std::remove_pointer_t<decltype(t)>, true> product(p, block, arena);
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

// Likewise with what multiplies few columns.
template <class Function>
void with_few_columns(const Product& p, float* scratch, Function function) {
    Arena arena(scratch);
    if (p.rounded) {
        QuantizedColumns<ByteX> columns(p, arena);
        function(columns, arena);
    } else {
        QuantizedColumns<FloatX> columns(p, arena);
        function(columns, arena);
    }
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

const Kernels quantized_kernels = {scratch, multiply, most_few_columns, few_columns_scratch, few_columns, round_x};

}  // namespace nearpeak::linear::NEARPEAK_ISA
