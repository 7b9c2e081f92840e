// hidden   = x + residual                 square = mean(hidden^2) + eps,   r = 1 / sqrt(square)
// y        = hidden r (offset + weight)   g = grad (offset + weight)
// d_hidden = r (g - hidden mean(g hidden) / square) + grad_hidden
// d_weight = sum over rows of grad hidden r
//
// All are bound by memory: a row that fits in a block's registers, as packs of the storage type, is read once.
#pragma once

#include <cmath>

#include "../../cuda/pack.cuh"
#include "../../cuda/reduce.cuh"
#include "kernels.h"

namespace nearpeak::norm::cuda {

using namespace nearpeak::cuda;

// Row number `row` of an input; null for an input that was not given.
template <class T>
__device__ const T* row_of(const void* data, const Rows& rows, int64_t row) {
    return data ? static_cast<const T*>(data) + rows(row) : nullptr;
}

// offset + weight of a pack of columns; 1 without a weight.
template <class W, int V>
__device__ void load_weight(const void* weight, int64_t index, float offset, float (&to)[V]) {
    if (weight) {
        const auto pack = load<V>(static_cast<const W*>(weight), index);
        for (int v = 0; v < V; ++v) to[v] = offset + pack.at(v);
    } else {
        for (int v = 0; v < V; ++v) to[v] = 1.0f;
    }
}

// hidden becomes hidden + residual as it is stored: normalised is what the caller gets back, rounding included.
template <class T, int V>
__device__ void add_rounded(Pack<T, V>& hidden, const Pack<T, V>& residual) {
    float sum[V];
    for (int v = 0; v < V; ++v) sum[v] = hidden.at(v) + residual.at(v);
    hidden = Pack<T, V>::rounded(sum);
}

template <class T, int V>
__device__ float squares_of(const Pack<T, V>& hidden) {
    float sum = 0.0f;
    for (int v = 0; v < V; ++v) sum += hidden.at(v) * hidden.at(v);
    return sum;
}

template <class T, class W, int V>
__device__ void store_normalised(const Forward& p, int64_t row, int64_t index, const Pack<T, V>& hidden, float r) {
    float weight[V], y[V];
    load_weight<W>(p.weight, index, p.offset, weight);
    for (int v = 0; v < V; ++v) y[v] = hidden.at(v) * r;
    if (p.cast_first) {
        const auto rounded = Pack<T, V>::rounded(y);
        for (int v = 0; v < V; ++v) y[v] = rounded.at(v);
    }
    for (int v = 0; v < V; ++v) y[v] *= weight[v];
    store(static_cast<T*>(p.y) + row * p.width, index, Pack<T, V>::rounded(y));
}

// blockDim.y rows a block, each in the registers of blockDim.x threads, PACKS packs of V elements in each.
template <class T, class W, int V, int PACKS>
__global__ void __launch_bounds__(kMostThreads) forward_rows(const Forward p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int packs = row < p.rows ? static_cast<int>(p.width / V) : 0;
    const T* x = row_of<T>(p.x, p.x_rows, row);
    const T* residual = row_of<T>(p.residual, p.residual_rows, row);
    // All loads before anything that waits for one. Columns past the end are zeros.
    Pack<T, V> hidden[PACKS] = {};
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < packs) hidden[i] = load<V>(x, index);
    }
    if (residual) {
        Pack<T, V> other[PACKS] = {};
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int index = threadIdx.x + i * blockDim.x;
            if (index < packs) other[i] = load<V>(residual, index);
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int index = threadIdx.x + i * blockDim.x;
            add_rounded(hidden[i], other[i]);
            if (index < packs) store(static_cast<T*>(p.hidden) + row * p.width, index, hidden[i]);
        }
    }
    float squares[1] = {};
#pragma unroll
    for (int i = 0; i < PACKS; ++i) squares[0] += squares_of(hidden[i]);
    sum_over_row(squares);
    const float r = 1.0f / sqrtf(squares[0] / static_cast<float>(p.width) + p.eps);
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < packs) store_normalised<T, W>(p, row, index, hidden[i], r);
    }
}

