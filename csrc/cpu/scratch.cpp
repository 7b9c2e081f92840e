#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "sanitize.h"

namespace nearpeak {

float* thread_scratch(int64_t floats) {
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    static thread_local std::unique_ptr<float, Free> memory;
    static thread_local int64_t capacity = 0;
    // AddressSanitizer is to see where each call's memory ends: there, every call gets its own.
    if (floats > capacity || kAddressSanitizer) {
        memory.reset();
        capacity = 0;
        constexpr std::size_t kPage = 4096;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, kPage, floats * sizeof(float)) != 0) throw std::bad_alloc();
        memory.reset(static_cast<float*>(fresh));
        capacity = floats;
    }
    return memory.get();
}

}  // namespace nearpeak
