// a' = a cos - b sin,  b' = b cos + a sin,  for the pairs (a, b) of each head's first rotary_dim elements
//
// Bound by memory: a thread reads its part of a position's tables once, and turns the same pairs of several heads.
#pragma once

#include "../../cuda/pack.cuh"
#include "kernels.h"

namespace nearpeak::rotary::cuda {

using namespace nearpeak::cuda;

constexpr int kThreads = 128;

// Where the heads of one position begin.
template <class T>
struct Position {
    const T* from;
    T* to;
    int64_t from_head, to_head;

    __device__ Position(const Heads& heads, int64_t batch, int64_t position)
        : from(static_cast<const T*>(heads.from) + batch * heads.from_batch + position * heads.from_position),
          to(static_cast<T*>(heads.to) + batch * heads.to_batch + position * heads.to_position),
          from_head(heads.from_head),
          to_head(heads.to_head) {}
};

// The V pairs (x[i], x[i + half]) of pack `index`.
template <class T, int V>
__device__ void turn_halves(const T* from, T* to, int64_t half, int64_t index, const float (&cos)[V],
                            const float (&sin)[V]) {
    const auto a = load<V>(from, index), b = load<V>(from + half, index);
    float first[V], second[V];
    for (int v = 0; v < V; ++v) {
        first[v] = a.at(v) * cos[v] - b.at(v) * sin[v];
        second[v] = b.at(v) * cos[v] + a.at(v) * sin[v];
    }
    store(to, index, Pack<T, V>::rounded(first));
    store(to + half, index, Pack<T, V>::rounded(second));
}

// The V pairs (x[2i], x[2i + 1]) in the packs 2 index and 2 index + 1.
template <class T, int V>
__device__ void turn_interleaved(const T* from, T* to, int64_t index, const float (&cos)[V], const float (&sin)[V]) {
    Pack<T, V> packs[2];
    for (int pack = 0; pack < 2; ++pack) packs[pack] = load<V>(from, 2 * index + pack);
    float turned[2][V];
    for (int v = 0; v < V; ++v) {
        const int at = 2 * v;
        const float a = packs[at / V].at(at % V), b = packs[(at + 1) / V].at((at + 1) % V);
        turned[at / V][at % V] = a * cos[v] - b * sin[v];
        turned[(at + 1) / V][(at + 1) % V] = b * cos[v] + a * sin[v];
    }
    for (int pack = 0; pack < 2; ++pack) store(to, 2 * index + pack, Pack<T, V>::rounded(turned[pack]));
}

// Calls visit(from, to) with each head that blockIdx.y stands for, at one position.
template <class T, class Visit>
__device__ void for_each_head(const Rotation& p, int64_t batch, int64_t position, const Visit& visit) {
    const int64_t begin = blockIdx.y * p.heads_together, heads = p.query.heads + p.key.heads;
    const int64_t end = begin + p.heads_together < heads ? begin + p.heads_together : heads;
    const Position<T> query(p.query, batch, position), key(p.key, batch, position);
    for (int64_t head = begin; head < end; ++head) {
        const Position<T>& x = head < p.query.heads ? query : key;
        const int64_t number = head < p.query.heads ? head : head - p.query.heads;
        visit(x.from + number * x.from_head, x.to + number * x.to_head);
    }
}

// blockDim.y positions a block, of all batches in turn; C is the type of the tables.
template <class T, class C, int V, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads) rotate_rows(const Rotation p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= p.batch * p.sequence) return;
    const int64_t batch = row / p.sequence, position = row % p.sequence;
    const C* cos_row = static_cast<const C*>(p.cos) + batch * p.cos_batch + position * p.cos_position;
    const C* sin_row = static_cast<const C*>(p.sin) + batch * p.sin_batch + position * p.sin_position;
    const float sign = p.inverse ? -1.0f : 1.0f;
    for (int64_t index = threadIdx.x; index < p.rotary_dim / 2 / V; index += blockDim.x) {
        const auto cos_pack = load<V>(cos_row, index), sin_pack = load<V>(sin_row, index);
        float cos[V], sin[V];
        for (int v = 0; v < V; ++v) {
            cos[v] = cos_pack.at(v);
            sin[v] = sign * sin_pack.at(v);
        }
        for_each_head<T>(p, batch, position, [&](const T* from, T* to) {
            if constexpr (INTERLEAVED) {
                turn_interleaved(from, to, index, cos, sin);
            } else {
                turn_halves(from, to, p.rotary_dim / 2, index, cos, sin);
            }
        });
    }
    for (int64_t index = threadIdx.x; index < p.rest / V; index += blockDim.x) {
        for_each_head<T>(p, batch, position, [&](const T* from, T* to) {
            store(to + p.rotary_dim, index, load<V>(from + p.rotary_dim, index));
        });
    }
}

}  // namespace nearpeak::rotary::cuda
