// y^T = W x^T + b for few rows of x, rounded to 8 bits: one instruction multiplies a block that floats take a dozen
// for.
//
//     y[m, n] = bias[n] + sum over blocks of x_scale[m, block] * scale[n, block] * sum over k of number[n, k] code[m,
//     k]
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
        with_type(p.dtype, [&](auto* t) { quantize<Row::kMiddle, std::remove_pointer_t<decltype(t)>>(); });
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

    template <int kMiddle, class T>
    void quantize() const {
        const Stored<T> from{static_cast<const T*>(p.right), p.right_matrix.rows};
        const int64_t size = p.quantized->group_size();
        for (int64_t column = 0; column < p.columns; ++column) {
            for (int64_t step = 0; step < p.steps; step += size) {
                int8_t group[kMostGroup];
                const float scale = quantize_group(from.row(column) + step, size, group);
                for (int64_t i = 0; i < size; i += kCodeBlock) {
                    const SignedBytes codes = load_block(group + i);
                    blocks.set(column, (step + i) / kCodeBlock, {codes, less_middle_of<kMiddle>(codes), scale},
                               scale * static_cast<float>(sum_of_codes(group + i, kCodeBlock)));
                }
            }
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
