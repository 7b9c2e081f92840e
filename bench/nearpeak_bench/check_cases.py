"""What `nearpeak check` runs: the suites' operators in small odd shapes, and operators for what no suite measures.

Those have no work to be timed against, and no baselines: attention with each of its terms and with sequences of
different lengths, its lse among the results; parts merged; packed gate and up; the other forms of RMSNorm and rotary.
"""

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak import dropout
from nearpeak.activations import KINDS
from nearpeak.attention import reference as attention_reference
from nearpeak.feedforward import reference as feedforward_reference
from nearpeak.linear import reference as linear_reference
from nearpeak.norm import reference as norm_reference
from nearpeak.rotary import reference as rotary_reference

from . import plain
from .cases import Operator

EPS = 1e-6
ROWS = [{"rows": 5, "width": 77}, {"rows": 2, "width": 640}]
HEADS = {"heads": 4, "key_heads": 2, "head_dim": 40}
WIDE = {"heads": 2, "key_heads": 1, "head_dim": 288}
TURNED = [{**HEADS, "sequence": 7, "layout": layout} for layout in ("transposed", "contiguous")]
TERMS = {"batch": 2, "heads": 3, "length": 37, "head_dim": 32}
PAIRS = [{**HEADS, "batch": 2, "queries": queries, "keys": keys} for queries, keys in ((37, 37), (5, 133))]
# A gradient has one element a head: of a few dozen in all draws, one layer rounds some better by chance.
MANY_HEADS = {"batch": 1, "heads": 64, "key_heads": 4, "head_dim": 8}
MODS = [{"length": 70, "mod": mod} for mod in ("alibi", "table", "softcap")]
TABLES = [{"tokens": 37, "rows": 50, "width": 77}, {"tokens": 256, "rows": 5, "width": 40}]
SINKS = [{**MANY_HEADS, "queries": queries, "keys": keys} for queries, keys in ((37, 37), (5, 133))]
BLOCKS = [{"heads": 3, "length": 200, "head_dim": 40, "mask": mask} for mask in ("prefix", "documents", "chunked")]
SEQUENCES = [{**HEADS, "lengths": "17,1,0,33,5"}]
SHAPES = {
    **dict.fromkeys(
        ("rms_norm", "rms_norm_out", "rms_norm_gemma", "add_rms_norm", "add_rms_norm_out", "layer_norm",
         "layer_norm_out", "add_layer_norm", "post_layer_norm", "swiglu", "swiglu_packed", "geglu", "geglu_tanh",
         "reglu", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu_squared"), ROWS),
    **dict.fromkeys(("apply_rotary", "apply_rotary_inplace"), TURNED),
    "qk_norm": [{**HEADS, "sequence": 7}],
    "apply_rotary_interleaved": [{**HEADS, "sequence": 7}],
    "apply_rotary_partial": [{**HEADS, "sequence": 7}],
    **dict.fromkeys(("embedding", "embedding_layer_norm"), TABLES),
    "linear": [{"rows": rows, "inputs": 77, "outputs": 53} for rows in (1, 5, 64)],
    "linear_epilogue": [
        {"rows": rows, "inputs": 77, "outputs": 53, "activation": activation, "residual": residual}
        for rows in (5, 64)
        for activation, residual in (("gelu", True), ("gelu", False), (None, True))
    ],
    "lora_linear": [{"rows": rows, "inputs": 77, "outputs": 53} for rows in (1, 5, 64)],
    "quantized_linear": [
        {"rows": rows, "inputs": 192, "outputs": 53, "bits": bits} for rows in (1, 5, 64) for bits in (8, 4)
    ],
    "quantized_linear_epilogue": [
        {"rows": rows, "inputs": 192, "outputs": 53, "bits": bits} for rows in (5, 64) for bits in (8, 4)
    ],
    "gguf_linear": [
        {"rows": rows, "inputs": 256, "outputs": 53, "kind": kind}
        for rows in (1, 20)
        for kind in ("Q5_0", "Q4_K", "Q6_K")
    ],
    "attention": [{**HEADS, "queries": 37, "keys": 37, "mask": mask} for mask in ("full", "causal")]
    + [{**HEADS, "queries": 5, "keys": 133, "mask": "causal"}, {**WIDE, "queries": 9, "keys": 19, "mask": "causal"}],
    "attention_window": [{**HEADS, "queries": 70, "keys": 70, "mask": 17}],
    "attention_decode": [{**HEADS, "queries": 1, "keys": 523, "mask": "full"}],
    "attention_latent": [{**HEADS, "queries": 37, "keys": 37, "mask": "causal", "value_dim": 24}],
    **dict.fromkeys(("attention_score_mod", "attention_score_mod_training"), MODS),
    "attention_terms": [{**TERMS, "term": term} for term in ("padding", "bias", "alibi")],
    "attention_bias": [{**TERMS, "term": "bias"}],
    **dict.fromkeys(("attention_blocks", "attention_blocks_training"), BLOCKS),
    **dict.fromkeys(("attention_softcap", "attention_dropout", "attention_key_ranges"), PAIRS),
    "attention_sinks": SINKS,
    "attention_packed": SEQUENCES,
    "merge_attention": [{"heads": 3, "queries": 37, "head_dim": 40}],
}  # fmt: skip


def _attention_reference(
    query, key, value, *, causal, softcap=None, sinks=None, dropout_p=0.0, dropout_seed=None,
    query_starts=None, key_starts=None, key_ends=None,
):  # fmt: skip
    seed = None if dropout_seed is None else torch.tensor(dropout_seed, device=query.device)
    return attention_reference.attention(
        query, key, value, None, 0 if causal else None, query.shape[3] ** -0.5, softcap, None, None, None, sinks,
        query_starts, key_starts, key_ends, seed, dropout_p,
    )  # fmt: skip


def _attention_plain(query, key, value, *, query_starts=None, key_starts=None, key_ends=None, **options):
    """Eager attention, sequence by sequence where they have bounds."""
    parts = attention_reference.sequences(query, key, query_starts, key_starts, key_ends)
    if not parts:
        return _eager(query, key, value, **options)
    results = [
        _eager(query[batch : batch + 1, :, rows], key[batch : batch + 1, :, keys], value[batch : batch + 1, :, keys],
               **options)
        for batch, rows, keys in parts
    ]  # fmt: skip
    out, lse = zip(*results, strict=True)
    dimension = 0 if query_starts is None else 2
    return torch.cat(out, dimension), torch.cat(lse, dimension)


def _eager(query, key, value, *, causal, softcap=None, sinks=None, dropout_p=0.0, dropout_seed=None):
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    mask = attention_reference.allowed(queries, keys, None, 0 if causal else None, query.device)
    factors = None
    if dropout_p:
        seed = torch.tensor(dropout_seed, device=query.device)
        factors = dropout.kept(seed, dropout_p, (batch, heads, queries, keys)).to(query.dtype) / (1 - dropout_p)
    return plain.attention(query, key, value, mask, head_dim**-0.5, softcap, (), sinks, factors)


def _attention(name, options, differentiable=()):
    """Attention in a batch of equal lengths; options(random, **shape) gives what it is called with besides."""

    def inputs(random, batch, heads, key_heads, queries, keys, head_dim):
        tensors = {"query": random(batch, heads, queries, head_dim), "causal": True}
        tensors |= {each: random(batch, key_heads, keys, head_dim) for each in ("key", "value")}
        return tensors | options(random, batch=batch, heads=heads, keys=keys)

    return _attention_operator(name, "{batch}x{heads}:{key_heads}x{queries}x{keys}x{head_dim}", inputs, differentiable)


def _attention_operator(name, shape, inputs, differentiable=()):
    operator = Operator(
        name=name,
        shape=shape,
        inputs=inputs,
        reference=_attention_reference,
        plain=_attention_plain,
        work={},
        kernels={"forward": "attention_inference", "training": "attention_backward"},
        differentiable=("query", "key", "value", *differentiable),
    )
    operator.implementation("nearpeak")(lambda **inputs: lambda: nearpeak.attention(**inputs, return_lse=True))


def _packed(random, heads, key_heads, head_dim, lengths):
    starts = torch.tensor([0, *map(int, lengths.split(","))]).cumsum(0).to(torch.int32)
    total = int(starts[-1])
    tensors = {"query": random(1, heads, total, head_dim), "causal": True}
    tensors |= {each: random(1, key_heads, total, head_dim) for each in ("key", "value")}
    return tensors | {"query_starts": starts, "key_starts": starts}


def _key_ranges(random, batch, heads, keys):
    return {"key_starts": torch.arange(batch), "key_ends": keys - torch.arange(batch), "causal": False}


_attention("attention_softcap", lambda random, **shape: {"softcap": 3.0})
_attention("attention_sinks", lambda random, batch, heads, keys: {"sinks": random(heads)}, differentiable=["sinks"])
_attention("attention_dropout", lambda random, **shape: {"dropout_p": 0.3, "dropout_seed": 7})
_attention("attention_key_ranges", _key_ranges)
_attention_operator("attention_packed", "{heads}:{key_heads}x({lengths})x{head_dim}", _packed)


def _parts(random, heads, queries, head_dim):
    def part(number):
        shape = 1, heads, queries
        return {f"out{number}": random(*shape, head_dim), f"lse{number}": random(*shape).float()}

    return part(1) | part(2)


def _merge_reference(out1, lse1, out2, lse2):
    weights = torch.softmax(torch.stack((lse1, lse2)), 0)[..., None]
    return weights[0] * out1 + weights[1] * out2, torch.logaddexp(lse1, lse2)


def _merge_plain(out1, lse1, out2, lse2):
    """As ring attention is written: https://github.com/zhuzilin/ring-flash-attention."""
    out = out1.float() - torch.sigmoid(lse2 - lse1)[..., None] * (out1.float() - out2.float())
    return out.to(out1.dtype), lse1 - F.logsigmoid(lse1 - lse2)


merge_attention = Operator(
    name="merge_attention",
    shape="{heads}x{queries}x{head_dim}",
    inputs=_parts,
    reference=_merge_reference,
    plain=_merge_plain,
    work={},
    kernels={"forward": "", "training": ""},
    differentiable=("out1", "lse1", "out2", "lse2"),
)
merge_attention.implementation("nearpeak")(lambda **inputs: lambda: nearpeak.merge_attention(**inputs))

swiglu_packed = Operator(
    name="swiglu_packed",
    shape="{rows}x{width}",
    inputs=lambda random, rows, width: {"packed": random(rows, 2 * width)},
    reference=lambda packed: feedforward_reference.packed_gated_activation(
        packed, feedforward_reference.NAMES.index("silu"), False
    ),
    plain=lambda packed: F.silu(packed.chunk(2, -1)[0]) * packed.chunk(2, -1)[1],
    work={},
    kernels={"forward": "packed_gated_activation_inference", "backward": "packed_gated_activation_backward"},
    differentiable=("packed",),
)
swiglu_packed.implementation("nearpeak")(lambda packed: lambda: nearpeak.swiglu(packed))


def _gemma_plain(x, weight):
    """As Hugging Face's transformers writes it."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (y * (1.0 + weight.float())).to(x.dtype)


rms_norm_gemma = Operator(
    name="rms_norm_gemma",
    shape="{rows}x{width}",
    inputs=lambda random, rows, width: {"x": random(rows, width), "weight": random(width)},
    reference=lambda x, weight: norm_reference.rms_norm(x, weight, EPS, 1.0, False),
    plain=_gemma_plain,
    work={},
    kernels={"forward": "rms_norm_inference", "backward": "rms_norm_backward"},
    differentiable=("x", "weight"),
)
rms_norm_gemma.implementation("nearpeak")(lambda x, weight: lambda: nearpeak.rms_norm(x, weight, EPS, offset=1.0))


qk_norm = Operator(
    name="qk_norm",
    shape="{heads}:{key_heads}x{sequence}x{head_dim}",
    inputs=lambda random, heads, key_heads, sequence, head_dim: {
        "query": random(2, sequence, heads, head_dim),
        "key": random(2, sequence, key_heads, head_dim),
        "query_weight": random(head_dim),
        "key_weight": random(head_dim),
    },
    reference=lambda query, key, query_weight, key_weight: norm_reference.qk_norm(
        query, key, query_weight, key_weight, EPS, 0.0, False
    ),
    plain=lambda query, key, query_weight, key_weight: (
        F.rms_norm(query, query.shape[3:], query_weight, EPS),
        F.rms_norm(key, key.shape[3:], key_weight, EPS),
    ),
    work={},
    kernels={"forward": "qk_norm_inference", "backward": "qk_norm_backward"},
    differentiable=("query", "key", "query_weight", "key_weight"),
)
qk_norm.implementation("nearpeak")(lambda **inputs: lambda: nearpeak.qk_norm(**inputs))


def _quantized_with_residual(random, rows, inputs, outputs, bits):
    codes, scales, _, _ = nearpeak.quantize_weight(random(outputs, inputs), bits)
    return {
        "x": random(rows, inputs),
        "codes": codes,
        "scales": scales,
        "bits": bits,
        "residual": random(rows, outputs),
    }


def _quantized_weight(codes, scales, bits):
    return nearpeak.QuantizedWeight(codes, scales, None, bits)


quantized_linear_epilogue = Operator(
    name="quantized_linear_epilogue",
    shape="{rows}x{inputs}x{outputs} {bits} bits",
    inputs=_quantized_with_residual,
    reference=lambda x, codes, scales, bits, residual: linear_reference.quantized_linear_epilogue(
        x, codes, scales, None, None, bits, residual, KINDS["gelu"], False
    )[0],
    plain=lambda x, codes, scales, bits, residual: (
        F.gelu(F.linear(x, _quantized_weight(codes, scales, bits).dequantize(x.dtype))) + residual
    ),
    work={},
    kernels={"forward": "quantized_linear_epilogue_inference", "training": "quantized_linear_epilogue"},
    differentiable=("x", "residual"),
)
quantized_linear_epilogue.implementation("nearpeak")(
    lambda x, codes, scales, bits, residual: (
        lambda: nearpeak.quantized_linear(
            x, _quantized_weight(codes, scales, bits), activation="gelu", residual=residual
        )
    )
)


def _turned(random, heads, key_heads, sequence, head_dim, rotary_dim):
    angles = torch.outer(1000.0 + torch.arange(sequence), 1e4 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim))
    query, key = random(1, heads, sequence, head_dim), random(1, key_heads, sequence, head_dim)
    return {"query": query, "key": key, "cos": angles.cos().to(query), "sin": angles.sin().to(query)}


def _rotary(name, rotary_dim_of, interleaved):
    """rotary_dim_of: how many of head_dim elements turn."""

    def inputs(random, head_dim, **shape):
        return _turned(random, head_dim=head_dim, rotary_dim=rotary_dim_of(head_dim), **shape)

    operator = Operator(
        name=name,
        shape="{heads}:{key_heads}x{sequence}x{head_dim}",
        inputs=inputs,
        reference=lambda query, key, cos, sin: rotary_reference.apply_rotary(
            query, key, cos, sin, interleaved, False, 2 * cos.shape[-1]
        ),
        plain=lambda query, key, cos, sin: plain.rotary(query, key, cos, sin, interleaved),
        work={},
        kernels={"forward": "apply_rotary_inference", "backward": "apply_rotary"},
        differentiable=("query", "key"),
    )
    operator.implementation("nearpeak")(
        lambda query, key, cos, sin: (
            lambda: nearpeak.apply_rotary(query, key, cos, sin, interleaved=interleaved, rotary_dim=2 * cos.shape[-1])
        )
    )
    return operator


apply_rotary_interleaved = _rotary("apply_rotary_interleaved", lambda head_dim: head_dim, True)
apply_rotary_partial = _rotary("apply_rotary_partial", lambda head_dim: head_dim // 4 * 2, False)
