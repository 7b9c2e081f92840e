// CUDA's language on the host: the kernels' own source, compiled by any C++ compiler and run without a GPU, so that
// their arithmetic, their bounds and their barriers are tested everywhere.
//
// The blocks of a launch run one after another. Each thread of a block is a fiber that runs until it waits for others;
// whoever waits hands on to the next. Fibers take turns in the opposite order every other round, so that a missing
// barrier shows as a wrong result.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
// One block runs at a time, so what its threads share may be one object of the whole program.
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace nearpeak::cuda {
namespace emulation {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

struct Barrier {
    unsigned arrived = 0;
    unsigned long generation = 0;
};

struct Warp {
    Barrier barrier;
    float values[2][kWarp];  // what each lane hands to the others, in turns: the last ones may not have been read yet
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    dim3 index;
    bool finished;
};

// The block that runs. `events` counts arrivals at barriers and ends of threads: a round without any is a deadlock.
struct Block {
    std::vector<Thread> threads;  // kept from block to block for their stacks
    std::vector<Warp> warps;
    Barrier barrier;
    unsigned size;
    Thread* running;
    ucontext_t scheduler;
    std::function<void()> kernel;
    unsigned long events;
};

inline Block block;

inline void wait(Barrier& barrier, unsigned expected) {
    ++block.events;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    const unsigned long generation = barrier.generation;
    while (barrier.generation == generation) swapcontext(&block.running->context, &block.scheduler);
}

inline void run_thread() {
    block.kernel();
    block.running->finished = true;
    ++block.events;
}

inline void start_thread(Thread& thread, unsigned position) {
    thread.index = dim3(position % blockDim.x, position / blockDim.x % blockDim.y, position / blockDim.x / blockDim.y);
    thread.finished = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &block.scheduler;
    makecontext(&thread.context, run_thread, 0);
}

// Lets every thread run until it waits; returns how many have yet to finish.
inline unsigned run_round(bool backwards) {
    unsigned left = 0;
    for (unsigned turn = 0; turn < block.size; ++turn) {
        Thread& thread = block.threads[backwards ? block.size - 1 - turn : turn];
        if (thread.finished) continue;
        block.running = &thread;
        threadIdx = thread.index;
        swapcontext(&block.scheduler, &thread.context);
        left += !thread.finished;
    }
    return left;
}

inline void run_block() {
    block.size = blockDim.x * blockDim.y * blockDim.z;
    if (block.threads.size() < block.size) block.threads.resize(block.size);
    block.warps.assign((block.size + kWarp - 1) / kWarp, Warp{});
    block.barrier = {};
    for (unsigned position = 0; position < block.size; ++position) start_thread(block.threads[position], position);
    unsigned left = block.size;
    for (bool backwards = false; left > 0; backwards = !backwards) {
        const unsigned long before = block.events;
        left = run_round(backwards);
        if (block.events == before) throw std::logic_error("threads wait at a barrier that others never reach");
    }
}

}  // namespace emulation

// Few processors, so that small inputs take the paths of large ones.
inline int processors() { return 4; }

template <class Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, dim3 threads, void*, const Parameters& parameters) {
    emulation::block.kernel = [&] { kernel(parameters); };
    gridDim = grid;
    blockDim = threads;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                emulation::run_block();
            }
        }
    }
}

}  // namespace nearpeak::cuda

inline void __syncthreads() {
    using namespace nearpeak::cuda::emulation;
    wait(block.barrier, block.size);
}

// For whole warps, as kernels call it: every lane of `mask` takes part.
inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
    using namespace nearpeak::cuda::emulation;
    const unsigned position = static_cast<unsigned>(block.running - block.threads.data());
    Warp& warp = block.warps[position / kWarp];
    float* values = warp.values[warp.barrier.generation % 2];
    values[position % kWarp] = value;
    wait(warp.barrier, kWarp);
    return values[position % kWarp ^ static_cast<unsigned>(lane_mask)];
}
