// Linear layers' products with a quantised weight, written once for every instruction set.

#include <type_traits>

#include "byte_block.h"
#include "byte_columns.h"
#include "kernels.h"
#include "quantized_columns.h"
#include "table.h"

namespace nearpeak::linear::NEARPEAK_ISA {
namespace {

struct QuantizedProducts {
    static int64_t most_few_columns(const Product& p) {
        if (p.rounded) return kFewByteColumns;
        const int64_t most = p.dtype == Dtype::bfloat16 ? kFewQuantizedColumns<bfloat16> : kFewQuantizedColumns<float>;
        return p.columns <= most && FloatX::serves(p) ? most : 0;
    }

    template <class Function>
    static void with_product(const Product& p, const Block& block, float* scratch, Function function) {
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

    template <class Function>
    static void with_few_columns(const Product& p, float* scratch, Function function) {
        Arena arena(scratch);
        if (p.rounded) {
            QuantizedColumns<ByteX> columns(p, arena);
            function(columns, arena);
        } else {
            QuantizedColumns<FloatX> columns(p, arena);
            function(columns, arena);
        }
    }
};

}  // namespace

const Kernels quantized_kernels = Table<QuantizedProducts>::kernels(round_x);

}  // namespace nearpeak::linear::NEARPEAK_ISA
