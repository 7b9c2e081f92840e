// Feed-forward activations, alone or gating a second input: what one call needs, and the kernels that each instruction
// set provides.
#pragma once

#include <cstdint>

#include "../../cpu/activation.h"
#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"
#include "../../cpu/rows.h"

namespace nearpeak::feedforward {

// Rows of `width` elements; a call may be cut into columns as well. Pointers that a call does not need are null.
struct Call {
    const void* x;     // what the activation is of: the gate, where there is one
    const void* up;    // what it multiplies, or null
    const void* grad;  // of y, in backward
    void* y;
    void* d_x;
    void* d_up;
    Rows x_rows, up_rows, grad_rows, y_rows, d_x_rows, d_up_rows;
    Activation activation;
    Dtype dtype;
};

struct Kernels {
    // Columns [begin, end) of one row.
    void (*forward)(const Call&, int64_t row, int64_t begin, int64_t end);
    void (*backward)(const Call&, int64_t row, int64_t begin, int64_t end);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::feedforward
