// Attention for few query rows, as in decoding with a KV cache: the keys' and values' bytes are the limit.
//
// head_dim lies across the lanes. Keys and values stream through once, in blocks that stay in the caches while
// all rows (the heads that share them) use them, kRows at a time:
//
//     scores[key][row] = query[row] . key         kLanes / kRows keys at once: kLanes sums, added across together
//     softmax over the block, online              a vector holds all rows of some keys
//     out[row] = out[row] * decay + sum over keys of weights[key][row] * value
//
// While a block's keys are used its values are fetched, and with its values the next block's keys, line after line in
// the order of memory. Without that each product waits for memory in its turn: Zen 3, 8 heads x 4096 x 128 in float32,
// one thread: 10 GB/s without, 12 with lines fetched in the order in which they are used, 19.5 in memory's order.
//
// bfloat16 is multiplied in pairs where the processor can (pairs.h): of dimensions in the scores, of keys in the
// outputs, whose weights are then rounded to bfloat16.
//
// The keys may be split between tasks, whose partial results `merge` combines by their maxima and sums.
#pragma once

#include "../../cpu/arena.h"
#include "../../cpu/math.h"
#include "../../cpu/pairs.h"
#include "dropout.h"
#include "kernels.h"
#include "mask.h"
#include "rows.h"
#include "score_program.h"

namespace nearpeak::attention::NEARPEAK_ISA {

constexpr int64_t kDecodeBlock = 32;  // keys; with head_dim 128 in float32, 16 KiB of keys and as much of values
constexpr int kRowsTogether = 4;      // at most; a vector of scores holds kLanes / kRows keys of kRows rows each
constexpr int kSumsTogether = 8;      // as many independent sums as hide the multiply-add's latency

// Queries and outputs lie in memory as Decode keeps them, padded with zeros to whole vectors.
struct DecodeMemory {
    DecodeMemory(const Forward& p, int64_t rows, Arena& arena)
        : query_stride(padded(p.head_dim)),
          out_stride(padded(p.value_dim)),
          query(arena.take((rows + kRowsTogether - 1) * query_stride)),
          out(arena.take((rows + kRowsTogether - 1) * out_stride)),
          scores(arena.take(kDecodeBlock * kRowsTogether + kLanes)),
          pairs(arena.take(kDecodeBlock / 2 * kRowsTogether + kLanes)),
          terms(p.has_terms() ? arena.take(kDecodeBlock * kRowsTogether + kLanes) : nullptr) {}

    static int64_t padded(int64_t dim) { return (dim + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes; }

    int64_t query_stride, out_stride;
    float *query, *out, *scores, *pairs, *terms;
};

inline void multiply_add(Float& sum, Float a, Float b) { sum += a * b; }
inline void multiply_add(Float& sum, Two a, Two b) {
    sum += a.low * b.low;
    sum += a.high * b.high;
}

// The largest, and the sum, over the lanes that hold the same row: every kRows-th.
template <int kRows>
inline Float maximum_over_keys(Float value) {
    if constexpr (kRows < kLanes) {
        value = max(value, swap_lanes<kRows>(value, std::make_index_sequence<kLanes>()));
        return maximum_over_keys<2 * kRows>(value);
    }
    return value;
}
template <int kRows>
inline Float sum_over_keys(Float value) {
    if constexpr (kRows < kLanes) {
        value += swap_lanes<kRows>(value, std::make_index_sequence<kLanes>());
        return sum_over_keys<2 * kRows>(value);
    }
    return value;
}

template <class T>
class Decode {
  public:
    Decode(const Forward& parameters, const Task& this_task, Arena& arena)
        : p(parameters),
          task(this_task),
          rows(this_task.row_end - this_task.row_begin),
          memory(parameters, rows, arena),
          keys(key_rows<T>(parameters, this_task)),
          values(value_rows<T>(parameters, this_task)) {}

