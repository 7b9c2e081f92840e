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

inline RowPlace place_of(const Call& p, const Task& task, int64_t row) {
    return {row / p.group(), task.key_head * p.group() + row % p.group()};
}

// The row's head_dim elements in a tensor of query's shape.
template <class T>
T* row_in(T* tensor, const Strides& strides, const Call& p, const Task& task, int64_t row) {
    const auto [position, head] = place_of(p, task, row);
    return tensor + task.batch * strides.batch + head * strides.head + position * strides.position;
}

// The row's number in a contiguous (batch, heads, query length).
inline int64_t number_of(const Call& p, const Task& task, int64_t row) {
    const auto [position, head] = place_of(p, task, row);
    return (task.batch * p.heads + head) * p.query_length + position;
}

template <class T>
const T* query_row(const Call& p, const Task& task, int64_t row) {
    return row_in(static_cast<const T*>(p.query), p.query_strides, p, task, row);
}

template <class T>
T* out_row(const Forward& p, const Task& task, int64_t row) {
    return row_in(static_cast<T*>(p.out), p.out_strides, p, task, row);
}

// The task's rows in a tensor of key's shape, which begin strides.position apart.
template <class T>
T* rows_in(T* tensor, const Strides& strides, const Task& task) {
    return tensor + task.batch * strides.batch + task.key_head * strides.head;
}

template <class T>
const T* key_rows(const Call& p, const Task& task) {
    return rows_in(static_cast<const T*>(p.key), p.key_strides, task);
}

template <class T>
const T* value_rows(const Call& p, const Task& task) {
    return rows_in(static_cast<const T*>(p.value), p.value_strides, task);
}

// lse in natural logarithm, from the maximum of the scores in base 2 and the sum of 2^(score - maximum).
inline void write_lse(const Forward& p, const Task& task, int64_t row, float maximum, float total) {
    p.lse[number_of(p, task, row)] = total == 0.0f ? -kInfinity : kLn2 * (maximum + std::log2(total));
}

// Scores are kept in base 2, scaled by log2(e), as the exponential wants them. Without a softcap that factor goes
// into the query; a softcap stands between, so it takes scale / softcap into the query and the rest afterwards.
inline float score_factor(const Call& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E; }

inline Float capped(const Call& p, Float scores) { return tanh(scores) * (p.softcap * kLog2E); }

}  // namespace nearpeak::attention::NEARPEAK_ISA
