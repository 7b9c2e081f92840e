"""Attention with block masks: prefix-LM, documents, chunks and a sliding window, which hide most blocks of keys.

PyTorch's side gets the dense mask, made beforehand, and in its own block-sparse attention the same mask_mod.
"""

import functools

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak import masks
from nearpeak.attention import reference
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from .attention import TRUTH_ROWS
from .cases import Case, Operator, Work

HEADS, HEAD_DIM, LENGTH = 8, 64, 4096
DTYPES = [torch.float32, torch.bfloat16]
WINDOW = 512


def _mask_mod(mask, length):
    """A quarter is prefix, or a chunk; documents take a tenth to four tenths."""
    if mask == "prefix":
        return masks.prefix_lm(torch.tensor([length // 4]))
    if mask == "chunked":
        return masks.both(masks.causal, masks.chunked(length // 4))
    if mask == "documents":
        ends = torch.tensor([0.1, 0.3, 0.6]) * length
        return masks.both(masks.causal, masks.documents((torch.arange(length)[:, None] >= ends).sum(1)))
    return masks.sliding_window(WINDOW)


@functools.lru_cache
def _block_mask(mask, length):
    return nearpeak.create_block_mask(_mask_mod(mask, length), None, None, length, length)


def _inputs(random, heads, length, head_dim, mask):
    return {name: random(1, heads, length, head_dim) for name in ("query", "key", "value")} | {"mask": mask}


def _reference(query, key, value, mask):
    """The reference over blocks of queries, whose scores backward computes anew: so they are never all in memory."""
    dense, blocks = _block_mask(mask, query.shape[2]).dense(), []
    for first in range(0, query.shape[2], TRUTH_ROWS):
        rows = slice(first, first + TRUTH_ROWS)
        options = None, None, query.shape[3] ** -0.5, None, dense[:, :, rows]
        results = checkpoint(reference.attention, query[:, :, rows], key, value, *options, use_reentrant=False)
        blocks.append(results[0])
    return torch.cat(blocks, dim=2)


def _sdpa(query, key, value, mask):
    dense = _block_mask(mask, query.shape[2]).dense()
    return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=dense)


def _work(heads, length, head_dim, mask):
    pairs, elements = int(_block_mask(mask, length).dense().sum()), heads * length * head_dim
    return Work(4 * heads * pairs * head_dim, read=3 * elements, written=elements)


def _training_work(heads, length, head_dim, mask):
    """Seven products for two; every input and its gradient, out and its gradient."""
    forward = _work(heads, length, head_dim, mask)
    return Work(7 * forward.flops // 2, read=4 * forward.written, written=4 * forward.written)


def _operator(name, work, kernels):
    operator = Operator(
        name=name,
        shape="{heads}x{length}x{head_dim} {mask}",
        inputs=_inputs,
        reference=_reference,
        plain=lambda **inputs: _sdpa(**inputs)(),
        work=work,
        kernels=kernels,
        differentiable=("query", "key", "value"),
    )

    @operator.implementation("nearpeak")
    def _(query, key, value, mask):
        block_mask = _block_mask(mask, query.shape[2]).to(query.device)
        return lambda: nearpeak.attention(query, key, value, block_mask=block_mask)

    operator.implementation("SDPA", baseline=True)(_sdpa)
    return operator


attention_blocks = _operator("attention_blocks", {"forward": _work}, {"forward": "attention_blocks_inference"})
attention_blocks_training = _operator(
    "attention_blocks_training", {"training": _training_work}, {"training": "attention_blocks_backward"}
)


# Its gradients have no kernel on CPU.
@attention_blocks.implementation("FlexAttention", baseline=True, compiled=True)
def _(query, key, value, mask):
    length = query.shape[2]
    block_mask = flex_attention.create_block_mask(_mask_mod(mask, length), None, None, length, length, query.device)
    compiled = torch.compile(flex_attention.flex_attention)
    return lambda: compiled(query, key, value, block_mask=block_mask)


def _cases():
    for dtype in DTYPES:
        for mask in ("prefix", "documents", "chunked", "window"):
            shape = {"heads": HEADS, "length": LENGTH, "head_dim": HEAD_DIM, "mask": mask}
            yield Case(attention_blocks, shape, dtype, quick=dtype is torch.float32 and mask == "documents")
            # PyTorch's backward takes many seconds a call in bfloat16 without bfloat16 units.
            yield Case(attention_blocks_training, shape, dtype, "training", quick=False)


CASES = list(_cases())
