// Sums over the threads that share a row.
#pragma once

#include "device.h"

namespace nearpeak::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Over groups of `lanes` (a power of two up to 32) neighbouring lanes. All get the same bits: in each step both
// partners add the same two numbers.
template <int N>
__device__ void sum_over_lanes(float (&values)[N], unsigned lanes) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        if (static_cast<unsigned>(step) >= lanes) continue;
#pragma unroll
        for (int n = 0; n < N; ++n) values[n] += __shfl_xor_sync(kAllLanes, values[n], step);
    }
}

// Over the blockDim.x threads of a row: a power of two up to 32, or a multiple of 32 with one row in the block. Every
// thread of the block must come here, also those without a row.
template <int N>
__device__ void sum_over_row(float (&values)[N]) {
    sum_over_lanes(values, blockDim.x);
    if (blockDim.x <= kLanes) return;
    __shared__ float warps[N][kLanes];
    const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    __syncthreads();  // the sums before these have been read
#pragma unroll
    for (int n = 0; n < N; ++n) {
        if (lane == 0) warps[n][warp] = values[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = lane < blockDim.x / kLanes ? warps[n][lane] : 0.0f;
    sum_over_lanes(values, kLanes);
}

// Threads that share a row of `packs` packs where each takes up to `per_thread`: as sum_over_row wants them.
inline unsigned threads_of_row(int64_t packs, int per_thread) {
    const unsigned wanted = static_cast<unsigned>((packs + per_thread - 1) / per_thread);
    if (wanted > kLanes) return (wanted + kLanes - 1) / kLanes * kLanes;
    unsigned threads = 1;
    while (threads < wanted) threads *= 2;
    return threads;
}

// A block of rows of so many threads each: several rows where one takes a warp or less.
inline dim3 block_of_rows(unsigned threads) { return dim3(threads, threads <= kLanes ? kNarrowThreads / threads : 1); }

}  // namespace nearpeak::cuda
