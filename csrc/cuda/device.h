// The language that kernels are written in, CUDA's or its emulation on the host, and how a kernel is launched.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>

namespace nearpeak::cuda {

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Multiprocessors of the current device.
inline int processors() {
    int device, count;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

template <class Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, dim3 threads, void* stream, const Parameters& parameters) {
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(parameters);
    check(cudaGetLastError());
}

}  // namespace nearpeak::cuda
#else
#include "emulation.h"
#endif

namespace nearpeak::cuda {

constexpr int kMostThreads = 1024;   // of a block
constexpr int kNarrowThreads = 128;  // of a block whose rows take a warp or less each
// Threads per multiprocessor for kernels whose blocks walk over the rows: what 64 registers a thread leave room for.
constexpr int kResidentThreads = 1024;

}  // namespace nearpeak::cuda
