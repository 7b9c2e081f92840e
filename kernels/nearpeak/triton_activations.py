"""The activations of activations.py for Triton kernels, in float32."""

import triton
import triton.language as tl

# As activations.py numbers them.
RELU, GELU, GELU_TANH, QUICK_GELU, SILU = (tl.constexpr(number) for number in range(5))


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x), and what it lacks to 1, in which nothing cancels."""
    return 1.0 / (1.0 + tl.exp(-x)), 1.0 / (1.0 + tl.exp(x))


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """f(x) and f'(x); what a caller does not use costs nothing."""
    if KIND == RELU:
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif KIND == GELU:
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * phi
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == GELU_TANH:
        s, rest = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        value = x * s
        slope = s + 1.5957691216057308 * x * s * rest * (1.0 + 0.134145 * x * x)
    elif KIND == QUICK_GELU:
        s, rest = _sigmoid(1.702 * x)
        value = x * s
        slope = s * (1.0 + 1.702 * x * rest)
    elif KIND == SILU:
        s, rest = _sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * rest)
    else:
        positive = tl.where(x <= 0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope
