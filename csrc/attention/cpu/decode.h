// Attention for few query rows, as in decoding with a KV cache: the keys' and values' bytes are the limit.
//
// head_dim lies across the lanes, keys and values stream through once, in blocks that stay in the first-level cache
// while up to kRowsTogether rows (the heads that share them) use them:
//
//     scores[row][key] = query[row] . key         one horizontal sum per score
//     softmax over the block, online
//     out[row] = out[row] * decay + sum over keys of weights[row][key] * value
//
// The keys may be split between tasks, whose partial results `merge` combines by their maxima and sums.
#pragma once

#include "../../cpu/math.h"
#include "kernels.h"
#include "mask.h"
#include "memory.h"
#include "rows.h"

namespace nearpeak::attention::NEARPEAK_ISA {

constexpr int64_t kDecodeBlock = 64;  // keys; with head_dim 128 in float32, 32 KiB of keys and as much of values
constexpr int kRowsTogether = 4;    // 4 rows x 2 keys = 8 independent sums, as many as hide the multiply-add's latency
constexpr int kValuesTogether = 8;  // values added per read and write of an output

struct DecodeMemory {
    DecodeMemory(const Forward& p, int64_t rows, Arena& arena)
        : padded_dim((p.head_dim + kLanes - 1) / kLanes * kLanes),
          query(arena.take(rows * padded_dim)),
          out(arena.take(rows * padded_dim)),
          scores(arena.take(rows * kDecodeBlock)) {}

