// Storage types, and packs of neighbouring elements that are loaded and stored with one access of up to 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cpu/dtype.h"
#include "device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace nearpeak::cuda {

constexpr int kAccessBytes = 16;

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Elements of an access of full width.
template <class T>
constexpr int kWidest = kAccessBytes / static_cast<int>(sizeof(T));

#ifdef __CUDACC__
__device__ inline float from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }

__device__ inline float widened(float16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline uint16_t rounded_bits(bfloat16, float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ inline uint16_t rounded_bits(float16, float value) { return __half_as_ushort(__float2half_rn(value)); }

__device__ inline uint32_t rounded_pair(bfloat16, float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);  // one instruction
    return __bfloat16_as_ushort(pair.x) | uint32_t{__bfloat16_as_ushort(pair.y)} << 16;
}
__device__ inline uint32_t rounded_pair(float16, float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return __half_as_ushort(pair.x) | uint32_t{__half_as_ushort(pair.y)} << 16;
}
#else
template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float from_bits(uint32_t bits) { return bit_cast<float>(bits); }
inline uint32_t bits_of(float value) { return bit_cast<uint32_t>(value); }

inline float widened(float16 value) { return static_cast<float>(bit_cast<_Float16>(value.bits)); }
inline uint16_t rounded_bits(bfloat16, float value) {
    const uint32_t bits = bits_of(value);
    return value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t rounded_bits(float16, float value) { return bit_cast<uint16_t>(static_cast<_Float16>(value)); }

template <class T>
uint32_t rounded_pair(T type, float low, float high) {
    return rounded_bits(type, low) | uint32_t{rounded_bits(type, high)} << 16;
}
#endif

__device__ inline float widened(bfloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

// N neighbouring elements in as many registers as they fill; two 16-bit ones share one, the first in its low half.
template <class T, int N>
struct alignas(sizeof(T) * N < kAccessBytes ? sizeof(T) * N : kAccessBytes) Pack {
    using Word = std::conditional_t<sizeof(T) * N == 2, uint16_t, uint32_t>;
    static constexpr int kPerWord = static_cast<int>(sizeof(Word) / sizeof(T));

    Word words[N / kPerWord];

    // Element number v.
    __device__ float at(int v) const {
        if constexpr (sizeof(T) == 4) {
            return from_bits(words[v]);
        } else {
            return widened(T{static_cast<uint16_t>(words[v / kPerWord] >> 16 * (v % kPerWord))});
        }
    }

    // The pack of these numbers, rounded to nearest, ties to even.
    __device__ static Pack rounded(const float (&values)[N]) {
        Pack pack;
        for (int word = 0; word < N / kPerWord; ++word) {
            if constexpr (sizeof(T) == 4) {
                pack.words[word] = bits_of(values[word]);
            } else if constexpr (kPerWord == 1) {
                pack.words[word] = rounded_bits(T{}, values[word]);
            } else {
                pack.words[word] = rounded_pair(T{}, values[2 * word], values[2 * word + 1]);
            }
        }
        return pack;
    }
};

// Pack number `index` of the elements that begin at `from`.
template <int N, class T>
__device__ Pack<T, N> load(const T* from, int64_t index) {
    return reinterpret_cast<const Pack<T, N>*>(from)[index];
}

template <int N, class T>
__device__ void store(T* to, int64_t index, const Pack<T, N>& pack) {
    reinterpret_cast<Pack<T, N>*>(to)[index] = pack;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % kAccessBytes == 0; }

// Calls `function` with a null pointer of the storage type.
template <class Function>
void with_type(Dtype dtype, const Function& function) {
    switch (dtype) {
        case Dtype::float32:
            return function(static_cast<float*>(nullptr));
        case Dtype::bfloat16:
            return function(static_cast<bfloat16*>(nullptr));
        case Dtype::float16:
            return function(static_cast<float16*>(nullptr));
    }
}

}  // namespace nearpeak::cuda