    void run(float* partial) {
        std::fill_n(memory.query, (rows + kRowsTogether - 1) * memory.query_stride, 0.0f);
        std::fill_n(memory.out, (rows + kRowsTogether - 1) * memory.out_stride, 0.0f);
        for (int64_t row = 0; row < rows; ++row) {
            load_query(row);
            ranges[row] = allowed_keys(p, task.sequence, (task.row_begin + row) / p.group());
        }
        for (int64_t row = 0; row < rows; row += kRowsTogether) {
            maximum[row / kRowsTogether] = broadcast(-kInfinity);
            total[row / kRowsTogether] = Float{};
        }
        for (int64_t key = task.key_begin; key < task.key_end; key += kDecodeBlock) {
            const int64_t end = std::min(key + kDecodeBlock, task.key_end);
            for (int64_t row = 0; row < rows; row += kRowsTogether) {
                with_rows(rows - row, [&](auto count) { add_block<count>(row, key, end); });
            }
        }
        for (int64_t row = 0; row < rows; row += kRowsTogether) {
            with_rows(rows - row, [&](auto count) { finish_rows<count>(row, partial); });
        }
    }

  private:
    const Forward& p;
    const Task& task;
    const int64_t rows;
    DecodeMemory memory;
    const T *keys, *values;
    KeyRange ranges[kDecodeRows];
    Float maximum[kDecodeRows / kRowsTogether], total[kDecodeRows / kRowsTogether];

    // Three rows go as four, one of zeros: a vector holds a whole number of keys.
    template <class Function>
    static void with_rows(int64_t count, Function function) {
        if (count == 1) return function(std::integral_constant<int, 1>{});
        if (count == 2) return function(std::integral_constant<int, 2>{});
        function(std::integral_constant<int, kRowsTogether>{});
    }

    const T* key_at(int64_t key) const { return keys + key * p.key_strides.position; }
    const T* value_at(int64_t key) const { return values + key * p.value_strides.position; }

    // Fetches rows one by one, line after line, in the order in which they lie in memory, which memory is fast at.
    struct Fetch {
        const T* rows;
        int64_t stride, width, count, row = 0;

        void next() {
            if (row >= count) return;
            for (int64_t column = 0; column < width; column += 64 / sizeof(T)) {
                __builtin_prefetch(rows + row * stride + column);
            }
            ++row;
        }
    };

    // Pairs stay as they are: scaled, they would be rounded once more.
    using KeptQuery = std::conditional_t<kInPairs<T>, bfloat16, float>;

    KeptQuery* query_at(int64_t row) const {
        return reinterpret_cast<KeptQuery*>(memory.query + row * memory.query_stride);
    }

    void load_query(int64_t row) {
        const T* query = query_row<T>(p, task, task.row_begin + row);
        for_each_step<T>(p.head_dim, [&](int64_t d, auto lanes, int) {
            if constexpr (kInPairs<T>) {
                store(query_at(row) + d, load(query + d, lanes), kept(lanes));
            } else {
                store(query_at(row) + d, load(query + d, lanes) * score_factor(p), kept(lanes));
            }
        });
    }

    template <int kRows>
    void add_block(int64_t row, int64_t begin, int64_t end) {
        constexpr int kKeys = kLanes / kRows;
        float* const scores = memory.scores;
        Float& row_maximum = maximum[row / kRowsTogether];
        const auto [first, last] = allowed_in_block<kRows>(row, begin, end);
        const bool masked = any(first > 0) || any(last < static_cast<int32_t>(end - begin));
        Float now = row_maximum;
        // The first rows fetch for all.
        Fetch coming_values{value_at(begin), p.value_strides.position, p.value_dim, row == 0 ? end - begin : 0};
        if (p.has_terms()) load_terms<kRows>(row, begin, end);
        for (int64_t key = begin; key < end; key += kKeys) {
            for (int k = 0; k < kKeys; ++k) coming_values.next();
            Float score = multiply_keys<kRows>(row, key, end - 1);
            if (p.softcap > 0) score = capped(p, score);
            store(scores + (key - begin) * kRows, score);
        }
        if (p.has_program()) modify_scores<kRows>(row, begin, end);
        for (int64_t key = begin; key < end; key += kKeys) {
            Float score = load(scores + (key - begin) * kRows);
            if (p.has_terms()) score += load(memory.terms + (key - begin) * kRows);
            if (masked || key + kKeys > end) {
                const Int number = lane_numbers() / kRows + static_cast<int32_t>(key - begin);
                score = select((number >= first) & (number < last), score, broadcast(-kInfinity));
            }
            now = max(now, score);
            store(scores + (key - begin) * kRows, score);
        }
        now = maximum_over_keys<kRows>(now);
        const Float finite = select(now == -kInfinity, Float{}, now);
        const Float decay = exp2(row_maximum - finite);
        row_maximum = now;
        Float sums = {};
        for (int64_t i = 0; i < (end - begin) * kRows; i += kLanes) {
            const Float weight = exp2(load(scores + i) - finite);
            sums += weight;
            store(scores + i, weight);
        }
        total[row / kRowsTogether] = total[row / kRowsTogether] * decay + sums;
        if (p.drops()) drop_weights<kRows>(row, begin, end);
        if (kInPairs<T>) pair_weights<kRows>(end - begin);
        add_values<kRows>(row, begin, end, decay);
    }

