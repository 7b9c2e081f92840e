// One step of a product in matrix units, as blocks and few columns take it.
#pragma once

#include "../../cpu/tiles.h"

#ifdef NEARPEAK_HAS_TILES
#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// All sums += 32 rows of `left`, `stride` elements apart, times kVectors vectors of a panel, over 32 elements.
template <int kVectors>
inline void multiply_step(const bfloat16* left, int64_t stride, const float* panel) {
    const auto* pairs = reinterpret_cast<const bfloat16*>(panel);
    load_left<0>(left, stride * 2);
    load_left<1>(left + kTileRows * stride, stride * 2);
    load_right<0>(pairs, kPanel * 4);
    if constexpr (kVectors == 1) {
        multiply_tiles<0, 0>();
        multiply_tiles<1, 0>();
    } else {
        load_right<1>(pairs + kTileDepth, kPanel * 4);
        multiply_all_tiles();
    }
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
#endif
