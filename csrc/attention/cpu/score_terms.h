// What is added to a row's scores beside the scaled product: a bias, ALiBi's slope times the distance, and -infinity
// where a boolean mask forbids. One row, all its keys next to each other; prefill, which has rows across the lanes,
// transposes.
#pragma once

#include <cmath>
#include <type_traits>

#include "block_mask.h"
#include "rows.h"

namespace nearpeak::attention::NEARPEAK_ISA {

using nearpeak::NEARPEAK_ISA::load;

// An element of a boolean mask, which loads as what it adds to a score.
struct Permission {
    uint8_t allowed;
};
inline Float load(const Permission* from) {
    return select(to_int(load(&from->allowed)) != 0, Float{}, broadcast(-kInfinity));
}

// In base 2. A finite bias stays finite, as in plain softmax: rows whose keys all have the most negative one see all.
inline Float in_base_2(Float term) {
    constexpr float kLargest = std::numeric_limits<float>::max();
    return max(select(term == -kInfinity, term, broadcast(-kLargest)), term * kLog2E);
}

template <class T>
const T* pairs_row(const PairTensor& tensor, const Call& p, const Task& task, int64_t row) {
    return row_in(static_cast<const T*>(tensor.data), tensor.strides, p, task, row) + task.sequence.key_begin;
}

// scores[0 .. end - begin) += the terms of keys [begin, end) of a row; `scores` has room for whole vectors.
inline void add_terms(const Call& p, const Task& task, int64_t row, int64_t begin, int64_t end, float* scores) {
    const auto add = [&](const PairTensor& tensor, auto* t, auto convert) {
        const auto* from = pairs_row<std::remove_pointer_t<decltype(t)>>(tensor, p, task, row) + begin;
        for_each_vector(end - begin, [&](int64_t k, auto count, int) {
            store(scores + k, load(scores + k) + convert(load(from + k, count)));
        });
    };
    if (p.bias.data) with_type(p.bias.dtype, [&](auto* t) { add(p.bias, t, in_base_2); });
    if (p.alibi_slopes) {
        const auto [position, head] = place_of(p, task, row);
        const float slope = p.alibi_slopes[task.sequence.batch * p.alibi_batch_stride + head] * kLog2E;
        const int64_t own = position + task.sequence.key_length - task.sequence.query_length;
        Float distance = to_float(lane_numbers()) + static_cast<float>(begin - own);
        for (int64_t k = 0; k < end - begin; k += kLanes, distance += static_cast<float>(kLanes)) {
            // Rounded before it is subtracted, as where prefill adds it later: backward needs the very same scores.
            store(scores + k, load(scores + k) - uncontracted(max(distance, -distance) * slope));
        }
    }
    if (p.mask.data) add(p.mask, static_cast<Permission*>(nullptr), [](Float term) { return term; });
}

// Of keys [begin, end), those between the first and the last that the mask allows, where one mask row serves all rows
// of the task, as one of padding does; else all of them.
inline KeyRange allowed_by_mask(const Call& p, const Task& task, int64_t begin, int64_t end) {
    const Strides& strides = p.mask.strides;
    if (!p.mask.data || strides.position != 0 || (strides.head != 0 && p.group() > 1)) return {begin, end};
    const Permission* const keys = pairs_row<Permission>(p.mask, p, task, task.row_begin);
    while (begin < end && !keys[begin].allowed) ++begin;
    while (begin < end && !keys[end - 1].allowed) --end;
    return {begin, end};
}

// A row's maximum (base 2) and the sum of 2^(score - maximum), and what sums made for another maximum shrink by.
struct Softmax {
    float maximum, total, decay = 1.0f;
};

// With the sink of the row's head as one more score.
inline Softmax with_sink(const Call& p, const Task& task, int64_t row, float maximum, float total) {
    if (!p.sinks) return {maximum, total};
    const float sink = p.sinks[place_of(p, task, row).head] * kLog2E;
    const float now = std::max(maximum, sink);
    if (now == -kInfinity) return {maximum, total};
    const float decay = std::exp2(maximum - now);
    return {now, total * decay + std::exp2(sink - now), decay};
}

// What a row's output, summed with the weights 2^(score - maximum), is multiplied by at last.
inline float out_factor(const Call& p, const Softmax& softmax) {
    return softmax.total == 0.0f ? 0.0f : softmax.decay / softmax.total * p.dropout.scale;
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
