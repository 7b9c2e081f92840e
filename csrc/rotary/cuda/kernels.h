// Rotary position embedding on CUDA devices: what its kernel needs, and its launcher.
#pragma once

#include "../call.h"

namespace nearpeak::rotary::cuda {

struct Rotation : Call {
    int64_t heads_together;  // how many heads, key's counted after query's, a thread turns: the launcher's choice
};

// On the current device. `stream` is a cudaStream_t. Not for calls without elements.
void rotate(const Call& call, void* stream);

}  // namespace nearpeak::rotary::cuda
