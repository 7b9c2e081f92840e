"""Attention with what shapes its scores: a padded batch, an additive bias and its gradient, ALiBi.

PyTorch's side gets the same as the one `attn_mask` that its function takes, made beforehand: ALiBi's too, which it
cannot compute.
"""

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.attention import reference

from .cases import Case, Operator, Work

# BERT-base's heads over a batch, and T5-base's.
SHAPES = {
    "padding": [{"batch": 8, "heads": 12, "length": length, "head_dim": 64} for length in (128, 512)],
    "bias": [{"batch": 4, "heads": 12, "length": length, "head_dim": 64} for length in (128, 512)],
    "alibi": [{"batch": 1, "heads": 16, "length": length, "head_dim": 128} for length in (512, 2048)],
}
DTYPES = [torch.float32, torch.bfloat16]
# PyTorch's backward takes many seconds a call in bfloat16 without bfloat16 units.
QUICK_LENGTH = 512


def _inputs(random, term, batch, heads, length, head_dim):
    inputs = {name: random(batch, heads, length, head_dim) for name in ("query", "key", "value")}
    terms = {"mask": None, "bias": None, "slopes": None}
    if term == "padding":
        terms["mask"] = torch.arange(length) < _kept(batch, length)[:, None, None, None]
    elif term == "bias":
        terms["bias"] = random(1, heads, length, length)
    else:
        terms["slopes"] = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
    return inputs | terms


def _kept(batch, length):
    """Lengths of a batch's sequences, from a quarter of the longest on."""
    return torch.linspace(length / 4, length, batch).long()


def _reference(query, key, value, mask, bias, slopes):
    right = None if slopes is None else 0
    return reference.attention(query, key, value, None, right, query.shape[3] ** -0.5, None, mask, bias, slopes)[0]


def _sdpa(query, key, value, mask, bias, slopes):
    if slopes is not None:
        distance = reference.distances(query.shape[2], key.shape[2], query.device)
        bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf).to(query.dtype)
    attn_mask = bias if mask is None else mask
    return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def _flops(term, batch, heads, length, head_dim):
    pairs = batch * length * length
    if term == "padding":
        pairs = length * int(_kept(batch, length).sum())
    elif term == "alibi":
        pairs = batch * length * (length + 1) // 2
    return 4 * heads * pairs * head_dim


def _elements(term, batch, heads, length, head_dim):
    """Of query, key and value, and of the bias."""
    return 3 * batch * heads * length * head_dim + (heads * length * length if term == "bias" else 0)


def _work(**shape):
    written = shape["batch"] * shape["heads"] * shape["length"] * shape["head_dim"]
    return Work(_flops(**shape), read=_elements(**shape), written=written)


def _training_work(**shape):
    """Seven products for two; every input and its gradient, out and its gradient."""
    out = shape["batch"] * shape["heads"] * shape["length"] * shape["head_dim"]
    elements = _elements(**shape) + out
    return Work(7 * _flops(**shape) // 2, read=elements, written=elements)


def _operator(differentiable):
    operator = Operator(
        name="attention_terms" if len(differentiable) == 3 else "attention_bias",
        shape="{batch}x{heads}x{length}x{head_dim} {term}",
        inputs=_inputs,
        reference=_reference,
        plain=lambda **inputs: _sdpa(**inputs)(),
        work={"forward": _work, "training": _training_work},
        kernels={"forward": "attention_inference", "training": "attention_backward"},
        differentiable=differentiable,
    )

    @operator.implementation("nearpeak")
    def _(query, key, value, mask, bias, slopes):
        return lambda: nearpeak.attention(
            query, key, value, causal=slopes is not None, mask=mask, bias=bias, alibi_slopes=slopes
        )

    operator.implementation("SDPA", baseline=True)(_sdpa)
    return operator


attention_terms = _operator(("query", "key", "value"))
attention_bias = _operator(("query", "key", "value", "bias"))


def _cases():
    for dtype in DTYPES:
        is_quick = dtype is torch.float32
        for term, shapes in SHAPES.items():
            for shape in shapes:
                yield Case(
                    attention_terms, {"term": term, **shape}, dtype, quick=is_quick and shape["length"] == QUICK_LENGTH
                )
        yield Case(attention_bias, {"term": "bias", **SHAPES["bias"][0]}, dtype, "training", quick=is_quick)
        for shape in SHAPES["padding"]:
            yield Case(
                attention_terms,
                {"term": "padding", **shape},
                dtype,
                "training",
                quick=is_quick and shape["length"] == 128,
            )


CASES = list(_cases())
