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
    return tensor + task.sequence.batch * strides.batch + head * strides.head +
           (task.sequence.query_begin + position) * strides.position;
}

// The row's number in a contiguous (batch, heads, query length).
inline int64_t number_of(const Call& p, const Task& task, int64_t row) {
    const auto [position, head] = place_of(p, task, row);
    return (task.sequence.batch * p.heads + head) * p.query_length + task.sequence.query_begin + position;
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
    return tensor + task.sequence.batch * strides.batch + task.key_head * strides.head +
           task.sequence.key_begin * strides.position;
}

template <class T>
const T* key_rows(const Call& p, const Task& task) {
    return rows_in(static_cast<const T*>(p.key), p.key_strides, task);
}

template <class T>
const T* value_rows(const Call& p, const Task& task) {
    return rows_in(static_cast<const T*>(p.value), p.value_strides, task);
}

// lse in natural logarithm, from the maximum of the scores in base 2 and the sum of 2^(score - maximum). Rounded once:
// backward's probabilities are as good as lse is.
inline float natural_lse(float maximum, float total) {
    constexpr double kLn2Exactly = 0.6931471805599453;
    return total == 0.0f ? -kInfinity : static_cast<float>(kLn2Exactly * (double{maximum} + std::log2(total)));
}

inline void write_lse(const Forward& p, const Task& task, int64_t row, float maximum, float total) {
    p.lse[number_of(p, task, row)] = natural_lse(maximum, total);
}

// Scores are kept in base 2, scaled by log2(e), as the exponential wants them. Without a softcap that factor goes
// into the query. A softcap stands between, and its slope shows each rounding of a product: so queries stay as they
// are. A score program is given scores as they are, and leaves them in base 2.
inline float base_factor(const Call& p) { return p.has_program() ? 1.0f : kLog2E; }
inline float score_factor(const Call& p) { return p.softcap > 0 ? 1.0f : p.scale * base_factor(p); }
inline float before_cap(const Call& p) { return p.scale / p.softcap; }
inline float after_cap(const Call& p) { return p.softcap * base_factor(p); }

inline Float capped(const Call& p, Float scores) { return tanh(scores * before_cap(p)) * after_cap(p); }

}  // namespace nearpeak::attention::NEARPEAK_ISA
