"""Exact merging of attention over disjoint sets of keys.

    lse = log(exp(lse1) + exp(lse2))
    out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2

A part that saw no key has lse = -inf and counts for nothing, whatever its out holds; where neither part saw one, out is
zero and lse is -inf. Arithmetic in float32 (float64 for float64), rounded once at the end, in plain PyTorch, which also
gives the gradients.
"""

import torch

from .. import backends
from ..checks import check_floating, check_same
from ..operators import accumulation_dtype, widened


def _check(out1, lse1, out2, lse2):
    check_floating("out1", out1)
    if out1.dim() == 0:
        raise ValueError("out1 must be (..., head_dim), not a single number")
    check_same("out2", out2, "out1", out1, "shape", "dtype", "device")
    dtype = accumulation_dtype(out1.dtype)
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if not isinstance(lse, torch.Tensor) or lse.dtype is not dtype:
            raise TypeError(f"{name} must be a tensor of {dtype}, as lse of attention in {out1.dtype} is")
        if lse.shape != out1.shape[:-1] or lse.device != out1.device:
            raise ValueError(
                f"{name} must have out1's shape without its last dimension, {tuple(out1.shape[:-1])}, and its device "
                f"{out1.device}, not shape {tuple(lse.shape)} on {lse.device}"
            )


def merge_attention(out1, lse1, out2, lse2):
    """Merge attention over two disjoint sets of keys into attention over all of them, exactly.

        lse = log(exp(lse1) + exp(lse2)),   out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2

    It is what attention over a key sequence in pieces needs: ring attention, a shared prefix, a cache in two places.
    More than two parts are merged one after the other. A part that saw no key (lse = -inf) counts for nothing.

    Args:
        out1, out2: (..., head_dim), the results of `attention`, float32, bfloat16, float16 or float64.
        lse1, lse2: (...), their lse from `return_lse=True`: float32 (float64 for float64).

    Returns:
        (out, lse) of the same shapes and dtypes. Gradients flow from both to all four arguments.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape or device that does not fit.

    Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; Liu et al. 2023,
    https://arxiv.org/abs/2310.01889.

    >>> query, key = torch.randn(1, 8, 10, 64), torch.randn(1, 8, 100, 64)
    >>> first = nearpeak.attention(query, key[:, :, :60], key[:, :, :60], return_lse=True)
    >>> second = nearpeak.attention(query, key[:, :, 60:], key[:, :, 60:], return_lse=True)
    >>> out, lse = nearpeak.merge_attention(*first, *second)
    """
    _check(out1, lse1, out2, lse2)
    backends.because("merge_attention is plain PyTorch: it has no kernel of its own")
    largest = torch.maximum(lse1, lse2).detach()
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weight1, weight2 = torch.exp(lse1 - largest), torch.exp(lse2 - largest)
    total = weight1 + weight2
    # Filled before the logarithm and the division, so that their gradients are numbers where nothing was seen.
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (largest + torch.log(total)).masked_fill(nothing, float("-inf"))
    out = _share(out1, lse1, weight1 / total) + _share(out2, lse2, weight2 / total)
    return out.to(out1.dtype), lse


def _share(out, lse, weight):
    """weight out; zero where the part saw no key, even if other kernels left NaN there."""
    seen = widened(out).masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)
    return weight.unsqueeze(-1) * seen
