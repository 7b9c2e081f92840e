// Which elements dropout keeps: kernels/nearpeak/dropout.py, which defines it, bit for bit.
//
// A hash of the seed, the head, the row and the column decides, and of nothing else: so tiles, threads and instruction
// sets agree, and backward need not store what forward drew. Per row two numbers are made with 64-bit arithmetic; per
// element they are mixed with the column in 32 bits, in twelve vector instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace nearpeak {

// splitmix64's, which makes numbers that look random of numbers in order.
inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// The numbers that the columns of a row are mixed with.
struct RowKeys {
    uint32_t first, second;
};

// An element is kept where its hash is at least `threshold`, and then multiplied by `scale`.
struct Dropout {
    uint64_t mixed_seed = 0;
    uint32_t threshold = 0;  // 0 keeps all
    float scale = 1.0f;

    bool drops() const { return threshold > 0; }

    RowKeys row_keys(int64_t head, int64_t row) const {
        const uint64_t of_head = mixed(mixed_seed + static_cast<uint64_t>(head));
        const uint64_t of_row = mixed(of_head + static_cast<uint64_t>(row));
        return {static_cast<uint32_t>(of_row), static_cast<uint32_t>(of_row >> 32)};
    }
};

inline Dropout dropout_of(int64_t seed, double p) {
    const double threshold = std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1);
    return {mixed(static_cast<uint64_t>(seed)), static_cast<uint32_t>(threshold), static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace nearpeak

#ifdef NEARPEAK_ISA
#include "two.h"

namespace nearpeak::NEARPEAK_ISA {

// Lane by lane; first and second: of the elements' rows. Columns are 32 bits: masks repeat after 2^32 of them.
inline Int is_kept(const Dropout& dropout, Unsigned first, Unsigned second, Unsigned columns) {
    Unsigned x = columns + first;
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x ^= second;
    x = (x ^ (x >> 15)) * 0xd35a2d97u;
    x ^= x >> 15;
    return bitcast<Int>(x >= dropout.threshold);
}

// Elements of one row, those of the columns given: multiplied by the scale, or zero.
inline Float keep(const Dropout& dropout, RowKeys keys, Float values, Unsigned columns) {
    const Int kept = is_kept(dropout, Unsigned{} + keys.first, Unsigned{} + keys.second, columns);
    return select(kept, values * dropout.scale, Float{});
}

// Elements of one row as `lanes` has them, from `column` on.
template <class Lanes>
inline Float keep(const Dropout& dropout, RowKeys keys, Float values, int64_t column, Lanes) {
    return keep(dropout, keys, values, bitcast<Unsigned>(lane_numbers()) + static_cast<uint32_t>(column));
}
template <class T>
inline Two keep(const Dropout& dropout, RowKeys keys, Two values, int64_t column, TwoVectors<T> lanes) {
    const auto [low, high] = lanes_of(lanes);
    const auto first = static_cast<uint32_t>(column);
    return {keep(dropout, keys, values.low, bitcast<Unsigned>(low) + first),
            keep(dropout, keys, values.high, bitcast<Unsigned>(high) + first)};
}

}  // namespace nearpeak::NEARPEAK_ISA
#endif
