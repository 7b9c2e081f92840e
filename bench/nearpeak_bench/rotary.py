"""Rotary position embedding: Llama's and Gemma's heads, as projections lay them out and contiguous; decoding."""

import nearpeak
import torch
from nearpeak.rotary import reference

from .cases import Case, Operator, Work, compiled

# Position 0 turns nothing, and would make a single row trivial.
FIRST_POSITION = 1000
LLAMA = {"heads": 32, "key_heads": 8, "head_dim": 128}
GEMMA = {"heads": 4, "key_heads": 1, "head_dim": 256}
SHAPES = [
    {**LLAMA, "sequence": 2048, "layout": "contiguous"},
    {**LLAMA, "sequence": 2048, "layout": "transposed"},
    {**LLAMA, "sequence": 1, "layout": "transposed"},
    {**GEMMA, "sequence": 512, "layout": "transposed"},
    {**GEMMA, "sequence": 1, "layout": "transposed"},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _inputs(random, heads, key_heads, sequence, head_dim, layout):
    """Query, key, and tables of full width, as Hugging Face passes them."""

    def projected(heads):
        if layout == "contiguous":
            return random(1, heads, sequence, head_dim)
        return random(1, sequence, heads, head_dim).transpose(1, 2)

    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(FIRST_POSITION + torch.arange(sequence, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(0)
    query, key = projected(heads), projected(key_heads)
    return {"query": query, "key": key, "cos": angles.cos().to(query), "sin": angles.sin().to(query)}


def _reference(query, key, cos, sin):
    half = cos.shape[-1] // 2
    return reference.apply_rotary(query, key, cos[..., :half], sin[..., :half], False, False, 2 * half)


def _plain(query, key, cos, sin):
    """Hugging Face's formula."""

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)

    return rotate(query), rotate(key)


def _work(heads, key_heads, sequence, head_dim, layout):
    elements = (heads + key_heads) * sequence * head_dim
    return Work(3 * elements, elements + sequence * head_dim, elements)


def _hugging_face():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb


def _operator(name, inplace):
    """`apply_rotary` or its in-place form; the baselines have no in-place form and are the same for both."""
    kernels = (
        {"forward": "apply_rotary_"} if inplace else {"forward": "apply_rotary_inference", "backward": "apply_rotary"}
    )
    operator = Operator(
        name=name,
        shape="{heads}:{key_heads}x{sequence}x{head_dim} {layout}",
        inputs=_inputs,
        reference=_reference,
        plain=_plain,
        work=dict.fromkeys(kernels, _work),
        kernels=kernels,
        differentiable=("query", "key"),
        inplace=inplace,
    )

    @operator.implementation("nearpeak")
    def _(query, key, cos, sin):
        return lambda: nearpeak.apply_rotary(query, key, cos, sin, inplace=inplace)

    @operator.implementation("Hugging Face", baseline=True)
    def _(query, key, cos, sin):
        function = _hugging_face()
        return lambda: function(query, key, cos, sin)

    @operator.implementation("torch.compile", baseline=True, compiled=True)
    def _(query, key, cos, sin):
        function = compiled(_hugging_face())
        return lambda: function(query, key, cos, sin)

    return operator


apply_rotary = _operator("apply_rotary", inplace=False)
apply_rotary_inplace = _operator("apply_rotary_inplace", inplace=True)


def _cases():
    for dtype in DTYPES:
        for shape in SHAPES:
            large, one_token = shape == SHAPES[1], shape == SHAPES[4]
            quick = (large and dtype is not torch.float16) or (one_token and dtype is torch.float32)
            yield Case(apply_rotary, shape, dtype, quick=quick)
            yield Case(apply_rotary_inplace, shape, dtype, quick=shape == SHAPES[0] and dtype is not torch.float16)
        yield Case(apply_rotary, SHAPES[1], dtype, "backward", quick=dtype is torch.float32)


CASES = list(_cases())
