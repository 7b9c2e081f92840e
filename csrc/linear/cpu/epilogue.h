// What follows a product before it is stored:  y = f(product) + residual.
//
// A few vectors of y at a time, in functions of their own: inlined, the activation would take registers from the
// products.
#pragma once

#include "../../cpu/activations.h"
#include "pack.h"

namespace nearpeak::linear::NEARPEAK_ISA {

struct Vectors {
    Float of[kLanes];
};

// All as one loop each, so that the processor works on several vectors at once.
[[gnu::noinline, gnu::flatten]] inline void activate(Activation activation, Vectors& values, int64_t count) {
    with_activation(activation, [&](auto f) {
        for (int64_t i = 0; i < count; ++i) values.of[i] = f.at(values.of[i]).value;
    });
}

inline int64_t count_of(AllLanes) { return kLanes; }
inline int64_t count_of(int64_t count) { return count; }

// Columns [column, column + columns) of y^T, `count` neighbouring rows of each from `row` on.
template <class T>
[[gnu::noinline]] void store_with_epilogue(const Product& p, Vectors values, int64_t column, int64_t columns,
                                           int64_t row, int64_t count) {
    const auto run = [&](auto lanes) {
        const auto at = [&](void* matrix, int64_t i) {
            return static_cast<T*>(matrix) + p.out_matrix.rows(column + i) + row;
        };
        if (p.before) {
            for (int64_t i = 0; i < columns; ++i) store(at(p.before, i), values.of[i], lanes);
        }
        if (p.activation) activate(*p.activation, values, columns);
        const T* residual = static_cast<const T*>(p.residual);
        for (int64_t i = 0; i < columns; ++i) {
            if (residual) values.of[i] += load(residual + p.residual_rows(column + i) + row, lanes);
            store(at(p.out, i), values.of[i], lanes);
        }
    };
    if (count == kLanes) {
        run(AllLanes{});
    } else {
        run(count);
    }
}

}  // namespace nearpeak::linear::NEARPEAK_ISA
