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

// Of a quantised weight: codes of 8 or 4 bits, or one of GGUF's blocks (gguf_rows.h).
enum class Format { bits8, bits4, q4_0, q5_0, q8_0, q4_k, q5_k, q6_k };

// A quantised weight. Rows lie one after the other. Codes have one scale and perhaps one zero point per row and group
// of neighbouring steps:
//
//     weight[row][step] = scales[row][group] * (code[row][step] - zeros[row][group]),  group = step / group_size
//
// A zero that is not given is the middle code. 4-bit codes lie in blocks of kCodeBlock: byte i of a block's
// kCodeBlock / 2 holds its code i in the low half and code i + kCodeBlock / 2 in the high one, so that each half of a
// vector of bytes is a vector of neighbouring codes. Blocks hold their scales themselves.
struct Quantized {
    Format format;
    const uint8_t* codes;  // or blocks
    const float* scales;   // or null
    const uint8_t* zeros;  // or null
    int group_shift;       // log2 of the steps of a group, which divide all steps; of blocks: kBlockShift

    int64_t group_size() const { return int64_t{1} << group_shift; }
};
constexpr int kBlockShift = 5;
constexpr int64_t kCodeBlock = 1 << kBlockShift;

//     out[row][column] = bias[row] + scale * sum over steps of left[row][step] * right[step][column]
//
//                        left            right           out         steps
//     y^T  = W x^T       weight          x, transposed   transposed  in_features
//     d_x  = d_y W       d_y             weight                      out_features
//     d_W  = d_y^T x     d_y, transposed x                           rows of x
//
// With a quantised weight x may be rounded to 8 bits, in groups like the weight's (byte_x.h): its rows follow one
// another.
struct RoundedX {
    int8_t* codes;
    float* scales;
};

// A second pair of factors, of a few steps, may be added to the sums: a low-rank update of the weight.
//
// Forward computes y^T: elements of `left` are broadcast, and so the weight, the largest of the three, need not be
// transposed in memory. There `out` may have an epilogue:  activation(before) + residual,  `before` the sum above.
struct Factors {
    const void *left, *right;
    Rows left_rows, right_rows;
    int64_t steps;
};

struct Product {
    const void* left;            // or null, where there is
    const Quantized* quantized;  // a quantised one, or null
    const void* right;
    const RoundedX* rounded;  // what it is rounded to, or null
    const void* bias;         // or null
    void* out;
    Matrix left_matrix, right_matrix, out_matrix;
    int64_t rows, columns, steps;
    Dtype dtype;
    const Factors* update;  // lies transposed where the first pair does; or null
    float scale = 1.0f;     // of the sums

    Factors factors() const { return {left, right, left_matrix.rows, right_matrix.rows, steps}; }

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

    // Writes rows [begin, end) of `rounded`. Null where weights are not quantised.
    void (*round_x)(const Product&, int64_t begin, int64_t end);
};

// Those of products with a quantised weight have a table of their own.
#define NEARPEAK_DECLARE_QUANTIZED_KERNELS(isa) \
    namespace isa {                             \
    extern const Kernels quantized_kernels;     \
    }
#define NEARPEAK_QUANTIZED_KERNELS_OF(isa) &isa::quantized_kernels,

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)
NEARPEAK_ISAS(NEARPEAK_DECLARE_QUANTIZED_KERNELS)

}  // namespace nearpeak::linear
