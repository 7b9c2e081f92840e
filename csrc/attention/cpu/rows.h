// Where a row's query and output lie, and how a finished row is written.
#pragma once

#include <cmath>

#include "../../cpu/math.h"
#include "kernels.h"

namespace nearpeak::attention::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

struct RowPlace {
    int64_t position, head;
};

inline RowPlace place_of(const Forward& p, const Task& task, int64_t row) {
    return {row / p.group(), task.key_head * p.group() + row % p.group()};
}

template <class T>
const T* query_row(const Forward& p, const Task& task, int64_t row) {
    const auto [position, head] = place_of(p, task, row);
    return static_cast<const T*>(p.query) + task.batch * p.query_strides.batch + head * p.query_strides.head +
           position * p.query_strides.position;
}

template <class T>
T* out_row(const Forward& p, const Task& task, int64_t row) {
    const auto [position, head] = place_of(p, task, row);
    return static_cast<T*>(p.out) + task.batch * p.out_strides.batch + head * p.out_strides.head +
           position * p.out_strides.position;
}

template <class T>
const T* key_rows(const Forward& p, const Task& task) {
    return static_cast<const T*>(p.key) + task.batch * p.key_strides.batch + task.key_head * p.key_strides.head;
}

template <class T>
const T* value_rows(const Forward& p, const Task& task) {
    return static_cast<const T*>(p.value) + task.batch * p.value_strides.batch + task.key_head * p.value_strides.head;
}

// lse in natural logarithm, from the maximum of the scores in base 2 and the sum of 2^(score - maximum).
inline void write_lse(const Forward& p, const Task& task, int64_t row, float maximum, float total) {
    const auto [position, head] = place_of(p, task, row);
    p.lse[(task.batch * p.heads + head) * p.query_length + position] =
        total == 0.0f ? -kInfinity : kLn2 * (maximum + std::log2(total));
}

// Scores are kept in base 2, scaled by log2(e), as the exponential wants them. Without a softcap that factor goes
// into the query; a softcap stands between, so it takes scale / softcap into the query and the rest afterwards.
inline float score_factor(const Forward& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E; }

inline Float capped(const Forward& p, Float scores) { return tanh(scores) * (p.softcap * kLog2E); }

}  // namespace nearpeak::attention::NEARPEAK_ISA
