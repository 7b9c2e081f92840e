#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace nearpeak {

float* thread_scratch(int64_t floats) {
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    static thread_local std::unique_ptr<float, Free> memory;
    static thread_local int64_t capacity = 0;
    if (floats > capacity) {
        constexpr int64_t kPage = 4096;
        const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + kPage - 1) / kPage * kPage;
        memory.reset();
        capacity = 0;
        memory.reset(static_cast<float*>(std::aligned_alloc(kPage, bytes)));
        if (!memory) throw std::bad_alloc();
        capacity = bytes / static_cast<int64_t>(sizeof(float));
    }
    return memory.get();
}

}  // namespace nearpeak
