// Hands out parts of a thread's scratch memory.
#pragma once

#include <cstdint>

#include "sanitize.h"

namespace nearpeak::NEARPEAK_ISA {

class Arena {
  public:
    // With a null start only the size is counted.
    explicit Arena(float* start) : begin(reinterpret_cast<char*>(start)) {}
    ~Arena() {
        if (begin) allow(begin, bytes);
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Room for `count` elements, beginning on a cache line.
    template <class T = float>
    T* take(int64_t count) {
        const int64_t size = count * static_cast<int64_t>(sizeof(T));
        // Under AddressSanitizer, what lies between two parts may not be touched.
        const int64_t room = (size + kLine - 1) / kLine * kLine + (kAddressSanitizer ? kLine : 0);
        char* const part = begin ? begin + bytes : nullptr;
        bytes += room;
        if (part) forbid(part + size, room - size);
        return reinterpret_cast<T*>(part);
    }

    int64_t floats() const { return bytes / static_cast<int64_t>(sizeof(float)); }

  private:
    static constexpr int64_t kLine = 64;

    char* const begin;
    int64_t bytes = 0;
};

}  // namespace nearpeak::NEARPEAK_ISA
