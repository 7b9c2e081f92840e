// Vectors of kLanes floats, written once for every instruction set.
//
// The compiler's vector extensions carry the arithmetic (a + b, a * b + c, a < b), so that one source becomes SSE,
// AVX2, AVX-512 or NEON code; only what they lack is written with intrinsics here. Each kernel file is compiled once
// per instruction set, in a namespace of that name: NEARPEAK_ISA. Setting NEARPEAK_LANES compiles the code of a wide
// instruction set for a processor without it, which is how it is tested there.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef NEARPEAK_LANES
#if defined(__AVX512F__)
#define NEARPEAK_LANES 16
#elif defined(__AVX2__)
#define NEARPEAK_LANES 8
#else
#define NEARPEAK_LANES 4
#endif
#endif

namespace nearpeak::NEARPEAK_ISA {

constexpr int kLanes = NEARPEAK_LANES;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Float = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Unsigned = uint32_t __attribute__((vector_size(4 * kLanes)));
using Short = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

// Storage types. Both hold 16 bits; arithmetic happens in float.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Subtracting zero changes no value, not even -0, so that only the broadcast remains of it.
inline Float broadcast(float value) { return value - Float{}; }
inline Int broadcast(int32_t value) { return Int{} + value; }

inline Float to_float(Int value) { return __builtin_convertvector(value, Float); }

template <class To, class From>
inline To bitcast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline Float select(Int condition, Float yes, Float no) { return condition ? yes : no; }
// The second number where one is NaN. GCC takes two instructions for this with masks.
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
inline Float max(Float a, Float b) {
    return reinterpret_cast<Float>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
inline Float min(Float a, Float b) {
    return reinterpret_cast<Float>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#else
inline Float max(Float a, Float b) { return a > b ? a : b; }
inline Float min(Float a, Float b) { return a < b ? a : b; }
#endif

inline Float magnitude(Float value) { return bitcast<Float>(bitcast<Unsigned>(value) & 0x7fffffffu); }

// {0, 1, 2, ...}
inline Int lane_numbers() {
    Int result;
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = lane;
    return result;
}

// table[index % kLanes] in every lane.
inline Float look_up(Float table, Int index) {
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<Float>(
        _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512>(table)));
#else
    Float result;
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = table[index[lane] & (kLanes - 1)];
    return result;
#endif
}

// Between 16 and 32 bits. GCC makes five instructions of the generic conversions where there is one (two).
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
inline Unsigned widen(Short bits) {
    return reinterpret_cast<Unsigned>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
}
inline Short narrow(Unsigned bits) {
    return reinterpret_cast<Short>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
}
#elif NEARPEAK_LANES == 8 && defined(__AVX2__)
inline Unsigned widen(Short bits) {
    return reinterpret_cast<Unsigned>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
}
inline Short narrow(Unsigned bits) {
    const __m256i halves = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(bits));
    return reinterpret_cast<Short>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0b1000)));
}
#else
inline Unsigned widen(Short bits) { return __builtin_convertvector(bits, Unsigned); }
inline Short narrow(Unsigned bits) { return __builtin_convertvector(bits, Short); }
#endif

// Bytes as the numbers they are.
inline Int to_int(Bytes bytes) {
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<Int>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(bytes)));
#elif NEARPEAK_LANES == 8 && defined(__AVX2__)
    int64_t bits;
    std::memcpy(&bits, &bytes, sizeof(bits));
    return reinterpret_cast<Int>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits)));
#else
    return __builtin_convertvector(bytes, Int);
#endif
}

inline Bytes load(const uint8_t* from) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof(bytes));
    return bytes;
}

// Half precision in integer arithmetic, for processors without conversion instructions.
inline Float widen_float16(Short half) {
    const Unsigned bits = widen(half);
    const Unsigned magnitude = (bits & 0x7fffu) << 13;
    // 2^112 moves the exponent from half's bias to float's, and turns half's denormals into normal numbers.
    const Unsigned finite = bitcast<Unsigned>(bitcast<Float>(magnitude) * 0x1p112f);
    const Unsigned special = magnitude | 0x7f800000u;
    const Unsigned is_special = bitcast<Unsigned>(magnitude >= 0x0f800000u);
    return bitcast<Float>(((special & is_special) | (finite & ~is_special)) | ((bits & 0x8000u) << 16));
}

