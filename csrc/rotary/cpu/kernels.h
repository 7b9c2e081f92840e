// Rotary position embedding: the kernel that each instruction set provides.
#pragma once

#include <cstdint>

#include "../../cpu/isa.h"
#include "../call.h"

namespace nearpeak::rotary {

struct Kernels {
    // Floats of scratch memory that so many positions need.
    int64_t (*scratch)(const Call&, int64_t positions);
    // Positions [begin, end) of one batch entry, in every head.
    void (*rotate)(const Call&, int64_t batch, int64_t begin, int64_t end, float* scratch);
};

NEARPEAK_ISAS(NEARPEAK_DECLARE_KERNELS)

}  // namespace nearpeak::rotary