    // The weights of two keys each, all rows of them; of a last key alone, with a zero.
    template <int kRows>
    void pair_weights(int64_t count) const {
        for (int64_t i = 0; i < count * kRows; i += 2 * kLanes) {
            const Float first = load(memory.scores + i);
            const Float second = i + kLanes < count * kRows ? load(memory.scores + i + kLanes) : Float{};
            const auto [even, odd] = even_and_odd_keys<kRows>(first, second, std::make_index_sequence<kLanes>());
            store(memory.pairs + i / 2, pair(even, odd));
        }
    }

    template <int kRows, std::size_t... lane>
    static Two even_and_odd_keys(Float first, Float second, std::index_sequence<lane...>) {
        return {__builtin_shufflevector(first, second, (lane / kRows * 2 * kRows + lane % kRows)...),
                __builtin_shufflevector(first, second, (lane / kRows * 2 * kRows + kRows + lane % kRows)...)};
    }

    template <int kRows>
    void drop_weights(int64_t row, int64_t begin, int64_t end) const {
        const LaneKeys keys(p, task, [&](int lane) { return task.row_begin + std::min(row + lane % kRows, rows - 1); });
        Unsigned columns = bitcast<Unsigned>(lane_numbers()) / kRows + column_of(task, begin);
        for (int64_t i = 0; i < (end - begin) * kRows; i += kLanes, columns += kLanes / kRows) {
            const Int kept = is_kept(p.dropout, keys.first, keys.second, columns);
            store(memory.scores + i, select(kept, load(memory.scores + i), Float{}));
        }
    }

    template <int kRows>
    void modify_scores(int64_t row, int64_t begin, int64_t end) const {
        ScorePlaces places =
            places_of_lanes(p, task, [&](int lane) { return task.row_begin + std::min(row + lane % kRows, rows - 1); });
        ScoreRunner run(p.score_program);
        Int key = lane_numbers() / kRows + static_cast<int32_t>(task.sequence.key_begin + begin);
        const int64_t count = (end - begin) * kRows;
        for (int64_t i = 0; i < count; i += kVectorsTogether * kLanes) {
            const int64_t left = (count - i + kLanes - 1) / kLanes;
            const int vectors = static_cast<int>(std::min<int64_t>(kVectorsTogether, left));
            Float block[kVectorsTogether];
            for (int vector = 0; vector < vectors; ++vector, key += kLanes / kRows) {
                places.key[vector] = key;
                block[vector] = load(memory.scores + i + vector * kLanes);
            }
            run(places, block, nullptr, vectors);
            for (int vector = 0; vector < vectors; ++vector) store(memory.scores + i + vector * kLanes, block[vector]);
        }
    }

    // As the scores lie: key by key, all rows of a key.
    template <int kRows>
    void load_terms(int64_t row, int64_t begin, int64_t end) const {
        for (int r = 0; r < kRows; ++r) {
            float of_row[kDecodeBlock] = {};
            add_terms(p, task, task.row_begin + std::min(row + r, rows - 1), begin, end, of_row);
            for (int64_t k = 0; k < kDecodeBlock; ++k) memory.terms[k * kRows + r] = of_row[k];
        }
    }

    struct Bounds {
        Int first, last;
    };