inline Short narrow_float16(Float value) {
    const Unsigned bits = bitcast<Unsigned>(value);
    const Unsigned sign = (bits >> 16) & 0x8000u;
    const Unsigned magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent and round to nearest, ties to even.
    const Unsigned normal = (magnitude + (0xc8000fffu + ((magnitude >> 13) & 1u))) >> 13;
    // Denormal results: adding 0.5 makes the float adder do the shift and the rounding.
    const Unsigned denormal = bitcast<Unsigned>(bitcast<Float>(magnitude) + 0.5f) - 0x3f000000u;
    const Unsigned special = 0x7c00u + (bitcast<Unsigned>(magnitude > 0x7f800000u) & 0x200u);
    const Unsigned is_denormal = bitcast<Unsigned>(magnitude < 0x38800000u);
    const Unsigned is_special = bitcast<Unsigned>(magnitude >= 0x47800000u);
    const Unsigned finite = (denormal & is_denormal) | (normal & ~is_denormal);
    return narrow(((special & is_special) | (finite & ~is_special)) | sign);
}

// Loads and stores of kLanes elements; no alignment is required.
inline Float load(const float* from) {
    Float value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}
inline void store(float* to, Float value) { std::memcpy(to, &value, sizeof(value)); }

// GCC would load the value again for each of its uses, and make loads the limit of the loop.
inline void keep_in_register(Float& value) {
#if (NEARPEAK_LANES == 16 && defined(__AVX512F__)) || (NEARPEAK_LANES == 8 && defined(__AVX2__))
    asm("" : "+v"(value));
#endif
}

// The value rounded to float32: an addition that follows must not become a fused multiply-add.
inline Float uncontracted(Float value) {
#if NEARPEAK_LANES == 16 && !defined(__AVX512F__)
    asm("" : "+m"(value));
#else
    keep_in_register(value);
#endif
    return value;
}

inline Short load_bits(const void* from) {
    Short bits;
    std::memcpy(&bits, from, sizeof(bits));
    return bits;
}

inline void store_bits(void* to, Short bits) { std::memcpy(to, &bits, sizeof(bits)); }

inline Float load(const bfloat16* from) { return bitcast<Float>(widen(load_bits(from)) << 16); }

// Rounded to nearest, ties to even, in the upper 16 bits of each lane; below them, rubbish. NaN stays NaN.
inline Unsigned round_bfloat16(Float value) {
    const Unsigned bits = bitcast<Unsigned>(value);
    return (bits + (0x7fffu + ((bits >> 16) & 1u))) | bitcast<Unsigned>(value != value);
}

#if NEARPEAK_LANES == 16 && defined(__AVX512BF16__)
using Halves = uint16_t __attribute__((vector_size(4 * kLanes)));

template <std::size_t... half>
constexpr Halves interleaved_halves(std::index_sequence<half...>) {
    return Halves{(half / 2 + half % 2 * kLanes)...};
}

// Whether the instructions below give what round_bfloat16 does: of denormal numbers they make zeros.
inline bool rounds_in_hardware(Float value) {
    constexpr int kDenormal = 0x20;
    return __builtin_expect(_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(value), kDenormal) == 0, true);
}

// Lane i holds first[i] in its low half and second[i] in its high half.
inline Float rounded_pairs(Float first, Float second) {
    const auto halves = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
    constexpr auto kOrder = interleaved_halves(std::make_index_sequence<2 * kLanes>());
    return reinterpret_cast<Float>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kOrder), halves));
}
#endif

inline Short narrow_bfloat16(Float value) {
#if NEARPEAK_LANES == 16 && defined(__AVX512BF16__)
    if (rounds_in_hardware(value)) return reinterpret_cast<Short>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
#endif
    return narrow(round_bfloat16(value) >> 16);
}

inline void store(bfloat16* to, Float value) { store_bits(to, narrow_bfloat16(value)); }

