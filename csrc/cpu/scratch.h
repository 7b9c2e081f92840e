// Scratch memory of a thread, kept between calls: fresh pages cost a page fault each, 0.25 us per KiB.
#pragma once

#include <cstdint>

namespace nearpeak {

// At least `floats` floats, aligned to a cache line, of unspecified content; valid until this thread's next call.
float* thread_scratch(int64_t floats);

}  // namespace nearpeak
