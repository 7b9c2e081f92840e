"""Attention: prefill (causal and full, all heads and grouped heads), sliding window, decoding; training, which is
forward and backward together.

Operations are counted after masking: a causal row of n keys costs what n keys cost.
"""

import itertools

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.attention import reference
from torch.utils.checkpoint import checkpoint

from .cases import Case, Operator, Work

HEADS = 16
SEQUENCES = [128, 512, 2048, 4096]
# (sequence, head_dim, mask, key_heads)
QUICK = {
    torch.float32: [
        (128, 64, "causal", HEADS), (128, 128, "causal", HEADS), (512, 64, "causal", HEADS), (2048, 64, "full", HEADS),
        (2048, 64, "causal", HEADS), (2048, 128, "causal", HEADS // 4),
    ],
    torch.bfloat16: [(128, 64, "causal", HEADS), (512, 128, "causal", HEADS), (512, 128, "full", HEADS // 4)],
}  # fmt: skip
TRAINING_SEQUENCES = SEQUENCES[1:3]
# Without bfloat16 units, PyTorch's backward of the next length takes 15 seconds a call in bfloat16.
QUICK_TRAINING_SEQUENCE = 512
HEAD_DIMS = [64, 128]
DTYPES = [torch.float32, torch.bfloat16]

# The truth is computed for this many queries at a time, so that its float64 scores fit in memory.
TRUTH_ROWS = 256


def _inputs(random, heads, key_heads, queries, keys, head_dim, mask, value_dim=None):
    """mask: "full", "causal" (bottom right), or the number of keys that each query sees in a causal window.

    value_dim: the values' head_dim where it is another than the keys'.
    """
    return {
        "query": random(1, heads, queries, head_dim),
        "key": random(1, key_heads, keys, head_dim),
        "value": random(1, key_heads, keys, value_dim or head_dim),
        "mask": mask,
    }


def sides(mask):
    """(left, right) of the window that `mask` stands for."""
    if mask == "full":
        return None, None
    return (None, 0) if mask == "causal" else (mask - 1, 0)


def _reference(query, key, value, mask):
    """nearpeak's reference over blocks of queries, each with the keys that its mask can reach."""
    left, right = sides(mask)
    queries, keys = query.shape[2], key.shape[2]
    blocks = []
    for first in range(0, queries, TRUTH_ROWS):
        last = min(first + TRUTH_ROWS, queries)
        # Query i stands at key i + keys - queries; a block's last query must see its last key, so cut there.
        end = keys if right is None else last + keys - queries
        start = 0 if left is None else max(0, first + keys - queries - left)
        block = query[:, :, first:last], key[:, :, start:end], value[:, :, start:end]
        options = left, right, query.shape[-1] ** -0.5, None
        # Backward computes a block's scores anew, so that they never are all in memory either.
        blocks.append(checkpoint(reference.attention, *block, *options, use_reentrant=False)[0])
    return torch.cat(blocks, dim=2)


def sdpa(query, key, value, mask):
    """PyTorch's function, with `is_causal` where its top-left mask is the bottom-right one."""
    queries, keys = query.shape[2], key.shape[2]
    options = {"enable_gqa": query.shape[1] != key.shape[1]}
    # One query at the bottom right sees every key.
    if mask == "causal" and queries == keys > 1:
        options["is_causal"] = True
    elif mask != "full" and not (mask == "causal" and queries == 1):
        options["attn_mask"] = reference.allowed(queries, keys, *sides(mask), query.device)
    return lambda: F.scaled_dot_product_attention(query, key, value, **options)


def _visible_pairs(queries, keys, mask):
    """How many (query, key) pairs the mask allows."""
    if mask == "full":
        return queries * keys
    positions = range(keys - queries, keys)
    return sum(p + 1 if mask == "causal" else min(p + 1, mask) for p in positions if p >= 0)


def _work(heads, key_heads, queries, keys, head_dim, mask, value_dim=None):
    dims = head_dim + (value_dim or head_dim)
    return Work(
        flops=2 * heads * _visible_pairs(queries, keys, mask) * dims,
        read=heads * queries * head_dim + key_heads * keys * dims,
        written=heads * queries * (value_dim or head_dim),
    )


def _training_work(heads, key_heads, queries, keys, head_dim, mask, value_dim=None):
    """Seven products, two forward and five backward (of four with keys, three with values); every input and its
    gradient, out and its gradient."""
    value_dim = value_dim or head_dim
    pairs = heads * _visible_pairs(queries, keys, mask)
    elements = (heads * queries + key_heads * keys) * (head_dim + value_dim)
    return Work(pairs * (8 * head_dim + 6 * value_dim), read=elements, written=elements)


def _operator(name, shape):
    operator = Operator(
        name=name,
        shape=shape,
        inputs=_inputs,
        reference=_reference,
        plain=lambda **inputs: sdpa(**inputs)(),
        work={"forward": _work, "training": _training_work},
        kernels={"forward": "attention_inference", "training": "attention_backward"},
        differentiable=("query", "key", "value"),
    )

    @operator.implementation("nearpeak")
    def _(query, key, value, mask):
        left, right = sides(mask)
        return lambda: nearpeak.attention(query, key, value, causal=right == 0, window=(left, None))

    operator.implementation("SDPA", baseline=True)(sdpa)
    return operator


attention = _operator("attention", "{heads}:{key_heads}x{queries}x{head_dim} {mask}")
attention_window = _operator("attention_window", "{heads}:{key_heads}x{queries}x{head_dim} window {mask}")
# DeepSeek's multi-head latent attention: values are narrower than keys.
attention_latent = _operator("attention_latent", "{heads}:{key_heads}x{queries}x{keys}x{head_dim}-{value_dim} {mask}")
attention_decode = _operator("attention_decode", "{heads}:{key_heads}x{keys}x{head_dim}")


def _cases():
    for dtype in DTYPES:
        for length, head_dim, mask, key_heads in itertools.product(
            SEQUENCES, HEAD_DIMS, ("full", "causal"), (HEADS, HEADS // 4)
        ):
            shape = {"heads": HEADS, "key_heads": key_heads, "queries": length, "keys": length, "head_dim": head_dim}
            yield Case(
                attention, {**shape, "mask": mask}, dtype, quick=(length, head_dim, mask, key_heads) in QUICK[dtype]
            )
            if length in TRAINING_SEQUENCES:
                quick = length == QUICK_TRAINING_SEQUENCE and (head_dim, mask, key_heads) == (64, "causal", HEADS)
                yield Case(attention, {**shape, "mask": mask}, dtype, "training", quick=quick)
    window = {"heads": 8, "key_heads": 8, "queries": 8192, "keys": 8192, "head_dim": 64, "mask": 512}
    decode = {"heads": 32, "key_heads": 8, "queries": 1, "keys": 4096, "head_dim": 128, "mask": "full"}
    for dtype in DTYPES:
        # PyTorch's side of the window takes many seconds a call in bfloat16 without bfloat16 units.
        yield Case(attention_window, window, dtype, quick=dtype is torch.float32)
        yield Case(attention_decode, decode, dtype, quick=True)


CASES = list(_cases())