#if NEARPEAK_LANES == 8 && defined(__F16C__)
inline Float load(const float16* from) {
    return reinterpret_cast<Float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void store(float16* to, Float value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif NEARPEAK_LANES == 16 && defined(__AVX512F__)
inline Float load(const float16* from) {
    return reinterpret_cast<Float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline void store(float16* to, Float value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Float load(const float16* from) { return widen_float16(load_bits(from)); }
inline void store(float16* to, Float value) { store_bits(to, narrow_float16(value)); }
#endif

inline float to_float(float16 half) {
#if defined(__F16C__)
    return _cvtsh_ss(half.bits);
#else
    return widen_float16(Short{half.bits})[0];
#endif
}

// How many lanes of a vector are meant: all, known to the compiler, or the first `count`. Loading the first few gives
// zeros after them; no memory beyond them is touched.
struct AllLanes {};

template <class T>
inline Float load(const T* from, AllLanes) {
    return load(from);
}
template <class T>
inline Float load(const T* from, int64_t count) {
    T buffer[kLanes] = {};
    std::memcpy(buffer, from, count * sizeof(T));
    return load(buffer);
}
template <class T>
inline void store(T* to, Float value, AllLanes) {
    store(to, value);
}
template <class T>
inline void store(T* to, Float value, int64_t count) {
    T buffer[kLanes];
    store(buffer, value);
    std::memcpy(to, buffer, count * sizeof(T));
}

// The value with zeros in the lanes that are not meant.
inline Float only(Float value, AllLanes) { return value; }
inline Float only(Float value, int64_t count) {
    return select(lane_numbers() < static_cast<int32_t>(count), value, Float{});
}

// Walks a row of `width` elements: body(column, lanes, slot), with `lanes` as above. `slot` counts 0..kUnroll - 1
// within an unrolled step, for sums that must not wait for one another.
template <int kUnroll = 1, class Body>
[[gnu::always_inline]] inline void for_each_vector(int64_t width, Body body) {
    int64_t column = 0;
    for (; column + kUnroll * kLanes <= width; column += kUnroll * kLanes) {
#pragma GCC unroll 16
        for (int slot = 0; slot < kUnroll; ++slot) body(column + slot * kLanes, AllLanes{}, slot);
    }
    for (; column + kLanes <= width; column += kLanes) body(column, AllLanes{}, 0);
    if (column < width) body(column, width - column, 0);
}

template <int kCount>
inline Float add_up(const Float (&sums)[kCount]) {
    Float total = sums[0];
    for (int slot = 1; slot < kCount; ++slot) total += sums[slot];
    return total;
}

// The value as it will be read back from storage type T.
template <class T>
inline Float rounded_to(Float value) {
    T stored[kLanes];
    store(stored, value);
    return load(stored);
}
template <>
inline Float rounded_to<bfloat16>(Float value) {
    return bitcast<Float>(round_bfloat16(value) & 0xffff0000u);
}

// Swaps each lane with the one `distance` (a power of two) away.
template <int distance, std::size_t... lane>
inline Float swap_lanes(Float value, std::index_sequence<lane...>) {
    return __builtin_shufflevector(value, value, (lane ^ distance)...);
}

template <int distance = kLanes / 2>
inline float sum(Float value) {
    value += swap_lanes<distance>(value, std::make_index_sequence<kLanes>());
    if constexpr (distance == 1) {
        return value[0];
    } else {
        return sum<distance / 2>(value);
    }
}

template <int distance = kLanes / 2>
inline float maximum(Float value) {
    value = max(value, swap_lanes<distance>(value, std::make_index_sequence<kLanes>()));
    if constexpr (distance == 1) {
        return value[0];
    } else {
        return maximum<distance / 2>(value);
    }
}

// Half of adding up two vectors: where `distance` is in a lane's number, pairs of second, elsewhere of first.
template <int distance, std::size_t... lane>
inline Float add_pairs(Float first, Float second, std::index_sequence<lane...>) {
    const Float own = __builtin_shufflevector(first, second, (lane & distance ? kLanes + lane : lane)...);
    const Float other = __builtin_shufflevector(first, second, (lane & distance ? lane : kLanes + lane)...);
    return own + swap_lanes<distance>(other, std::make_index_sequence<kLanes>());
}

// Lane i of the result is the sum of vectors[i], in half the instructions of kLanes calls of sum().
template <int distance = 1>
inline Float sum_each(Float (&vectors)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * distance) {
        vectors[i] = add_pairs<distance>(vectors[i], vectors[i + distance], std::make_index_sequence<kLanes>());
    }
    if constexpr (distance < kLanes / 2) return sum_each<2 * distance>(vectors);
    return vectors[0];
}

inline bool any(Int condition) {
    bool found = false;
    for (int lane = 0; lane < kLanes; ++lane) found |= condition[lane] != 0;
    return found;
}

// One round of the transposition below: exchanges the off-diagonal quarters of each 2 distance x 2 distance block.
template <int distance, std::size_t... lane>
inline void exchange_quarters(Float& first, Float& second, std::index_sequence<lane...>) {
    const Float top = first, bottom = second;
    first = __builtin_shufflevector(top, bottom, (lane & distance ? kLanes + lane - distance : lane)...);
    second = __builtin_shufflevector(top, bottom, (lane & distance ? kLanes + lane : lane + distance)...);
}

// Transposes the kLanes x kLanes block in `rows` in log2(kLanes) rounds.
template <int distance = 1>
inline void transpose(Float (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
        if (!(row & distance)) {
            exchange_quarters<distance>(rows[row], rows[row + distance], std::make_index_sequence<kLanes>());
        }
    }
    if constexpr (distance < kLanes / 2) transpose<2 * distance>(rows);
}

}  // namespace nearpeak::NEARPEAK_ISA
