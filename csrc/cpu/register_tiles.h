// Matrix products in tiles of kTile x kPanel sums in registers.
//
//     out[row][lane] = combine(out[row][lane], sum over steps of left[row][step] * right[step][lane])
//
// Each left element is broadcast against a row of `right`. All vector products of matrices take this form, forward and
// backward; they differ in which matrix lies how. A step is one element in float32, or a pair of them in bfloat16
// (pairs.h), with 32 bits both ways.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pairs.h"

namespace nearpeak::NEARPEAK_ISA {

// Two vectors: per broadcast element two multiply-adds, so that a tile of 6 x 2 (12 x 2 with 32 registers) needs
// 8 (14) loads for its 12 (24) multiply-adds, and the multipliers, not the loads, are the limit.
constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;
constexpr int kTile = kLanes == 16 ? 12 : 6;

// Steps that are summed in one chain. Longer ones round more: at 256 steps in float32, one chain errs twice as much as
// PyTorch's matrix product; chains of 64 do not.
constexpr int64_t kChain = 64;

// What a step multiplies.
struct Singles {
    static constexpr int kElements = 1;
    static Float multiply_add(Float left, Float right, Float sums) { return sums + left * right; }
};
struct Pairs {
    static constexpr int kElements = 2;
    static Float multiply_add(Float left, Float right, Float sums) { return multiply_add_pairs(left, right, sums); }
};

// A left matrix whose steps lie next to each other, rows `stride` elements apart. Three rows share a pointer: a
// processor adds a stride, or two, as it loads, and has no registers for a pointer to each row.
template <int kRows, class T = float>
struct RowWise {
    RowWise(const T* first, int64_t its_stride) : stride(its_stride) {
        for (int base = 0; base < kBases; ++base) bases[base] = first + base * kShare * stride;
    }
    float operator()(int row, int64_t step) const {
        float bits;
        const T* at = bases[row / kShare] + step * static_cast<int64_t>(sizeof(float) / sizeof(T));
        std::memcpy(&bits, at + row % kShare * stride, sizeof(bits));
        return bits;
    }

    static constexpr int kShare = 3, kBases = (kRows + kShare - 1) / kShare;
    const T* bases[kBases];
    int64_t stride;
};

// A left matrix whose rows lie next to each other, steps `stride` apart.
struct ColumnWise {
    float operator()(int row, int64_t step) const { return first[step * stride + row]; }

    const float* first;
    int64_t stride;
};

// `right` is kVectors vectors wide. A function of its own: amid other code, GCC may keep sums in memory.
template <int kRows, int kVectors = kPanelVectors, class Step = Singles, class Left, class Combine>
[[gnu::noinline]] void multiply_tile(Left left, const float* right, int64_t right_stride, int64_t steps, float* out,
                                     int64_t out_stride, Combine combine) {
    Float sums[kRows][kVectors] = {};
    for (int64_t step = 0; step < steps; ++step, right += right_stride) {
        Float vectors[kVectors];
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) {
            Float loaded = load(right + vector * kLanes);
            keep_in_register(loaded);
            vectors[vector] = loaded;
        }
#pragma GCC unroll 24
        for (int row = 0; row < kRows; ++row) {
            const Float element = broadcast(left(row, step));
#pragma GCC unroll 4
            for (int vector = 0; vector < kVectors; ++vector)
                sums[row][vector] = Step::multiply_add(element, vectors[vector], sums[row][vector]);
        }
    }
#pragma GCC unroll 24
    for (int row = 0; row < kRows; ++row) {
        for (int vector = 0; vector < kVectors; ++vector) {
            float* at = out + row * out_stride + vector * kLanes;
            store(at, combine(load(at), sums[row][vector], vector));
        }
    }
}

constexpr auto kReplace = [](Float, Float sums, int) { return sums; };
constexpr auto kAdd = [](Float before, Float sums, int) { return before + sums; };

// out[row][lane] = left[row] . right[lane] over `steps`, in chains. `right` is transposed, steps x kPanel.
template <int kRows>
inline void multiply_rows(const float* left, int64_t left_stride, const float* right, int64_t steps, float* out,
                          int64_t out_stride) {
    multiply_tile<kRows>(RowWise<kRows>(left, left_stride), right, kPanel, std::min(kChain, steps), out, out_stride,
                         kReplace);
    for (int64_t step = kChain; step < steps; step += kChain) {
        multiply_tile<kRows>(RowWise<kRows>(left + step, left_stride), right + step * kPanel, kPanel,
                             std::min(kChain, steps - step), out, out_stride, kAdd);
    }
}

// Calls function(std::integral_constant<int, count>) for a count in [1, kCount] known only at run time.
template <int kCount = kTile, class Function>
inline void with_count(int64_t count, Function function) {
    if constexpr (kCount > 1) {
        if (count != kCount) return with_count<kCount - 1>(count, function);
    }
    function(std::integral_constant<int, kCount>{});
}

}  // namespace nearpeak::NEARPEAK_ISA
