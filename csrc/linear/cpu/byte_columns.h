// y^T = W x^T + b for few rows of x in 8 bits: one instruction multiplies a block that floats take a dozen for.
//
//     y[m, n] = bias[n] + sum over blocks of scale[n, block] x_scale[m, block] * sum over k of number[n, k] code[m, k]
#pragma once

#include "byte_x.h"
#include "quantized_columns.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// Beyond, blocks are as fast. Gop/s of few columns / of blocks, 4096 x 4096 in 8 bits, two threads (Zen 4): 16 rows of
// x 195 / 130, 32 200 / 258; with AVX2 143 / 143, 139 / 171.
constexpr int64_t kFewByteColumns = 16;

// A block of a row of x in 8 bits.
struct ByteBlock {
    SignedBytes codes;
    EightInts less_middle;
    float scale;
};

class ByteX {
  public:
    using Sum = Eight;

    static Float in_lanes(Eight sum) { return in_lanes_of(sum); }
    static Eight as_sum(Eight sum) { return sum; }

    ByteX(const Product& product, Arena& arena) : blocks(product, arena), p(product) {}

    const BlocksOfX<ByteBlock> blocks;

    template <class Row>
    void prepare() {
        const int group_shift = p.quantized->group_shift, blocks_shift = group_shift - kBlockShift;
        const int64_t groups = p.steps >> group_shift;
        for (int64_t column = 0; column < p.columns; ++column) {
            for (int64_t block = 0; block < p.steps / kCodeBlock; ++block) {
                const int8_t* const at = p.rounded->codes + column * p.steps + block * kCodeBlock;
                const float scale = p.rounded->scales[column * groups + (block >> blocks_shift)];
                const SignedBytes codes = load_block(at);
                blocks.set(column, block, {codes, less_middle_of<Row::kMiddle>(codes), scale},
                           Row::kHasShifts ? scale * static_cast<float>(sum_of_codes(at, kCodeBlock)) : 0.0f);
            }
        }
    }

    // Adds a block, the unit's number i.
    template <int kRows, int kColumns, class Row>
    [[gnu::always_inline]] static void add_block(const Row (&rows)[kRows], const ByteBlock* x, int i, int64_t group,
                                                 Eight (&chains)[kRows][kColumns]) {
        UnsignedBytes codes[kRows];
        decltype(rows[0].coefficients(0, 0).without_shift()) coefficients[kRows];
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            codes[row] = rows[row].codes(i);
            coefficients[row] = rows[row].coefficients(i, group).without_shift();
        }
#pragma GCC unroll 4
        for (int column = 0; column < kColumns; ++column) {
            const ByteBlock& its = x[column];
            const Eight x_sum = Row::kNeedsSums ? to_floats(its.less_middle) * (-1.0f / Row::kMiddle) : Eight{};
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                const EightInts sum = dot<Row::kMiddle>(codes[row], its.codes, its.less_middle);
                chains[row][column] += coefficients[row].of(to_floats(sum), x_sum) * its.scale;
            }
        }
    }

  private:
    const Product& p;
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
