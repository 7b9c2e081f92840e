// The processor's own limits, measured: what a share of the peak is a share of.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"
#include "../../cpu/isa.h"

namespace nearpeak::peaks {

struct Kernels {
    // Operations (2 per multiply-add) done in `rounds` rounds in registers alone, with the fastest unit for `dtype`.
    double (*multiply_add)(Dtype dtype, int64_t rounds);
    // Likewise of bytes, into 32-bit integers.
    double (*multiply_add_bytes)(int64_t rounds);
    // Reads `count` floats; returns their sum.
    float (*read)(const float* from, int64_t count);
    // Copies `count` floats past the caches.
    void (*copy)(const float* from, float* to, int64_t count);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::peaks
