// The activations and their slopes. Each gives the pair (f(x), f'(x)); what a caller does not use is not computed.
#pragma once

#include "../../cpu/math.h"

namespace nearpeak::feedforward::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

struct ValueAndSlope {
    Float value, slope;
};

struct Sigmoid {
    Float value, rest;
};

// 1 / (1 + e^-x), and what it lacks to 1, in which nothing cancels. Far below, where e^-x would overflow, it is 0.
inline Sigmoid sigmoid(Float x) {
    constexpr float kLargest = 126.0f;
    const Float exponent = x * -kLog2E;
    const Float e = exp2(min(exponent, broadcast(kLargest)));
    const Float value = 1.0f / (1.0f + e);
    return {select(exponent > kLargest, Float{}, value), e * value};
}

struct Relu {
    static ValueAndSlope at(Float x) {
        return {select(x <= 0.0f, Float{}, x), select(x <= 0.0f, Float{}, broadcast(1.0f))};
    }
};

struct ReluSquared {
    static ValueAndSlope at(Float x) {
        const Float positive = Relu::at(x).value;
        return {positive * positive, 2.0f * positive};
    }
};

struct Silu {
    static ValueAndSlope at(Float x) {
        const auto [s, rest] = sigmoid(x);
        return {x * s, s * (1.0f + x * rest)};
    }
};

// x sigmoid(1.702 x)
struct QuickGelu {
    static ValueAndSlope at(Float x) {
        constexpr float kFactor = 1.702f;
        const auto [s, rest] = sigmoid(kFactor * x);
        return {x * s, s * (1.0f + kFactor * x * rest)};
    }
};

// x (1 + tanh(u)) / 2 = x sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
    static ValueAndSlope at(Float x) {
        constexpr float kRoot = 0.7978845608028654f, kCubic = 0.044715f;
        const Float square = x * x;
        const auto [s, rest] = sigmoid(2.0f * kRoot * x * (1.0f + kCubic * square));
        const Float slope_of_u = kRoot * (1.0f + 3.0f * kCubic * square);
        return {x * s, s + 2.0f * x * s * rest * slope_of_u};
    }
};

// x Phi(x), Phi the normal distribution. With z = |x| / sqrt(2), as polynomials fitted in the Chebyshev nodes:
//
//     erf(z)  = z P(z^2)               for z < 1     (relative error 1.4e-9 beside float32's 6e-8)
//     erfc(z) = e^-z^2 Q(1 / (1 + z/2))  above       (1.3e-8)
//
// and Phi(x) = erfc(z) / 2 below zero, so that nothing cancels there.
struct Gelu {
    static ValueAndSlope at(Float x) {
        constexpr float kRootHalf = 0.7071067811865476f, kDensity = 0.3989422804014327f;
        const Float z = max(x, -x) * kRootHalf;
        const Float square = z * z;
        Float p = broadcast(7.882497110620961e-05f);
        p = p * square - 8.018854992460473e-04f;
        p = p * square + 5.189311942542850e-03f;
        p = p * square - 2.685432879597274e-02f;
        p = p * square + 1.128359744473477e-01f;
        p = p * square - 3.761262690357992e-01f;
        p = p * square + 1.128379165881502e+00f;
        const Float half_erf = 0.5f * z * p;
        const Float t = 1.0f / (1.0f + 0.5f * z);
        Float q = broadcast(7.037284416290455e-02f);
        q = q * t - 1.498726414394997e-01f;
        q = q * t - 2.513772383545190e-02f;
        q = q * t + 1.452265895073339e-01f;
        q = q * t + 1.387806999637744e-01f;
        q = q * t + 2.587474917620425e-01f;
        q = q * t + 2.799394502369548e-01f;
        q = q * t + 2.823052720241813e-01f;
        q = q * t - 8.620129550607203e-06f;
        const Float gaussian = exp2(square * -kLog2E);
        const Float half_erfc = 0.5f * gaussian * q;
        const Int below = x < 0.0f;
        const Float near = 0.5f + select(below, -half_erf, half_erf);
        const Float far = select(below, half_erfc, 1.0f - half_erfc);
        const Float phi = select(z < 1.0f, near, far);
        return {x * phi, phi + x * (kDensity * gaussian)};
    }
};

}  // namespace nearpeak::feedforward::NEARPEAK_ISA
