// Matrix units of x86 (AMX): eight tile registers of 16 rows x 64 bytes.
//
// Four hold sums (16 x 16 floats), two a left and two a right factor in bfloat16: each factor loaded serves two
// products.
//
//     sums[i][j][m][n] += left[i][m][k] * right[j][k][n],  k < 32, right stored as 16 rows of 16 pairs (k, k + 1)
//
// Even and odd k are summed apart, and added last.
//
// NEARPEAK_EMULATE_TILES puts plain loops in their place, by which the kernels are tested on other processors.
#pragma once

#include "pairs.h"
#include "sanitize.h"

namespace nearpeak::NEARPEAK_ISA {

// Whether products of this storage type are taken in tiles.
#ifdef NEARPEAK_HAS_TILES
template <class T>
constexpr bool kInTiles = std::is_same_v<T, bfloat16>;
#else
template <class T>
constexpr bool kInTiles = false;
#endif

}  // namespace nearpeak::NEARPEAK_ISA

#ifdef NEARPEAK_HAS_TILES
namespace nearpeak::NEARPEAK_ISA {

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;  // elements of bfloat16 in a row
constexpr int64_t kTileRowBytes = 64, kTileElements = kTileRows * kTileDepth;

#if defined(NEARPEAK_EMULATE_TILES)

struct EmulatedTiles {
    float sums[2][2][16][16];
    bfloat16 left[2][16][32], right[2][16][32];
};

inline EmulatedTiles& emulated_tiles() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}

// While one lives, this thread's tile registers are set up.
struct TileUnit {};

template <class Row>
inline void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride) {
    for (int row = 0; row < kTileRows; ++row) {
        std::memcpy(static_cast<char*>(to) + row * to_stride, static_cast<const char*>(from) + row * from_stride,
                    sizeof(Row));
    }
}

template <int i, int j>
inline void zero_sums() {
    std::memset(emulated_tiles().sums[i][j], 0, sizeof(emulated_tiles().sums[i][j]));
}
// Strides are in bytes.
template <int i, int j>
inline void load_sums(const float* from, int64_t stride) {
    copy_rows<float[16]>(emulated_tiles().sums[i][j], 64, from, stride);
}
template <int i, int j>
inline void store_sums(float* to, int64_t stride) {
    copy_rows<float[16]>(to, stride, emulated_tiles().sums[i][j], 64);
}
template <int i>
inline void load_left(const bfloat16* from, int64_t stride) {
    copy_rows<bfloat16[32]>(emulated_tiles().left[i], 64, from, stride);
}
template <int j>
inline void load_right(const bfloat16* from, int64_t stride) {
    copy_rows<bfloat16[32]>(emulated_tiles().right[j], 64, from, stride);
}
template <int i, int j>
inline void multiply_tiles() {
    const auto wide = [](bfloat16 value) { return bitcast<float>(static_cast<uint32_t>(value.bits) << 16); };
    EmulatedTiles& tiles = emulated_tiles();
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            float sums[2] = {};
            for (int k = 0; k < kTileDepth; ++k) {
                sums[k % 2] += wide(tiles.left[i][m][k]) * wide(tiles.right[j][k / 2][2 * n + k % 2]);
            }
            tiles.sums[i][j][m][n] += sums[0] + sums[1];
        }
    }
}

#else

// While one lives, this thread's tile registers are set up.
class TileUnit {
  public:
    TileUnit() {
        // Static, since GCC's intrinsic says that it reads the first eight bytes only, and drops stores to the others.
        static constexpr struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } kShape;
        _tile_loadconfig(&kShape);
    }
    ~TileUnit() { _tile_release(); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
};

// Each row's bytes: sanitizers do not know the intrinsics.
inline void check_rows(const void* first, int64_t stride, bool is_write) {
    for (int row = 0; row < kTileRows; ++row) {
        check_access(static_cast<const char*>(first) + row * stride, kTileRowBytes, is_write);
    }
}

// The intrinsics want their registers as literals. Sums live in 0..3, left factors in 4 and 5, right ones in 6 and 7.
#define NEARPEAK_FOR_SUMS(i, j, action) \
    if constexpr (i == 0 && j == 0) {   \
        action(0, 4, 6);                \
    } else if constexpr (i == 0) {      \
        action(1, 4, 7);                \
    } else if constexpr (j == 0) {      \
        action(2, 5, 6);                \
    } else {                            \
        action(3, 5, 7);                \
    }

template <int i, int j>
inline void zero_sums() {
#define NEARPEAK_ACTION(sums, left, right) _tile_zero(sums)
    NEARPEAK_FOR_SUMS(i, j, NEARPEAK_ACTION)
#undef NEARPEAK_ACTION
}
// Strides are in bytes.
template <int i, int j>
inline void load_sums(const float* from, int64_t stride) {
    check_rows(from, stride, false);
#define NEARPEAK_ACTION(sums, left, right) _tile_loadd(sums, from, stride)
    NEARPEAK_FOR_SUMS(i, j, NEARPEAK_ACTION)
#undef NEARPEAK_ACTION
}
template <int i, int j>
inline void store_sums(float* to, int64_t stride) {
    check_rows(to, stride, true);
#define NEARPEAK_ACTION(sums, left, right) _tile_stored(sums, to, stride)
    NEARPEAK_FOR_SUMS(i, j, NEARPEAK_ACTION)
#undef NEARPEAK_ACTION
}
template <int i>
inline void load_left(const bfloat16* from, int64_t stride) {
    check_rows(from, stride, false);
    if constexpr (i == 0) {
        _tile_loadd(4, from, stride);
    } else {
        _tile_loadd(5, from, stride);
    }
}
template <int j>
inline void load_right(const bfloat16* from, int64_t stride) {
    check_rows(from, stride, false);
    if constexpr (j == 0) {
        _tile_loadd(6, from, stride);
    } else {
        _tile_loadd(7, from, stride);
    }
}
template <int i, int j>
inline void multiply_tiles() {
#define NEARPEAK_ACTION(sums, left, right) _tile_dpbf16ps(sums, left, right)
    NEARPEAK_FOR_SUMS(i, j, NEARPEAK_ACTION)
#undef NEARPEAK_ACTION
}
#undef NEARPEAK_FOR_SUMS

#endif

// Call between ordinary stores and the tile loads that read them: GCC's tile intrinsics do not say that they read
// memory, so the compiler may move stores past them.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// A factor whose rows, of pairs, are in registers.
inline void store_factor(bfloat16* to, const Float (&rows)[kLanes]) {
    for (int row = 0; row < kTileRows; ++row) store(reinterpret_cast<float*>(to) + row * kLanes, rows[row]);
}

inline void zero_all_sums() {
    zero_sums<0, 0>();
    zero_sums<0, 1>();
    zero_sums<1, 0>();
    zero_sums<1, 1>();
}

// All sums as one matrix of 32 x 32 floats, whose rows are `stride` floats apart.
inline void load_all_sums(const float* from, int64_t stride) {
    load_sums<0, 0>(from, stride * 4);
    load_sums<0, 1>(from + kLanes, stride * 4);
    load_sums<1, 0>(from + kTileRows * stride, stride * 4);
    load_sums<1, 1>(from + kTileRows * stride + kLanes, stride * 4);
}
inline void store_all_sums(float* to, int64_t stride) {
    store_sums<0, 0>(to, stride * 4);
    store_sums<0, 1>(to + kLanes, stride * 4);
    store_sums<1, 0>(to + kTileRows * stride, stride * 4);
    store_sums<1, 1>(to + kTileRows * stride + kLanes, stride * 4);
}

inline void multiply_all_tiles() {
    multiply_tiles<0, 0>();
    multiply_tiles<0, 1>();
    multiply_tiles<1, 0>();
    multiply_tiles<1, 1>();
}

}  // namespace nearpeak::NEARPEAK_ISA
#endif

namespace nearpeak::NEARPEAK_ISA {

struct NoTileUnit {};

#ifdef NEARPEAK_HAS_TILES
template <class T>
using TileUnitFor = std::conditional_t<kInTiles<T>, TileUnit, NoTileUnit>;
#else
template <class T>
using TileUnitFor = NoTileUnit;
#endif

}  // namespace nearpeak::NEARPEAK_ISA