    // Of the block's keys, counted from its first, those that the row of each lane may look at.
    template <int kRows>
    Bounds allowed_in_block(int64_t row, int64_t begin, int64_t end) const {
        Bounds bounds;
        for (int r = 0; r < kRows; ++r) {
            const KeyRange allowed = ranges[std::min(row + r, rows - 1)];
            for (int lane = r; lane < kLanes; lane += kRows) {
                bounds.first[lane] = static_cast<int32_t>(std::clamp<int64_t>(allowed.begin - begin, 0, end - begin));
                bounds.last[lane] = static_cast<int32_t>(std::clamp<int64_t>(allowed.end - begin, 0, end - begin));
            }
        }
        return bounds;
    }

    // Scores of kLanes / kRows keys from `key` on, key by key; those past the last are the last one's.
    template <int kRows>
    Float multiply_keys(int64_t row, int64_t key, int64_t last) const {
        constexpr int kKeys = kLanes / kRows;
        Float sums[kLanes] = {};
        const T* at[kKeys];
        for (int k = 0; k < kKeys; ++k) {
            at[k] = key_at(std::min(key + k, last));
        }
        const KeptQuery* query = query_at(row);
        const int64_t stride = query_at(1) - query_at(0);
        for_each_step<T>(p.head_dim, [&](int64_t d, auto lanes, int) {
            decltype(load(at[0], lanes)) elements[kKeys];
#pragma GCC unroll 16
            for (int k = 0; k < kKeys; ++k) elements[k] = load(at[k] + d, lanes);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                auto q = load(query + r * stride + d, kept(lanes));
                keep_in_register(q);
#pragma GCC unroll 16
                for (int k = 0; k < kKeys; ++k) multiply_add(sums[k * kRows + r], q, elements[k]);
            }
        });
        return kInPairs<T> ? sum_each(sums) * score_factor(p) : sum_each(sums);
    }

    template <int kRows>
    void add_values(int64_t row, int64_t begin, int64_t end, Float decay) {
        constexpr int kColumns = std::max(1, kSumsTogether / (2 * kRows));
        constexpr int64_t kStep = kColumns * 2 * kLanes;
        const int64_t coming = row == 0 ? std::min(kDecodeBlock, task.key_end - end) : 0;
        Fetch coming_keys{key_at(end), p.key_strides.position, p.head_dim, coming};
        // A next key after so many of these: spread evenly over all columns.
        const int64_t keys_per_fetch = (p.value_dim + kStep - 1) / kStep;
        using Whole = std::conditional_t<kInPairs<T>, AllPairs, TwoVectors<T>>;
        int64_t d = 0;
        for (; d + kStep <= p.value_dim; d += kStep) {
            add_columns<kRows, kColumns>(row, d, Whole{}, begin, end, decay, coming_keys, keys_per_fetch);
        }
        for_each_step<T>(p.value_dim - d, [&](int64_t column, auto lanes, int) {
            add_columns<kRows, 1>(row, d + column, lanes, begin, end, decay, coming_keys, keys_per_fetch);
        });
    }

    template <int kRows, int kColumns, class Lanes>
    void add_columns(int64_t row, int64_t d, Lanes lanes, int64_t begin, int64_t end, Float decay, Fetch& coming_keys,
                     int64_t keys_per_fetch) {
        using Sum = std::conditional_t<kInPairs<T>, Two, decltype(load(values, lanes))>;
        Sum sums[kRows][kColumns] = {};
        for (int64_t key = begin; key < end;) {
            coming_keys.next();
            const int64_t stop = std::min(key + keys_per_fetch, end);
            if constexpr (kInPairs<T>) {
                for (; key < stop; key += 2) add_two_keys(sums, d, lanes, begin, key, end);
            } else {
                for (; key < stop; ++key) add_key(sums, d, lanes, begin, key);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int c = 0; c < kColumns; ++c) {
                float* at = memory.out + (row + r) * memory.out_stride + d + c * 2 * kLanes;
                store(at, load(at, kept_out(lanes)) * decay[r] + sums[r][c], kept_out(lanes));
            }
        }
    }

