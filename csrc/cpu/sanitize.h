// What AddressSanitizer does not see by itself: accesses by instructions that it does not know, and the edges between
// the parts of scratch memory. Nothing of it is left in other builds.
//
// Functions are static: were they shared, the linker could give one instruction set's code to another.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace nearpeak {

#if defined(__SANITIZE_ADDRESS__)

constexpr bool kAddressSanitizer = true;

[[maybe_unused]] static void check_access(const void* at, int64_t bytes, bool is_write) {
    void* const forbidden = __asan_region_is_poisoned(const_cast<void*>(at), bytes);
    if (!forbidden) return;
    void* const frame = __builtin_frame_address(0);
    __asan_report_error(__builtin_return_address(0), frame, frame, forbidden, is_write, bytes);
}
[[maybe_unused]] static void forbid(const void* at, int64_t bytes) { __asan_poison_memory_region(at, bytes); }
[[maybe_unused]] static void allow(const void* at, int64_t bytes) { __asan_unpoison_memory_region(at, bytes); }

#else

constexpr bool kAddressSanitizer = false;

[[maybe_unused]] static void check_access(const void*, int64_t, bool) {}
[[maybe_unused]] static void forbid(const void*, int64_t) {}
[[maybe_unused]] static void allow(const void*, int64_t) {}

#endif

}  // namespace nearpeak
