// Stores past the caches, for outputs too large to stay in them: saves reading each line before it is written.
//
// Addresses must be aligned to the bytes stored. A fence must follow before another thread reads.
#pragma once

#include "sanitize.h"
#include "two.h"

namespace nearpeak::NEARPEAK_ISA {

inline void store_past_cache(void* to, Float value) {
    check_access(to, sizeof(value), true);
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    _mm512_stream_ps(static_cast<float*>(to), reinterpret_cast<__m512>(value));
#elif NEARPEAK_LANES == 8 && defined(__AVX2__)
    _mm256_stream_ps(static_cast<float*>(to), reinterpret_cast<__m256>(value));
#else
    std::memcpy(to, &value, sizeof(value));
#endif
}
inline void store_past_cache(void* to, Short bits) {
    check_access(to, sizeof(bits), true);
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(bits));
#elif NEARPEAK_LANES == 8 && defined(__AVX2__)
    _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(bits));
#else
    std::memcpy(to, &bits, sizeof(bits));
#endif
}
inline void store_past_cache(float* to, Float value) { store_past_cache(static_cast<void*>(to), value); }
inline void store_past_cache(bfloat16* to, Float value) {
    store_past_cache(static_cast<void*>(to), narrow_bfloat16(value));
}
inline void store_past_cache(float16* to, Float value) {
    float16 bits[kLanes];
    store(bits, value);
    store_past_cache(static_cast<void*>(to), load_bits(bits));
}

template <class T>
inline void store_past_cache(T* to, Float value, AllLanes) {
    store_past_cache(to, value);
}
template <class T>
inline void store_past_cache(T* to, Float value, int64_t count) {
    store(to, value, count);
}
template <class U, class T>
inline void store_past_cache(U* to, Two value, TwoVectors<T>) {
    store_past_cache(to, value.low);
    store_past_cache(to + kLanes, value.high);
}
inline void store_past_cache(bfloat16* to, Two value, TwoVectors<bfloat16>) {
    store_past_cache(static_cast<void*>(to), paired_bits(value));
}

// Copies what a load of these lanes would read, past the caches and bit by bit.
template <class T>
inline void copy_past_cache(T* to, const T* from, AllLanes) {
    if constexpr (sizeof(T) == sizeof(float)) {
        store_past_cache(to, load(from));
    } else {
        store_past_cache(static_cast<void*>(to), load_bits(from));
    }
}
template <class T>
inline void copy_past_cache(T* to, const T* from, int64_t count) {
    std::memcpy(to, from, count * sizeof(T));
}
template <class T>
inline void copy_past_cache(T* to, const T* from, TwoVectors<T>) {
    copy_past_cache(to, from, AllLanes{});
    copy_past_cache(to + kLanes, from + kLanes, AllLanes{});
}

inline void fence_stores_past_cache() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace nearpeak::NEARPEAK_ISA
