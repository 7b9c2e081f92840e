// y^T = W x^T + b for few rows of x, as in decoding: the weight's bytes are the limit.
//
// in_features lies across the lanes. The weight streams through once; the rows of x, widened once where they have to
// be, stay in the caches and meet each of its vectors together.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../cpu/arena.h"
#include "../../cpu/register_tiles.h"
#include "pack.h"
#include "store.h"

namespace nearpeak::linear::NEARPEAK_ISA {

// From here on packed blocks are as fast. Gflop/s of few_columns / of blocks, 640 x 2048 and 2048 x 640, two threads:
// Zen 4, bfloat16 pairs, 16 columns 211 / 143 and 193 / 180, 24 columns 264 / 198, 32 columns 298 / 289; Zen 4 with
// AVX2, float32, 12 columns 131 / 105, 16 columns 132 / 142.
constexpr int64_t kFewColumns = kLanes == 16 ? 24 : 12;
constexpr int kColumnsTogether = kLanes == 16 ? 6 : 4;
constexpr int kSumsTogether = 8;  // as many independent sums as hide the multiply-add's latency

// Rows of the weight from this size on are read several at once, each a stream that the processor fetches ahead by
// itself; shorter ones end before it has begun, so they are read one after the other and fetched kAhead bytes ahead.
// Zen 3, one row of x, one thread, several at once / one by one: float32, 4096: 23.9 / 16.5 GB/s, bfloat16, 4096:
// 21.4 / 16.5, bfloat16, 640: 12.2 / 19.0; float32, 384, two threads: 20.9 / 15.7.
constexpr int64_t kLongRowBytes = 1536;
constexpr int64_t kAhead = 1024;

inline void multiply_add(Float& sum, Float a, Float b) { sum += a * b; }
inline void multiply_add(Float& sum, Two a, Two b) {
    sum += a.low * b.low;
    sum += a.high * b.high;
}

template <class T>
class FewColumns {
  public:
    FewColumns(const Product& product, Arena& arena)
        : p(product), main(p.factors(), p.columns, arena), update(p.update ? *p.update : Factors{}, p.columns, arena) {}

    // Rows [begin, end) of y^T.
    void run(int64_t begin, int64_t end) {
        main.widen_x(p.columns);
        if (p.update) update.widen_x(p.columns);
        const bool long_rows = p.steps * static_cast<int64_t>(sizeof(T)) >= kLongRowBytes;
        for (int64_t row = begin; row < end; row += kLanes) {
            if (long_rows) {
                multiply_rows<true>(row, end);
            } else {
                multiply_rows<false>(row, end);
            }
        }
    }

  private:
    using Kept = std::conditional_t<kInPairs<T>, bfloat16, float>;

    struct Pair {
        Stored<T> weight, given_x;
        int64_t steps, stride;
        Kept* x;

        Pair(const Factors& factors, int64_t columns, Arena& arena)
            : weight{static_cast<const T*>(factors.left), factors.left_rows},
              given_x{static_cast<const T*>(factors.right), factors.right_rows},
              steps(factors.steps),
              // Rows of x must not fall into few sets of the cache. Zen 5, bfloat16 pairs, 640 x 2048, 6 columns: 536
              // Gflop/s without the vectors between them, 657 with.
              stride(round_up(steps, 2 * kLanes) + 2 * kLanes),
              x(arena.take<Kept>(columns * stride)) {}

        void widen_x(int64_t columns) const {
            for (int64_t column = 0; column < columns; ++column) {
                const T* from = given_x.row(column);
                Kept* const to = x + column * stride;
                for_each_step<T>(steps, [&](int64_t step, auto lanes, int) {
                    store(to + step, load(from + step, lanes), kept(lanes));
                });
            }
        }
    };

    const Product& p;
    const Pair main, update;

    // kLanes rows of y^T, so that all their sums over lanes are taken together. Rows past the end are the last one's.
    template <bool kLong>
    void multiply_rows(int64_t first, int64_t end) const {
        constexpr int kManyRows = std::min(kSumsTogether, kLanes), kSomeRows = std::min(4, kLanes);
        for (int64_t column = 0; column < p.columns; column += kColumnsTogether) {
            with_count<kColumnsTogether>(std::min<int64_t>(kColumnsTogether, p.columns - column), [&](auto together) {
                constexpr int kRows = together > 1 ? kSomeRows : kLong ? kManyRows : 1;
                Float totals[together][kLanes] = {};
                add_pair<kRows, together>(main, column, first, end, totals);
                if (p.update) add_pair<kRows, together>(update, column, first, end, totals);
                store_totals<T>(p, column, together, first, std::min<int64_t>(kLanes, end - first), totals);
            });
        }
    }

    template <int kRows, int kColumns>
    [[gnu::always_inline]] void add_pair(const Pair& pair, int64_t column, int64_t first, int64_t end,
                                         Float (*totals)[kLanes]) const {
        const T* rows[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) rows[lane] = pair.weight.row(std::min(first + lane, end - 1));
        for (int lane = 0; lane < kLanes; lane += kRows) {
            add_rows<kRows, kColumns>(pair, rows + lane, pair.x + column * pair.stride, totals, lane);
        }
    }

    // A few rows of y^T: in float32 as sums of short chains, for which see kChain.
    template <int kRows, int kColumns>
    void add_rows(const Pair& pair, const T* const* rows, const Kept* columns, Float (*totals)[kLanes],
                  int lane) const {
        const int64_t chunk = std::is_same_v<T, float> ? kChain * kLanes : std::max<int64_t>(pair.steps, 1);
        for (int64_t step = 0; step < pair.steps; step += chunk) {
            const int64_t count = std::min(chunk, pair.steps - step);
            add_chunk<kRows, kColumns>(rows, columns, pair.stride, step, count, totals, lane);
        }
    }

    template <int kRows, int kColumns>
    void add_chunk(const T* const* rows, const Kept* columns, int64_t stride, int64_t first, int64_t count,
                   Float (*totals)[kLanes], int lane) const {
        constexpr int kSlots = std::max(1, kSumsTogether / (kRows * kColumns));
        Float sums[kRows][kColumns][kSlots] = {};
        for_each_step<T, kSlots>(count, [&](int64_t i, auto lanes, int slot) {
            const int64_t step = first + i;
            decltype(load(rows[0], lanes)) elements[kRows];
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) elements[row] = load(rows[row] + step, lanes);
            if (kRows == 1) fetch(rows[0] + step + kAhead / static_cast<int64_t>(sizeof(T)), lanes);
#pragma GCC unroll 8
            for (int column = 0; column < kColumns; ++column) {
                const auto factor = load(columns + column * stride + step, kept(lanes));
#pragma GCC unroll 8
                for (int row = 0; row < kRows; ++row) multiply_add(sums[row][column][slot], factor, elements[row]);
            }
        });
        for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) totals[column][lane + row] += add_up(sums[row][column]);
        }
    }
};

}  // namespace nearpeak::linear::NEARPEAK_ISA
