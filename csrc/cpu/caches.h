// Sizes of this machine's caches.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace nearpeak {

// In bytes, per core; a small one where the system does not say.
inline int64_t second_level_cache() {
    static const int64_t bytes = [] {
        constexpr int64_t kSmall = 512 * 1024;
#ifdef _SC_LEVEL2_CACHE_SIZE
        const int64_t said = sysconf(_SC_LEVEL2_CACHE_SIZE);
        return said > 0 ? said : kSmall;
#else
        return kSmall;
#endif
    }();
    return bytes;
}

}  // namespace nearpeak
