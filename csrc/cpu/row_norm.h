// RMSNorm and LayerNorm of a row, and their gradients: what kernels share that find a row in different places.
//
// n = (hidden - m) * r
//
//     RMSNorm      m = 0             r = 1 / sqrt(mean(hidden^2) + eps)
//     LayerNorm    m = mean(hidden)  r = 1 / sqrt(mean((hidden - m)^2) + eps)      (kCentred)
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "column_sums.h"
#include "two.h"

namespace nearpeak::NEARPEAK_ISA {

// Independent sums, of two vectors each, hide the adder's latency: 4 cycles, at 2 additions a cycle.
constexpr int kSums = 4;

// Means over a row of d = hidden - shift and of its square; for RMSNorm the shift is 0, and `difference` is not found.
struct Means {
    float difference, square;

    float variance() const { return square - difference * difference; }

    // A shift further from the mean than the standard deviation costs digits; this one costs half of one.
    bool need_another_shift() const { return difference * difference > variance(); }
};

// Adds up this many columns before it adds them to the rest: long sums in float32 lose digits.
constexpr int64_t kSumBlock = 4096;

// The means over `width` columns of kCount values: add(column, lanes, sums) adds those of a vector to Float
// sums[kCount].
template <class T, int kCount, int kSlots, class Add>
[[gnu::always_inline]] inline std::array<float, kCount> means_over(int64_t width, Add add) {
    Float totals[kCount] = {};
    for (int64_t begin = 0; begin < width; begin += kSumBlock) {
        Float sums[kSlots][kCount] = {};
        for_each_two<T, kSlots>(std::min(kSumBlock, width - begin),
                                [&](int64_t column, auto lanes, int slot) { add(begin + column, lanes, sums[slot]); });
        for (int slot = 0; slot < kSlots; ++slot) {
            for (int value = 0; value < kCount; ++value) totals[value] += sums[slot][value];
        }
    }
    std::array<float, kCount> means;
    for (int value = 0; value < kCount; ++value) means[value] = sum(totals[value]) / static_cast<float>(width);
    return means;
}

// n = (hidden - shift) * r - drift; for RMSNorm n = hidden * r.
template <bool kCentred>
struct Normaliser {
    float r, shift, drift;

    Normaliser(float shift, Means means, float eps) : shift(shift) {
        r = 1.0f / std::sqrt((kCentred ? std::max(means.variance(), 0.0f) : means.square) + eps);
        drift = means.difference * r;
    }

    template <class Values>
    Values operator()(Values hidden) const {
        if constexpr (kCentred) {
            return (hidden - shift) * r - drift;
        } else {
            return hidden * r;
        }
    }
};

// Means over a row that backward needs, of d = hidden - shift.
struct BackwardMeans : Means {
    float product, gradient;  // of d g, and where kCentred of g
};

// With g = grad * (offset + weight):
//     RMSNorm      d_hidden = r * (g - hidden * share)      share = r^2 mean(g hidden)
//     LayerNorm    d_hidden = r * (g - n * share - mean)    share = mean(g n),  mean = mean(g)
template <bool kCentred>
struct RowGradient {
    Normaliser<kCentred> normalise;
    float share, mean;

    RowGradient(float shift, BackwardMeans means, float eps) : normalise(shift, means, eps), mean(means.gradient) {
        const float r = normalise.r;
        share = kCentred ? means.product * r - means.gradient * normalise.drift : r * r * means.product;
    }

    // g, and hidden as it is and normalised.
    template <class Values>
    Values operator()(Values g, Values hidden, Values n) const {
        Values d = g - (kCentred ? n : hidden) * share;
        if constexpr (kCentred) d = d - mean;
        return d * normalise.r;
    }
};

}  // namespace nearpeak::NEARPEAK_ISA
