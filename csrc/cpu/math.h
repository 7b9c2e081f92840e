// Elementary functions of vectors, to float32's precision.
#pragma once

#include "vector.h"

namespace nearpeak::NEARPEAK_ISA {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// After adding it, the low bits of the sum are the rounded number.
constexpr float kRounder = 0x1.8p23f;

// 2^f, f in [-1/2, 1/2], by a polynomial of degree 6, the interpolant in the Chebyshev nodes (relative error 2.5e-9
// beside float32's 6e-8).
inline Float exp2_of_fraction(Float f) {
    Float p = broadcast(1.5461444854736328e-4f);
    p = p * f + 1.3400427997112274e-3f;
    p = p * f + 9.6180569380521774e-3f;
    p = p * f + 5.5503271520137787e-2f;
    p = p * f + 2.4022650718688965e-1f;
    p = p * f + 6.9314718246459961e-1f;
    return p * f + 1.0f;
}

// 2^(n + f): 2^n by adding n to the exponent. `rounded` is n + kRounder.
inline Float exp2_of_parts(Float rounded, Float f) {
    return bitcast<Float>(bitcast<Unsigned>(exp2_of_fraction(f)) + (bitcast<Unsigned>(rounded) << 23));
}

// 2^x; 0 where x is -infinity. x must be below 128. Below 2^-126 the result may be 0.
inline Float exp2(Float x) {
#if NEARPEAK_LANES == 16 && defined(__AVX512F__)
    // Of -infinity the fraction is NaN, and scaling that by 2^-infinity is defined as 0.
    const __m512 n = _mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Float of_fraction = exp2_of_fraction(x - reinterpret_cast<Float>(n));
    return reinterpret_cast<Float>(_mm512_scalef_ps(reinterpret_cast<__m512>(of_fraction), n));
#else
    const Float rounded = x + broadcast(kRounder);
    const Float scaled = exp2_of_parts(rounded, x - (rounded - kRounder));
    return bitcast<Float>(bitcast<Unsigned>(scaled) & ~bitcast<Unsigned>(x < -126.0f));
#endif
}

// The same for results that are rounded to T, a fifth faster where T has 16 bits: a minimax polynomial of degree 5 for
// 2^f, f in [0, 1), with 2^0 = 1 (relative error 8e-8). The weights of softmax in 16 bits take most of their time here.
template <class T>
inline Float exp2_rounded_to(Float x) {
#if NEARPEAK_LANES == 16 && defined(__AVX512DQ__)
    if constexpr (sizeof(T) == 2) {
        // x less floor(x), zero for -infinity, and scaling is by 2^floor(x).
        const auto f = reinterpret_cast<Float>(
            _mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
        Float p = broadcast(1.86713133e-3f);
        p = p * f + 9.01702791e-3f;
        p = p * f + 5.57999164e-2f;
        p = p * f + 2.40164444e-1f;
        p = p * f + 6.93151295e-1f;
        p = p * f + 1.0f;
        return reinterpret_cast<Float>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
    }
#endif
    return exp2(x);
}

// e^x for x in [0, 80]. x / ln 2 rounded to float32 would lose digits: so n ln 2 is taken off x, ln 2 in two parts.
inline Float exp_of_positive(Float x) {
    const Float rounded = x * kLog2E + kRounder;
    const Float n = rounded - kRounder;
    const Float rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    return exp2_of_parts(rounded, rest * kLog2E);
}

struct ValueAndSlope {
    Float value, slope;
};

// tanh(x): an odd polynomial where |x| < 0.625, elsewhere 1 - r with r = 2 / (e^2|x| + 1), which has lost no digits
// there. Its slope 1 - tanh(x)^2, which is r (2 - r), stays exact where tanh(x) is almost 1.
inline ValueAndSlope tanh_and_slope(Float x) {
    const Float square = x * x;
    Float p = broadcast(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Float near = x + x * square * p;
    const Float r = 2.0f / (exp_of_positive(2.0f * min(magnitude(x), broadcast(20.0f))) + 1.0f);
    const Float far = bitcast<Float>(bitcast<Unsigned>(1.0f - r) | (bitcast<Unsigned>(x) & 0x80000000u));
    const Int is_near = magnitude(x) < 0.625f;
    return {select(is_near, near, far), select(is_near, 1.0f - near * near, r * (2.0f - r))};
}

inline Float tanh(Float x) { return tanh_and_slope(x).value; }

}  // namespace nearpeak::NEARPEAK_ISA