// One row a block, in two passes: the second finds much of the row in the L2 cache. Nothing is written before it,
// since y may be x, or hidden residual.
template <class T, class W, int V>
__global__ void __launch_bounds__(kMostThreads) forward_wide(const Forward p) {
    const int64_t row = blockIdx.x, packs = p.width / V;
    const T* x = row_of<T>(p.x, p.x_rows, row);
    const T* residual = row_of<T>(p.residual, p.residual_rows, row);
    const auto hidden_at = [&](int64_t index) {
        auto hidden = load<V>(x, index);
        if (residual) add_rounded(hidden, load<V>(residual, index));
        return hidden;
    };
    float squares[1] = {};
#pragma unroll 4
    for (int64_t index = threadIdx.x; index < packs; index += blockDim.x) squares[0] += squares_of(hidden_at(index));
    sum_over_row(squares);
    const float r = 1.0f / sqrtf(squares[0] / static_cast<float>(p.width) + p.eps);
    for (int64_t index = threadIdx.x; index < packs; index += blockDim.x) {
        const auto hidden = hidden_at(index);
        if (residual) store(static_cast<T*>(p.hidden) + row * p.width, index, hidden);
        store_normalised<T, W>(p, row, index, hidden, r);
    }
}

// Adds what one pack of columns gives to the two sums of a row, of hidden^2 and of g hidden.
template <class W, class T, int V>
__device__ void add_products(const Backward& p, int64_t index, const Pack<T, V>& hidden, const Pack<T, V>& grad,
                             float (&sums)[2]) {
    float weight[V];
    load_weight<W>(p.weight, index, p.offset, weight);
    for (int v = 0; v < V; ++v) {
        const float h = hidden.at(v);
        sums[0] += h * h;
        sums[1] += h * (grad.at(v) * weight[v]);
    }
}

// What one row's sums give.
struct RowFactors {
    float r, share;

    __device__ RowFactors(const Backward& p, const float (&sums)[2]) {
        const float width = static_cast<float>(p.width), square = sums[0] / width + p.eps;
        r = 1.0f / sqrtf(square);
        share = sums[1] / width / square;
    }
    __device__ RowFactors(const Backward& p, int64_t row) : r(p.row_sums[row]), share(p.row_sums[p.rows + row]) {}
};

// Stores d_hidden of one pack of columns, and adds its part of d_weight.
template <class W, class T, int V>
__device__ void differentiate(const Backward& p, int64_t row, int64_t index, const Pack<T, V>& hidden,
                              const Pack<T, V>& grad, const RowFactors& factors, float (&d_weight)[V]) {
    float weight[V], d[V];
    load_weight<W>(p.weight, index, p.offset, weight);
    for (int v = 0; v < V; ++v) {
        const float h = hidden.at(v), g = grad.at(v);
        d[v] = factors.r * (g * weight[v] - h * factors.share);
        d_weight[v] += g * (h * factors.r);
    }
    if (p.grad_hidden) {
        const auto extra = load<V>(row_of<T>(p.grad_hidden, p.grad_hidden_rows, row), index);
        for (int v = 0; v < V; ++v) d[v] += extra.at(v);
    }
    store(static_cast<T*>(p.d_hidden) + row * p.width, index, Pack<T, V>::rounded(d));
}

// Stores the block's share of d_weight: the sum over its rows' threads, always in the same order.
template <int PACKS, int V>
__device__ void store_partial(const Backward& p, const float (&d_weight)[PACKS][V]) {
    float* partial = p.partials + blockIdx.x * p.width;
    if (blockDim.y == 1) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const unsigned index = threadIdx.x + i * blockDim.x;
            if (index < p.width / V) store(partial, index, Pack<float, V>::rounded(d_weight[i]));
        }
        return;
    }
    __shared__ float all[kNarrowThreads * PACKS * V];
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x, of_row = blockDim.x * PACKS * V;
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
        for (int v = 0; v < V; ++v) all[threadIdx.y * of_row + (threadIdx.x + i * blockDim.x) * V + v] = d_weight[i][v];
    }
    __syncthreads();
    for (unsigned column = thread; column < p.width; column += kNarrowThreads) {
        float sum = 0.0f;
        for (unsigned y = 0; y < blockDim.y; ++y) sum += all[y * of_row + column];
        partial[column] = sum;
    }
}

// Each block walks over the rows and keeps its share of d_weight in registers: no atomics, and one fixed order.
template <class T, class W, int V, int PACKS>
__global__ void __launch_bounds__(kMostThreads) backward_rows(const Backward p) {
    float d_weight[PACKS][V] = {};
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    // All threads of a block take part as long as one of them has a row, since they meet at barriers.
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row - threadIdx.y < p.rows;
         row += step) {
        const int packs = row < p.rows ? static_cast<int>(p.width / V) : 0;
        const T* hidden_row = row_of<T>(p.hidden, p.hidden_rows, row);
        const T* grad_row = row_of<T>(p.grad, p.grad_rows, row);
        Pack<T, V> hidden[PACKS] = {}, grad[PACKS] = {};
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int index = threadIdx.x + i * blockDim.x;
            if (index < packs) hidden[i] = load<V>(hidden_row, index);
            if (index < packs) grad[i] = load<V>(grad_row, index);
        }
        float sums[2] = {};
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int index = threadIdx.x + i * blockDim.x;
            if (index < packs) add_products<W>(p, index, hidden[i], grad[i], sums);
        }
        sum_over_row(sums);
        const RowFactors factors(p, sums);
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int index = threadIdx.x + i * blockDim.x;
            if (index < packs) differentiate<W>(p, row, index, hidden[i], grad[i], factors, d_weight[i]);
        }
    }
    if (p.partials) store_partial(p, d_weight);
}

// r and mean(g hidden) / square of one row a block, for rows too wide to keep.
template <class T, class W, int V>
__global__ void __launch_bounds__(kMostThreads) backward_row_sums(const Backward p) {
    const int64_t row = blockIdx.x, packs = p.width / V;
    const T* hidden = row_of<T>(p.hidden, p.hidden_rows, row);
    const T* grad = row_of<T>(p.grad, p.grad_rows, row);
    float sums[2] = {};
#pragma unroll 2
    for (int64_t index = threadIdx.x; index < packs; index += blockDim.x) {
        add_products<W>(p, index, load<V>(hidden, index), load<V>(grad, index), sums);
    }
    sum_over_row(sums);
    const RowFactors factors(p, sums);
    if (threadIdx.x == 0) {
        p.row_sums[row] = factors.r;
        p.row_sums[p.rows + row] = factors.share;
    }
}

constexpr int kColumnThreads = 256;

// One pack of columns a thread, over every gridDim.y-th row, with the row sums at hand.
template <class T, class W, int V>
__global__ void __launch_bounds__(kColumnThreads, kResidentThreads / kColumnThreads)
    backward_columns(const Backward p) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= p.width / V) return;
    float d_weight[V] = {};
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const auto hidden = load<V>(row_of<T>(p.hidden, p.hidden_rows, row), index);
        const auto grad = load<V>(row_of<T>(p.grad, p.grad_rows, row), index);
        differentiate<W>(p, row, index, hidden, grad, RowFactors(p, row), d_weight);
    }
    if (p.partials) {
        store(p.partials + blockIdx.y * p.width, index, Pack<float, V>::rounded(d_weight));
    }
}

// 32 columns a block; each of its 32 lines of threads adds every 32nd partial, then the first line adds the lines.
constexpr int kSumLines = 32;

template <class W>
__global__ void __launch_bounds__(kMostThreads) sum_columns(const PartialSum p) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x;
    __shared__ float lines[kSumLines][kLanes];
    float sum = 0.0f;
    if (column < p.width) {
#pragma unroll 4
        for (int64_t part = threadIdx.y; part < p.count; part += kSumLines) sum += p.partials[part * p.width + column];
    }
    lines[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= p.width) return;
    float total[1] = {};
    for (int line = 0; line < kSumLines; ++line) total[0] += lines[line][threadIdx.x];
    store(static_cast<W*>(p.total), column, Pack<W, 1>::rounded(total));
}

}  // namespace nearpeak::norm::cuda
