// P and dScore of a block of rows and keys in bfloat16, as backward's last three products want them. They are rounded,
// as plain layers' are too.
#pragma once

#include "../../cpu/arena.h"
#include "backward_view.h"

namespace nearpeak::attention::NEARPEAK_ISA {

class PairWeights {
  public:
    static constexpr int64_t kRowStride = 2 * kScoreStride - kBlockKeys;  // elements of bfloat16, spread

    // Of `most_rows` rows at most, of which `unit` go together.
    PairWeights(int64_t most_rows, int64_t its_unit, Arena& arena)
        : unit(its_unit),
          weights(arena.take(most_rows / 2 * kScoreStride)),
          d_scores(arena.take(most_rows / 2 * kScoreStride)),
          d_score_rows(arena.take<bfloat16>(most_rows * kRowStride)) {}

    // Takes P and dScore in float32, which have zeros where a row may not look. The rest of the last unit gets zeros.
    void load(int64_t rows, const float* of_rows, const float* gradients_of_rows) {
        const auto load_row = [&](const float* from, int64_t row, int64_t k) {
            return row < rows ? nearpeak::NEARPEAK_ISA::load(from + row * kScoreStride + k) : Float{};
        };
        for (int64_t row = 0; row < (rows + unit - 1) / unit * unit; row += 2) {
            const int64_t at = row / 2 * kScoreStride;
            for (int64_t k = 0; k < kBlockKeys; k += kLanes) {
                const Float first = load_row(gradients_of_rows, row, k);
                const Float second = load_row(gradients_of_rows, row + 1, k);
                store(weights + at + k, pair(load_row(of_rows, row, k), load_row(of_rows, row + 1, k)));
                store(d_scores + at + k, pair(first, second));
                store_bits(d_score_rows + row * kRowStride + k, rounded_bits(first));
                store_bits(d_score_rows + (row + 1) * kRowStride + k, rounded_bits(second));
            }
        }
    }

  private:
    const int64_t unit;

  public:
    float *const weights, *const d_scores;  // pairs of rows x kBlockKeys, rows of pairs kScoreStride apart
    bfloat16* const d_score_rows;           // rows x kBlockKeys, kRowStride apart
};

}  // namespace nearpeak::attention::NEARPEAK_ISA
