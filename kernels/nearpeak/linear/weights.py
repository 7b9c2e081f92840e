"""Quantised weights: integer codes with a scale, and perhaps a zero point, per row and group of input features.

    weight[n, k] = scale[n, g] (code[n, k] - zero[n, g]),   g = k // group_size

Codes are unsigned: 0 to 2^bits - 1; a symmetric weight has no zeros, and its zero point is the middle code, 2^(bits-1).
Rounded to nearest: each code is the one whose value lies closest to the weight.
"""

from typing import NamedTuple

import torch

from ..checks import check_floating

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
# Of a group's range, what is tried where the smallest error is searched. Normal random weights in 4 bits are cut off at
# 0.75 to 1 of their largest, heavier tails below.
PARTS = tuple(1.0 - 0.025 * i for i in range(19))
CODE_BLOCK = 32  # what 4-bit codes are packed in: as many as every group holds a multiple of


class QuantizedWeight(NamedTuple):
    """The weight of a linear layer in 8 or 4 bits.

    codes: (out_features, in_features) uint8 of 8 bits; of 4 bits (out_features, in_features / 2): byte i of every
        16 holds code i of their 32 in its low half and code i + 16 in its high half, as GGUF's Q4_0 does, so that a
        vector of bytes becomes two vectors of neighbouring codes
    scales: (out_features, in_features / group_size) float32, for the range of any weight
    zeros: of the scales' shape, uint8; or None: 2^(bits - 1)
    bits: 8 or 4

    >>> codes, scales, zeros, bits = nearpeak.quantize_weight(torch.randn(2048, 640), bits=4, symmetric=False)
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self[:3] if tensor is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight, (out_features, in_features), that the codes stand for."""
        return dequantized(*self).to(dtype)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        return QuantizedWeight(*(None if tensor is None else tensor.to(device) for tensor in self[:3]), self.bits)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (..., width), one a byte, two a byte: (..., width / 2)."""
    low, high = codes.unflatten(-1, (-1, 2, CODE_BLOCK // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of pack."""
    blocks = packed.unflatten(-1, (-1, CODE_BLOCK // 2))
    return torch.stack((blocks & 15, blocks >> 4), dim=-2).flatten(-3)


def dequantized(codes, scales, zeros, bits, dtype=torch.float32):
    """scale (code - zero), in the arithmetic of dtype."""
    codes = unpack(codes) if bits == 4 else codes
    groups = codes.unflatten(-1, (scales.shape[-1], codes.shape[-1] // scales.shape[-1])).to(dtype)
    zero = 2 ** (bits - 1) if zeros is None else zeros[..., None].to(dtype)
    return ((groups - zero) * scales[..., None].to(dtype)).flatten(-2)


def check_options(bits, group_size):
    """Raises ValueError where bits or group_size is none that is served."""
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 4, not {bits!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be 32, 64 or 128, not {group_size!r}")


def _check_weight(weight, group_size):
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out_features, in_features), not of shape {tuple(weight.shape)}")
    if weight.shape[1] == 0 or weight.shape[1] % group_size:
        raise ValueError(f"weight must have in_features that group_size {group_size} divides, not {weight.shape[1]}")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite: an infinity or NaN has no code")


def _check_importance(importance, weight):
    check_floating("importance", importance)
    if importance.shape != weight.shape[1:] or importance.device != weight.device:
        raise ValueError(
            f"importance must be ({weight.shape[1]},), one number per input feature, on weight's device, "
            f"not of shape {tuple(importance.shape)} on {importance.device}"
        )
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError("importance must be finite and not negative")


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor,
    bits: int = 8,
    group_size: int = 64,
    symmetric: bool = True,
    importance: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to 8 or 4 bits, group by group along its input features.

    Symmetric, with m = 2^(bits - 1):  scale = max |w| / (m - 1),              code = round(w / scale) + m
    else, with h = 2^bits - 1:         scale = (max(w, 0) - min(w, 0)) / h,    code = round(w / scale) + zero,
                                       zero = round(-min(w, 0) / scale)

    With importance, of several smaller scales, which cut the largest weights off, each group takes the one with the
    smallest sum over k of importance[k] (w[k] - dequantised[k])^2; and of its codes the scale that fits them best.

    Args:
        weight: (out_features, in_features), float32, bfloat16, float16 or float64, finite.
        bits: 8 or 4.
        group_size: 32, 64 or 128; it divides in_features. Small groups err less and take 32 bits more each.
        symmetric: False spends 8 bits a group on a zero point, for weights that lie to one side of zero.
        importance: (in_features,), what an error in each feature's weights counts: the mean of x^2 over samples makes
            the layer's result err least, ones the weight. None: no search.

    Returns:
        QuantizedWeight, on weight's device.

    Raises:
        TypeError: a dtype that is not served. ValueError: an option or shape that does not fit, or a weight with
        infinities or NaN.

    Sources: Jacob et al. 2018, https://arxiv.org/abs/1712.05877; what is important is what activations make large: Lin
    et al. 2023, https://arxiv.org/abs/2306.00978.

    >>> weight = nearpeak.quantize_weight(torch.randn(2048, 640), bits=4, group_size=32)
    >>> y = nearpeak.quantized_linear(torch.randn(4, 640), weight)
    """
    check_options(bits, group_size)
    _check_weight(weight, group_size)
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    rounded = _symmetric if symmetric else _asymmetric
    if importance is None:
        codes, scales, zeros = rounded(groups, bits, 1.0)
    else:
        _check_importance(importance, weight)
        codes, scales, zeros = _least_wrong(groups, bits, rounded, importance.float().unflatten(0, (-1, group_size)))
    codes = codes.to(torch.uint8).flatten(1)
    zeros = None if zeros is None else zeros.squeeze(-1).to(torch.uint8)
    return QuantizedWeight(pack(codes) if bits == 4 else codes, scales, zeros, bits)


def _symmetric(groups, bits, part):
    """Codes, scales and zeros for `part` of each group's range."""
    middle = 2 ** (bits - 1)
    scales = groups.abs().amax(-1) * (part / (middle - 1))
    return _rounded(groups, scales).add_(middle).clamp_(0, 2**bits - 1), scales, None


def _asymmetric(groups, bits, part):
    most = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0) * part, groups.amax(-1).clamp(min=0) * part
    scales = high / most - low / most  # their difference might overflow
    zeros = _rounded(-low[..., None], scales).clamp_(0, most)
    return _rounded(groups, scales).add_(zeros).clamp_(0, most), scales, zeros


def _rounded(groups, scales):
    """The nearest multiples of scales, (..., 1) for each of groups; of a group of zeros, zeros."""
    return (groups / scales.masked_fill(scales == 0, 1.0)[..., None]).round_()


def _least_wrong(groups, bits, rounded, importance):
    """What `rounded` gives for the part of each group's range that errs least; importance: (groups, group_size)."""
    largest = groups.abs().amax(-1)
    # Squares of weights, each group's largest of them one, neither overflow nor vanish.
    relative = groups / largest.masked_fill(largest == 0, 1.0)[..., None]
    best, least = None, None
    for part in PARTS:
        codes, scales, zeros = rounded(relative, bits, part)
        numbers = codes - (2 ** (bits - 1) if zeros is None else zeros)
        weighted = importance * numbers
        fitted = (weighted * relative).sum(-1) / (weighted * numbers).sum(-1)
        scales = torch.where(fitted.isfinite() & (fitted > 0), fitted, scales)
        error = (importance * (relative - scales[..., None] * numbers).square()).sum(-1)
        found = [codes, scales, zeros]
        if best is None:
            best, least = found, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        for place, (new, old) in enumerate(zip(found, best, strict=True)):
            if new is not None:
                best[place] = torch.where(better if new.dim() == 2 else better[..., None], new, old)
    codes, scales, zeros = best
    return codes, scales * largest, zeros
