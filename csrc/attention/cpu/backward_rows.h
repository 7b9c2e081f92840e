// What backward does once per row, before and after the blocks of keys.
//
//     delta = rowsum(dOut out) - dLse, which is rowsum(P dP) - dLse
//     d_query = scale * its sums
#pragma once

#include <cmath>

#include "rows.h"

namespace nearpeak::attention::NEARPEAK_ISA {

inline int64_t first_row_of(const Backward& p, const Task& task) {
    return (task.batch * p.key_heads + task.key_head) * p.padded_rows();
}

// lse from natural logarithm to base 2, in two floats: one would make P err as much again as lse itself does.
inline RowStatistics statistics_of(float lse, float delta) {
    const double exact = std::isfinite(lse) ? lse * 1.4426950408889634 : 0.0;
    const float high = static_cast<float>(exact);
    return {high, static_cast<float>(exact - high), delta};
}

template <class T>
void prepare_rows(const Backward& p, const Task& task) {
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
        const T* out = row_in(static_cast<const T*>(p.out), p.out_strides, p, task, row);
        const T* grad_out = row_in(static_cast<const T*>(p.grad_out), p.grad_out_strides, p, task, row);
        Float sums = {};
        for_each_vector(p.head_dim,
                        [&](int64_t d, auto lanes, int) { sums += load(out + d, lanes) * load(grad_out + d, lanes); });
        const int64_t number = number_of(p, task, row);
        const float grad_lse = p.grad_lse ? p.grad_lse[number] : 0.0f;
        const int64_t at = first_row_of(p, task) + row;
        p.statistics[at] = statistics_of(p.lse[number], sum(sums) - grad_lse);
        std::fill_n(p.d_query_sums + at * p.padded_dim(), p.padded_dim(), 0.0f);
    }
}

template <class T>
void finish_rows(const Backward& p, const Task& task) {
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
        const float* sums = p.d_query_sums + (first_row_of(p, task) + row) * p.padded_dim();
        T* to = row_in(static_cast<T*>(p.d_query), p.d_query_strides, p, task, row);
        for_each_vector(p.head_dim,
                        [&](int64_t d, auto lanes, int) { store(to + d, load(sums + d, lanes) * p.scale, lanes); });
    }
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
