// The activations and their slopes. Each gives the pair (f(x), f'(x)); what a caller does not use is not computed.
#pragma once

#include "../../cpu/math.h"

namespace nearpeak::feedforward::NEARPEAK_ISA {

using namespace nearpeak::NEARPEAK_ISA;

struct Sigmoid {
    Float value, rest;
};

// 1 / (1 + e^-x), and what it lacks to 1, in which nothing cancels. Far below it is 0.
inline Sigmoid sigmoid(Float x) {
    constexpr float kFar = 80.0f;
    const Float magnitude = max(x, -x);
    const Float e = exp_of_positive(min(magnitude, broadcast(kFar)));
    const Float smaller = select(magnitude > kFar, Float{}, 1.0f / (1.0f + e)), larger = 1.0f - smaller;
    return {select(x < 0.0f, smaller, larger), select(x < 0.0f, larger, smaller)};
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

// x Phi(x), Phi the normal distribution. With z = |x| / sqrt(2) and t = 1 / (1 + z / 2),
//
//     erfc(z) = e^-z^2 Q(t)      Q of degree 9, fitted in the Chebyshev nodes (relative error 3.2e-8)
//
// and Phi(x) = erfc(z) / 2 below zero, so that nothing cancels there; above, one minus that.
struct Gelu {
    static ValueAndSlope at(Float x) {
        constexpr float kRootHalf = 0.7071067811865476f, kDensity = 0.3989422804014327f;
        const Float z = max(x, -x) * kRootHalf;
        const Float t = 1.0f / (1.0f + 0.5f * z);
        Float q = broadcast(-5.451054499e-02f);
        q = q * t + 2.609740496e-01f;
        q = q * t - 4.346236587e-01f;
        q = q * t + 2.121223509e-01f;
        q = q * t + 2.453176305e-02f;
        q = q * t + 1.773153543e-01f;
        q = q * t + 2.511226833e-01f;
        q = q * t + 2.808222175e-01f;
        q = q * t + 2.822533250e-01f;
        q = q * t - 7.575605650e-06f;
        const Float gaussian = exp2(z * z * -kLog2E);
        const Float half_erfc = 0.5f * gaussian * q;
        const Float phi = select(x < 0.0f, half_erfc, 1.0f - half_erfc);
        return {x * phi, phi + x * (kDensity * gaussian)};
    }
};

}  // namespace nearpeak::feedforward::NEARPEAK_ISA
