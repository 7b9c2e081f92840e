// Matrix products of linear layers: what one call needs, and the kernels that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/activation.h"
#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"
#include "../../cpu/rows.h"

namespace nearpeak::linear {

// A matrix in memory; `transposed`, its columns are what lies in rows there.
struct Matrix {
    Rows rows;
    bool transposed;
};

// A weight of `bits`-bit codes, one scale and perhaps one zero point per row and group of neighbouring steps:
//
//     weight[row][step] = scales[row][group] * (code[row][step] - zeros[row][group]),  group = step / group_size
//
// A zero that is not given is the middle code. Rows lie one after the other. 4-bit codes lie in blocks of
// kCodeBlock: byte i of a block's kCodeBlock / 2 holds its code i in the low half and code i + kCodeBlock / 2 in the
// high one, so that each half of a vector of bytes is a vector of neighbouring codes.
struct Quantized {
    const uint8_t* codes;
    const float* scales;
    const uint8_t* zeros;  // or null
    int group_shift;       // log2 of group_size, which is kCodeBlock at least and divides the steps
    int bits;              // 8 or 4
};
constexpr int64_t kCodeBlock = 32;

//     out[row][column] = bias[row] + sum over steps of left[row][step] * right[step][column]
//
//                        left            right           out         steps
//     y^T  = W x^T       weight          x, transposed   transposed  in_features
//     d_x  = d_y W       d_y             weight                      out_features
//     d_W  = d_y^T x     d_y, transposed x                           rows of x
//
// Forward computes y^T: elements of `left` are broadcast, and so the weight, the largest of the three, need not be
// transposed in memory. There `out` may have an epilogue:  activation(before) + residual,  `before` the sum above.
struct Product {
    const void* left;            // or null, where there is
    const Quantized* quantized;  // a quantised one, or null
    const void* right;
    const void* bias;  // or null
    void* out;
    Matrix left_matrix, right_matrix, out_matrix;
    int64_t rows, columns, steps;
    Dtype dtype;

    const Activation* activation;  // or null
    const void* residual;          // or null; its rows are y's
    Rows residual_rows;
    void* before;  // where it goes, laid out as `out`, or null

    bool has_epilogue() const { return activation || residual || before; }
};

// A part of `out`.
struct Block {
    int64_t row_begin, row_end, column_begin, column_end;
};

// Columns of a block at most, a multiple of every panel: with 256 steps in float32 they fill half of a 512 KiB
// second-level cache.
constexpr int64_t kBlockColumns = 256;

struct Kernels {
    // Floats of scratch memory that `multiply` needs for this block.
    int64_t (*scratch)(const Product&, const Block&);
    void (*multiply)(const Product&, const Block&, float* scratch);

    // For y^T of few rows of x, up to `most_few_columns`: rows [begin, end) of `out`, all columns. The weight's bytes
    // are the limit.
    int64_t (*most_few_columns)(const Product&);
    int64_t (*few_columns_scratch)(const Product&);
    void (*few_columns)(const Product&, int64_t begin, int64_t end, float* scratch);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::linear
