"""Attention with scores of the user's own: ALiBi and a learned table of distances as functions, and a softcap.

PyTorch's side gets what the function adds as a dense bias, made beforehand, where it only adds; eager operators, which
hold all scores; and FlexAttention, whose gradients have no kernel on CPU.
"""

import functools

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.attention import reference
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from . import plain as plain_layers
from .attention import TRUTH_ROWS
from .cases import Absent, Case, Operator, Work

HEADS, HEAD_DIM, LENGTH = 8, 64, 2048
DISTANCES = 128  # of a learned table: further keys share the last


@functools.lru_cache
def _table():
    return torch.randn(HEADS, DISTANCES, generator=torch.Generator().manual_seed(0))


def _function(mod, like):
    """Of (score, batch, head, query, key); like: a tensor on the device that it is for."""
    slopes, table = nearpeak.nn.alibi_slopes(HEADS).to(like.device), _table().to(like.device)
    return {
        "alibi": lambda score, b, h, q, k: score - slopes[h] * (q - k).abs(),
        "table": lambda score, b, h, q, k: score + table[h, (q - k).abs().clamp(max=DISTANCES - 1)],
        "softcap": lambda score, b, h, q, k: 30.0 * torch.tanh(score / 30.0),
    }[mod]


def _places(query):
    """Numbers of batch entry, head, query and key, which broadcast against scores."""
    sizes = 1, HEADS, query.shape[2], query.shape[2]
    return [
        torch.arange(size, device=query.device).view([-1 if i == dim else 1 for i in range(4)])
        for dim, size in enumerate(sizes)
    ]


def _eager(query, key, value, mod):
    places, function = _places(query), _function(mod, query)
    mask = torch.ones(1, 1, *[query.shape[2]] * 2, dtype=torch.bool, device=query.device)

    def modify(scores):
        return function(scores, *places).to(scores.dtype)

    return plain_layers.attention(query, key, value, mask, HEAD_DIM**-0.5, None, modify=modify)[0]


def _reference(query, key, value, mod):
    """The reference over blocks of queries, whose scores backward computes anew: so they are never all in memory."""
    blocks, score_mod = [], nearpeak.trace_score_mod(_function(mod, query))
    for first in range(0, query.shape[2], TRUTH_ROWS):
        options = None, None, HEAD_DIM**-0.5, None, *[None] * 8, 0.0, *score_mod[1:], (0, first, 0)
        rows = query[:, :, first : first + TRUTH_ROWS]
        blocks.append(checkpoint(reference.attention, rows, key, value, *options, use_reentrant=False)[0])
    return torch.cat(blocks, dim=2)


def _work(length, mod):
    elements = HEADS * length * HEAD_DIM
    return Work(4 * HEADS * length * length * HEAD_DIM, read=3 * elements, written=elements)


def _training_work(length, mod):
    """Seven products for two; every input and its gradient, out and its gradient."""
    forward = _work(length, mod)
    return Work(7 * forward.flops // 2, read=4 * forward.written, written=4 * forward.written)


def _operator(name, work, kernels):
    operator = Operator(
        name=name,
        shape="{length} {mod}",
        inputs=lambda random, length, mod: {
            **{each: random(1, HEADS, length, HEAD_DIM) for each in ("query", "key", "value")},
            "mod": mod,
        },
        reference=_reference,
        plain=_eager,
        work=work,
        kernels=kernels,
        differentiable=("query", "key", "value"),
    )

    @operator.implementation("nearpeak")
    def _(query, key, value, mod):
        score_mod = nearpeak.trace_score_mod(_function(mod, query))
        return lambda: nearpeak.attention(query, key, value, score_mod=score_mod)

    @operator.implementation("SDPA with a dense bias", baseline=True)
    def _(query, key, value, mod):
        if mod == "softcap":
            raise Absent("a softcap is no bias")
        zeros = torch.zeros(1, HEADS, *[query.shape[2]] * 2, device=query.device)
        bias = _function(mod, query)(zeros, *_places(query)).to(query.dtype)
        return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    @operator.implementation("eager", baseline=True)
    def _(**inputs):
        return lambda: _eager(**inputs)

    return operator


attention_score_mod = _operator("attention_score_mod", {"forward": _work}, {"forward": "attention_inference"})
attention_score_mod_training = _operator(
    "attention_score_mod_training", {"training": _training_work}, {"training": "attention_backward"}
)


@attention_score_mod.implementation("FlexAttention", baseline=True, compiled=True)
def _(query, key, value, mod):
    score_mod, function = _function(mod, query), torch.compile(flex_attention.flex_attention)
    return lambda: function(query, key, value, score_mod=score_mod)


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for mod in ("alibi", "table", "softcap"):
            shape = {"length": LENGTH, "mod": mod}
            yield Case(attention_score_mod, shape, dtype, quick=mod != "softcap" and dtype is torch.float32)
            # PyTorch's backward takes many seconds a call in bfloat16 without bfloat16 units.
            yield Case(attention_score_mod_training, shape, dtype, "training", quick=False)


CASES = list(_cases())
