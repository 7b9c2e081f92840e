// The activations and their slopes. Each gives the pair (f(x), f'(x)); what a caller does not use is not computed.
#pragma once

#include "activation.h"
#include "math.h"

namespace nearpeak::NEARPEAK_ISA {

struct Sigmoid {
    Float value, rest;
};

// 1 / (1 + e^-x), and what it lacks to 1, in which nothing cancels. Far below it is 0.
inline Sigmoid sigmoid(Float x) {
    constexpr float kFar = 80.0f;
    const Float size = magnitude(x);
    const Float e = exp_of_positive(min(size, broadcast(kFar)));
    const Float smaller = select(size > kFar, Float{}, 1.0f / (1.0f + e)), larger = 1.0f - smaller;
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

// Phi(-a) = erfc(a / sqrt(2)) / 2 for a >= 0, Phi the normal distribution.
#if NEARPEAK_LANES == 16
// A polynomial of degree 6 around each multiple of 1/2, the interpolant in the Chebyshev nodes: the coefficients of one
// power fill a vector, and one instruction looks them up. Half the time of the formula below, which divides.
// Absolute error 2.3e-8; relative error 7e-7 up to 4, 1e-3 up to 7.75. What is behind that, below 5e-15, becomes zero.
inline Float half_erfc(Float a) {
    static const float kCoefficients[][kLanes] = {
        {0.0f, 0.00303344871f, 0.00200331118f, -0.000638725585f, -0.00133720296f, -0.000516428147f, 0.000106052408f,
         0.000179456765f, 8.2951512e-05f, 2.25679305e-05f, 4.12835061e-06f, 5.35034189e-07f, 5.04757516e-08f,
         3.52340401e-09f, 1.83946011e-10f, 7.23678019e-12f},
        {-0.0098446738f, -0.00454859482f, 0.00394957559f, 0.00580797903f, 0.00226219767f, -0.000637857476f,
         -0.00109867589f, -0.000580896274f, -0.000184570657f, -3.98981247e-05f, -6.16215539e-06f, -6.97428334e-07f,
         -5.87261617e-08f, -3.71569908e-09f, -1.77883472e-10f, -6.47612085e-12f},
        {0.0f, -0.0201692265f, -0.0201638173f, -0.00607172912f, 0.00449885475f, 0.00593415042f, 0.00332403439f,
         0.00117724715f, 0.000289952324f, 5.16869659e-05f, 6.81094389e-06f, 6.71961345e-07f, 5.00530355e-08f,
         2.83139379e-09f, 1.22150998e-10f, 4.03185861e-12f},
        {0.0664863586f, 0.0440070555f, 2.59518879e-06f, -0.0269809347f, -0.0269958731f, -0.0153381545f, -0.00590942195f,
         -0.00163620897f, -0.000334488606f, -5.12479164e-05f, -5.93935192e-06f, -5.23883159e-07f, -3.53201877e-08f,
         -1.82580073e-09f, -7.25321192e-11f, -2.2182861e-12f},
        {0.0f, 0.0880163237f, 0.120985359f, 0.0971382037f, 0.0539909713f, 0.021910375f, 0.00664777169f, 0.0015271944f,
         0.000267660565f, 3.59634978e-05f, 3.71682381e-06f, 2.96172999e-07f, 1.82282189e-08f, 8.67656003e-10f,
         3.19747076e-11f, 9.13019118e-13f},
        {-0.398942262f, -0.352065325f, -0.241970748f, -0.129517615f, -0.0539909638f, -0.0175282937f, -0.00443184609f,
         -0.000872683246f, -0.000133830908f, -1.59840001e-05f, -1.48677839e-06f, -1.07706541e-07f, -6.0768417e-09f,
         -2.67030259e-10f, -9.13899945e-12f, -2.43615051e-13f},
        {0.5f, 0.308537543f, 0.158655256f, 0.066807203f, 0.0227501318f, 0.00620966544f, 0.00134989806f, 0.000232629085f,
         3.16712431e-05f, 3.39767303e-06f, 2.86651584e-07f, 1.89895619e-08f, 9.865877e-10f, 4.01600073e-11f,
         1.27981252e-12f, 3.1908917e-14f},
    };
    const Float nearest = min(2.0f * a, broadcast(15.0f)) + kRounder;
    const Int index = bitcast<Int>(nearest);
    const Float h = a - (nearest - kRounder) * 0.5f;
    Float sum = look_up(load(kCoefficients[0]), index);
#pragma GCC unroll 6
    for (int power = 1; power < 7; ++power) sum = sum * h + look_up(load(kCoefficients[power]), index);
    return select(a > 7.75f, Float{}, sum);
}
#else
// With t = 1 / (1 + z / 2), z = a / sqrt(2):  erfc(z) = e^-z^2 Q(t), Q of degree 9, fitted in the Chebyshev nodes
// (relative error 3.2e-8).
inline Float half_erfc(Float a) {
    const Float t = 1.0f / (1.0f + 0.3535533905932738f * a);
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
    return 0.5f * exp2(a * a * (-0.5f * kLog2E)) * q;
}
#endif

// x Phi(x): Phi(-a) below zero, so that nothing cancels there; above, one minus that.
struct Gelu {
    static ValueAndSlope at(Float x) {
        constexpr float kDensity = 0.3989422804014327f;
        const Float below = half_erfc(magnitude(x));
        const Float phi = select(x < 0.0f, below, 1.0f - below);
        return {x * phi, phi + x * (kDensity * exp2(x * x * (-0.5f * kLog2E)))};
    }
};

// Calls function(F{}) with the activation's type.
template <class Function>
inline void with_activation(Activation activation, Function function) {
    switch (activation) {
        case Activation::relu:
            return function(Relu{});
        case Activation::gelu:
            return function(Gelu{});
        case Activation::gelu_tanh:
            return function(GeluTanh{});
        case Activation::quick_gelu:
            return function(QuickGelu{});
        case Activation::silu:
            return function(Silu{});
        case Activation::relu_squared:
            return function(ReluSquared{});
    }
}

}  // namespace nearpeak::NEARPEAK_ISA
