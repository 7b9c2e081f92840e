// Linear layers' products with a weight in floats, written once for every instruction set.

#include "kernels.h"

#include <type_traits>

#include "block.h"
#include "few_columns.h"
#include "table.h"
#include "tile_columns.h"

namespace nearpeak::linear::NEARPEAK_ISA {
namespace {

#ifdef NEARPEAK_HAS_TILES
// Up to so many columns vectors are as fast as tiles, beyond so many blocks are (AMX machine; see few_columns.h).
constexpr int64_t kVectorColumns = 2, kTileColumns = 64;
#endif

struct Products {
    static int64_t most_few_columns([[maybe_unused]] const Product& p) {
#ifdef NEARPEAK_HAS_TILES
        if (p.dtype == Dtype::bfloat16) return kTileColumns;
#endif
        return kFewColumns;
    }

    template <class Function>
    static void with_product(const Product& p, const Block& block, float* scratch, Function function) {
        Arena arena(scratch);
        with_type(p.dtype, [&](auto* t) {
            BlockProduct<std::remove_pointer_t<decltype(t)>, false> product(p, block, arena);
            function(product, arena);
        });
    }

    template <class Function>
    static void with_few_columns(const Product& p, float* scratch, Function function) {
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
};

}  // namespace

const Kernels kernels = Table<Products>::kernels(nullptr);

}  // namespace nearpeak::linear::NEARPEAK_ISA
