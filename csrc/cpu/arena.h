// Hands out parts of a thread's scratch memory.
#pragma once

#include <cstdint>

namespace nearpeak::NEARPEAK_ISA {

class Arena {
  public:
    // With a null start only the size is counted.
    explicit Arena(float* start) : begin(start) {}

    // Room for `count` elements, beginning on a cache line.
    template <class T = float>
    T* take(int64_t count) {
        constexpr int64_t kLine = 64;
        const int64_t offset = bytes;
        bytes += (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
        return begin ? reinterpret_cast<T*>(reinterpret_cast<char*>(begin) + offset) : nullptr;
    }

    int64_t floats() const { return bytes / static_cast<int64_t>(sizeof(float)); }

  private:
    float* begin;
    int64_t bytes = 0;
};

}  // namespace nearpeak::NEARPEAK_ISA