    int64_t padded_dim;
    float *query, *out, *scores;
};

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
        for (int64_t row = 0; row < rows; ++row) start_row(row);
        for (int64_t key = task.key_begin; key < task.key_end; key += kDecodeBlock) {
            const int64_t end = std::min(key + kDecodeBlock, task.key_end);
            for (int64_t row = 0; row < rows; row += kRowsTogether) {
                with_rows(std::min<int64_t>(kRowsTogether, rows - row),
                          [&](auto count) { add_block<count>(row, key, end); });
            }
        }
        for (int64_t row = 0; row < rows; ++row) finish_row(row, partial);
    }

  private:
    const Forward& p;
    const Task& task;
    const int64_t rows;
    DecodeMemory memory;
    const T *keys, *values;
    float maximum[kDecodeRows], total[kDecodeRows];

    template <class Function>
    static void with_rows(int64_t count, Function function) {
        switch (count) {
            case 1:
                return function(std::integral_constant<int, 1>{});
            case 2:
                return function(std::integral_constant<int, 2>{});
            case 3:
                return function(std::integral_constant<int, 3>{});
            default:
                return function(std::integral_constant<int, kRowsTogether>{});
        }
    }

    const T* key_at(int64_t key) const { return keys + key * p.key_strides.position; }
    const T* value_at(int64_t key) const { return values + key * p.value_strides.position; }
    float* scores_of(int64_t row) const { return memory.scores + row * kDecodeBlock; }

    void start_row(int64_t row) {
        const T* query = query_row<T>(p, task, task.row_begin + row);
        const float factor = score_factor(p);
        for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
            // Whole vectors: what pads the last one must be zero, for it is multiplied too.
            store(memory.query + row * memory.padded_dim + d, load(query + d, lanes) * factor);
            store(memory.out + row * memory.padded_dim + d, Float{});
        });
        maximum[row] = -kInfinity;
        total[row] = 0.0f;
    }

    template <int kRows>
    void add_block(int64_t row, int64_t begin, int64_t end) {
        int64_t key = begin;
        for (; key + 2 <= end; key += 2) multiply_keys<kRows, 2>(row, key, begin);
        if (key < end) multiply_keys<kRows, 1>(row, key, begin);
        float decay[kRows];
        for (int r = 0; r < kRows; ++r) decay[r] = softmax(row + r, begin, end);
        int64_t first = begin;
        for (; first + kValuesTogether <= end; first += kValuesTogether) {
            add_values<kRows, kValuesTogether>(row, first, begin, decay);
            std::fill_n(decay, kRows, 1.0f);
        }
        for (; first < end; ++first) {
            add_values<kRows, 1>(row, first, begin, decay);
            std::fill_n(decay, kRows, 1.0f);
        }
    }

    template <int kRows, int kKeys>
    void multiply_keys(int64_t row, int64_t key, int64_t block_begin) {
        Float sums[kRows][kKeys] = {};
        const float* query = memory.query + row * memory.padded_dim;
        for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
            Float elements[kKeys];
            for (int k = 0; k < kKeys; ++k) elements[k] = load(key_at(key + k) + d, lanes);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const Float q = load(query + r * memory.padded_dim + d);
#pragma GCC unroll 2
                for (int k = 0; k < kKeys; ++k) sums[r][k] += q * elements[k];
            }
        });
        for (int r = 0; r < kRows; ++r) {
            for (int k = 0; k < kKeys; ++k) scores_of(row + r)[key + k - block_begin] = sum(sums[r][k]);
        }
    }

    // Turns the row's scores into weights; returns what earlier sums shrink by.
    float softmax(int64_t row, int64_t begin, int64_t end) {
        float* scores = scores_of(row);
        const int64_t count = end - begin;
        const KeyRange allowed = allowed_keys(p, (task.row_begin + row) / p.group());
        if (p.softcap > 0) {
            for_each_vector(count, [&](int64_t k, auto lanes, int) {
                store(scores + k, capped(p, load(scores + k, lanes)), lanes);
            });
        }
        const int64_t first = std::clamp<int64_t>(allowed.begin - begin, 0, count);
        const int64_t last = std::clamp<int64_t>(allowed.end - begin, first, count);
        std::fill(scores, scores + first, -kInfinity);
        // The vector that the last key lies in is padded, so that whole vectors can be used below.
        std::fill(scores + last, scores + (count + kLanes - 1) / kLanes * kLanes, -kInfinity);
        Float now = broadcast(maximum[row]);
        for (int64_t k = 0; k < count; k += kLanes) now = max(now, load(scores + k));
        const float before = maximum[row];
        maximum[row] = NEARPEAK_ISA::maximum(now);
        const float finite = maximum[row] == -kInfinity ? 0.0f : maximum[row];
        Float sums = {};
        for (int64_t k = 0; k < count; k += kLanes) {
            const Float weight = exp2(load(scores + k) - finite);
            sums += weight;
            store(scores + k, weight);
        }
        const float decay = exp2(broadcast(before - finite))[0];
        total[row] = total[row] * decay + sum(sums);
        return decay;
    }

    template <int kRows, int kKeys>
    void add_values(int64_t row, int64_t key, int64_t block_begin, const float* decay) {
        float* out = memory.out + row * memory.padded_dim;
        for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
            Float elements[kKeys];
#pragma GCC unroll 8
            for (int k = 0; k < kKeys; ++k) elements[k] = load(value_at(key + k) + d, lanes);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const float* weights = scores_of(row + r) + key - block_begin;
                Float sums = weights[0] * elements[0];
#pragma GCC unroll 8
                for (int k = 1; k < kKeys; ++k) sums += weights[k] * elements[k];
                float* at = out + r * memory.padded_dim + d;
                store(at, load(at) * decay[r] + sums);
            }
        });
    }

    void finish_row(int64_t row, float* partial) const {
        const float* out = memory.out + row * memory.padded_dim;
        if (partial) {
            float* to = partial + row * (p.head_dim + 2);
            to[0] = maximum[row];
            to[1] = total[row];
            std::copy_n(out, p.head_dim, to + 2);
            return;
        }
        const float inverse = total[row] == 0.0f ? 0.0f : 1.0f / total[row];
        T* to = out_row<T>(p, task, task.row_begin + row);
        for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) { store(to + d, load(out + d) * inverse, lanes); });
        write_lse(p, task, task.row_begin + row, maximum[row], total[row]);
    }
};

// out = sum of partial outs * 2^(maximum - common maximum), divided by the sum of the sums scaled likewise.
template <class T>
void merge_rows(const Forward& p, const Task& task, const float* partials, int64_t count, int64_t partial_stride) {
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
        const float* first = partials + (row - task.row_begin) * (p.head_dim + 2);
        float maximum = -kInfinity, total = 0.0f;
        for (int64_t part = 0; part < count; ++part) maximum = std::max(maximum, first[part * partial_stride]);
        const float finite = maximum == -kInfinity ? 0.0f : maximum;
        const auto factor = [&](int64_t part) { return exp2(broadcast(first[part * partial_stride] - finite))[0]; };
        for (int64_t part = 0; part < count; ++part) total += first[part * partial_stride + 1] * factor(part);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        T* to = out_row<T>(p, task, row);
        for_each_vector(p.head_dim, [&](int64_t d, auto lanes, int) {
            Float sums = {};
            for (int64_t part = 0; part < count; ++part) {
                sums += load(first + part * partial_stride + 2 + d, lanes) * factor(part);
            }
            store(to + d, sums * inverse, lanes);
        });
        write_lse(p, task, row, maximum, total);
    }
}

}  // namespace nearpeak::attention::NEARPEAK_ISA
