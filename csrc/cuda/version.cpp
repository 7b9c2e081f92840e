// By this symbol Python knows that the extension holds CUDA kernels, and which CUDA they were built with.

#include <cuda_runtime_api.h>

extern "C" __attribute__((visibility("default"))) int nearpeak_cuda_version() { return CUDART_VERSION; }