    // Outputs lie as kept(lanes) does; those of pairs, even elements before odd ones.
    template <class Lanes>
    static auto kept_out(Lanes lanes) {
        if constexpr (kInPairs<T>) {
            return TwoVectors<float>{};
        } else {
            return kept(lanes);
        }
    }

    template <int kRows, int kColumns, class Sum, class Lanes>
    void add_key(Sum (&sums)[kRows][kColumns], int64_t d, Lanes lanes, int64_t begin, int64_t key) const {
        const T* value = value_at(key) + d;
        const float* weight = memory.scores + (key - begin) * kRows;
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            const auto element = load(value + c * 2 * kLanes, lanes);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sums[r][c] = sums[r][c] + weight[r] * element;
        }
    }

    // Of a last key alone, the other one's values are zeros.
    template <int kRows, int kColumns, class Lanes>
    void add_two_keys(Two (&sums)[kRows][kColumns], int64_t d, Lanes lanes, int64_t begin, int64_t key,
                      int64_t end) const {
        const T *first = value_at(key) + d, *second = value_at(key + 1) + d;
        const float* weight = memory.pairs + (key - begin) / 2 * kRows;
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            const Float other = key + 1 < end ? load(second + c * 2 * kLanes, lanes).bits : Float{};
            const Two elements = pairs_across(load(first + c * 2 * kLanes, lanes).bits, other);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const Float pair = broadcast(weight[r]);
                sums[r][c].low = multiply_add_pairs(pair, elements.low, sums[r][c].low);
                sums[r][c].high = multiply_add_pairs(pair, elements.high, sums[r][c].high);
            }
        }
    }

    template <int kRows>
    void finish_rows(int64_t row, float* partial) const {
        const Float totals = sum_over_keys<kRows>(total[row / kRowsTogether]);
        for (int r = 0; r < kRows && row + r < rows; ++r) {
            finish_row(row + r, maximum[row / kRowsTogether][r], totals[r], partial);
        }
    }

    void finish_row(int64_t row, float row_maximum, float row_total, float* partial) const {
        const float* out = memory.out + row * memory.out_stride;
        if (partial) {
            float* to = partial + row * (p.value_dim + 2);
            to[0] = row_maximum;
            to[1] = row_total;
            for_each_step<T>(p.value_dim, [&](int64_t d, auto lanes, int) {
                store(to + 2 + d, load(out + d, kept_out(lanes)), lanes);
            });
            return;
        }
        const Softmax softmax = with_sink(p, task, task.row_begin + row, row_maximum, row_total);
        const float inverse = out_factor(p, softmax);
        T* to = out_row<T>(p, task, task.row_begin + row);
        for_each_step<T>(p.value_dim, [&](int64_t d, auto lanes, int) {
            store(to + d, load(out + d, kept_out(lanes)) * inverse, lanes);
        });
        write_lse(p, task, task.row_begin + row, softmax.maximum, softmax.total);
    }
};

// out = sum of partial outs * 2^(maximum - common maximum), divided by the sum of the sums scaled likewise.
template <class T>
void merge_rows(const Forward& p, const Task& task, const float* partials, int64_t count, int64_t partial_stride) {
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
        const float* first = partials + (row - task.row_begin) * (p.value_dim + 2);
        float maximum = -kInfinity, total = 0.0f;
        for (int64_t part = 0; part < count; ++part) maximum = std::max(maximum, first[part * partial_stride]);
        const float finite = maximum == -kInfinity ? 0.0f : maximum;
        const auto factor = [&](int64_t part) { return exp2(broadcast(first[part * partial_stride] - finite))[0]; };
        for (int64_t part = 0; part < count; ++part) total += first[part * partial_stride + 1] * factor(part);
        const Softmax softmax = with_sink(p, task, row, maximum, total);
        const float inverse = out_factor(p, softmax);
        T* to = out_row<T>(p, task, row);
        for_each_vector(p.value_dim, [&](int64_t d, auto lanes, int) {
            Float sums = {};
            for (int64_t part = 0; part < count; ++part) {
                sums += load(first + part * partial_stride + 2 + d, lanes) * factor(part);
            }
            store(to + d, sums * inverse, lanes);
        });
        write_lse(p, task, row, softmax.maximum, softmax.total);
    }
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
