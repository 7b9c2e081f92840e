"""Our Triton kernels as their launchers launch them: the cases that `nearpeak inspect` and the compile tests share."""

import itertools

import torch
from nearpeak import triton_launch
from nearpeak.activations import KINDS
from nearpeak.attention import triton_attention
from nearpeak.embedding import triton_embedding
from nearpeak.feedforward import reference as feedforward
from nearpeak.feedforward import triton_feedforward
from nearpeak.linear import triton_quantized
from nearpeak.norm import triton_norm, triton_qk_norm
from nearpeak.rotary import triton_rotary

from .compiling import Case


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def norm_case(width: int, dtype: torch.dtype, direction: str, layer: str = "rms_norm", rows: int = 8192) -> Case:
    """direction: "forward", "add" (with a residual) or "backward"; layer: "rms_norm" or "layer_norm"."""
    x, weight = _empty(rows, width, dtype=dtype), _empty(width, dtype=dtype)
    launch = {
        "rms_norm": {
            "forward": lambda: triton_norm.rms_norm(x, weight, 1e-6, 0.0, False),
            "add": lambda: triton_norm.add_rms_norm(x, x, weight, 1e-6, 1.0, False),
            "backward": lambda: triton_norm.rms_norm_backward(x, x, weight, x, 1e-6, 1.0),
        },
        "layer_norm": {
            "forward": lambda: triton_norm.layer_norm(x, weight, weight, 1e-5),
            "add": lambda: triton_norm.add_layer_norm(x, x, weight, weight, 1e-5),
            "backward": lambda: triton_norm.layer_norm_backward(x, x, weight, weight, x, 1e-5),
        },
    }[layer][direction]
    wide = width * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0
    return Case(f"{layer} {direction} {width} {_name(dtype)}", launch, wide=wide)


def qk_norm_case(head_dim: int, dtype: torch.dtype, direction: str, length: int = 2048) -> Case:
    """direction: "forward" or "backward"; heads lie as slices of a packed projection."""
    packed, weight = _empty(1, length, 48, head_dim, dtype=dtype), _empty(head_dim, dtype=dtype)
    query, key = packed[:, :, :32], packed[:, :, 32:40]
    launch = {
        "forward": lambda: triton_qk_norm.qk_norm(query, key, weight, weight, 1e-6, 0.0, False),
        "backward": lambda: triton_qk_norm.qk_norm_backward(query, key, query, key, weight, weight, 1e-6, 0.0),
    }[direction]
    wide = head_dim * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0
    return Case(f"qk_norm {direction} {head_dim} {_name(dtype)}", launch, wide=wide)


def rotary_case(
    head_dim: int, dtype: torch.dtype, interleaved: bool, length: int = 2048, rotary_dim: int | None = None
) -> Case:
    turned = rotary_dim or head_dim
    query, key = _empty(1, 32, length, head_dim, dtype=dtype), _empty(1, 8, length, head_dim, dtype=dtype)
    table = _empty(1, length, turned // 2, dtype=torch.float32)
    pairs = "interleaved" if interleaved else "halves"
    widths = head_dim if turned == head_dim else f"{turned} of {head_dim}"
    # The pairs of one position alone are fewer than 16 bytes for each thread of a warp.
    wide = length > 1 and turned // 2 * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0
    return Case(
        f"rotary {pairs} {widths} {_name(dtype)} {length} positions",
        lambda: triton_rotary.apply_rotary(query, key, table, table, interleaved, False, turned),
        wide=wide,
    )


def feedforward_case(width: int, dtype: torch.dtype, name: str, direction: str) -> Case:
    """direction: "forward" or "backward", of one packed tensor of gate and up."""
    packed, grad, kind = (
        _empty(512, 2 * width, dtype=dtype),
        _empty(512, width, dtype=dtype),
        feedforward.NAMES.index(name),
    )
    launch = {
        "forward": lambda: triton_feedforward.packed_gated_activation(packed, kind, False),
        "backward": lambda: triton_feedforward.packed_gated_activation_backward(grad, packed, kind, False),
    }[direction]
    wide = width * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0
    return Case(f"feedforward {name} {direction} {width} {_name(dtype)}", launch, wide=wide)


EMBEDDING_DIRECTIONS = ("forward", "forward dropped", "backward", "backward dropped", "table")


def embedding_case(width: int, dtype: torch.dtype, direction: str, rows: int = 30522) -> Case:
    """direction: "forward" or "backward", of three tables and a norm, and "dropped" from; or "table"."""
    ids, seed = _empty(16, 128, dtype=torch.int64), _empty(1, dtype=torch.int64)
    words, positions, segments = (_empty(count, width, dtype=dtype) for count in (rows, 512, 2))
    weight, grad = _empty(width, dtype=dtype), _empty(16, 128, width, dtype=dtype)
    bert = ids, words, positions, None, segments, ids, weight, weight, 1.0, 1e-12
    launch = {
        "forward": lambda: triton_embedding.embedding(*bert, None, 0.0, -1, False),
        "forward dropped": lambda: triton_embedding.embedding(*bert, seed, 0.1, -1, False),
        "backward": lambda: triton_embedding.hidden_gradient(grad, *bert, None, 0.0),
        "backward dropped": lambda: triton_embedding.hidden_gradient(grad, *bert, seed, 0.1),
        "table": lambda: triton_embedding.table_gradient(grad.flatten(0, 1), ids, rows, 1.0, 0),
    }[direction]
    # The kernel that hashes rows for dropout reads and writes one number a thread.
    wide = width * dtype.itemsize % triton_launch.WIDEST_ACCESS == 0 and "dropped" not in direction
    return Case(f"embedding {direction} {width} {_name(dtype)}", launch, wide=wide)


def quantized_linear_case(
    rows: int,
    dtype: torch.dtype,
    bits: int,
    group_size: int = 64,
    symmetric: bool = True,
    bias: bool = False,
    activation: str | None = None,
) -> Case:
    """Of Llama 3 8B's 4096 x 4096; rows: of x; activation: with a residual behind it and what it is of before it."""
    width, columns = 4096, 4096
    x = _empty(rows, width, dtype=dtype)
    codes = _empty(columns, width * bits // 8, dtype=torch.uint8)
    scales = _empty(columns, width // group_size, dtype=torch.float32)
    zeros = None if symmetric else _empty(*scales.shape, dtype=torch.uint8)
    offsets = _empty(columns, dtype=dtype) if bias else None
    residual = None if activation is None else _empty(rows, columns, dtype=dtype)
    epilogue = residual, None if activation is None else KINDS[activation], activation is not None
    options = f"{' zeros' * (not symmetric)}{' bias' * bias}{'' if activation is None else f' {activation}'}"
    return Case(
        f"quantized_linear {bits} bits in {group_size} {_name(dtype)} {rows} rows{options}",
        lambda: triton_quantized.quantized_linear_epilogue(x, codes, scales, zeros, offsets, bits, *epilogue),
        matrix=dtype.itemsize == 2,
    )


def _options(window, softcap) -> str:
    """What differs from a causal call."""
    return "".join((f" window {window}" if window != (None, 0) else "", f" softcap {softcap}" if softcap else ""))


def attention_case(
    head_dim: int, dtype: torch.dtype, length: int = 4096, window=(None, 0), softcap=None, group: int = 4
) -> Case:
    """Causal by default; length 1 is decoding, with split keys and their merge."""
    query = _empty(1, 32, length, head_dim, dtype=dtype)
    key = _empty(1, 32 // group, 4096, head_dim, dtype=dtype)
    return Case(
        f"attention {head_dim} {_name(dtype)} {length} queries{_options(window, softcap)}",
        lambda: triton_attention.attention(query, key, key, *window, head_dim**-0.5, softcap),
        matrix=dtype.itemsize == 2,
    )


def attention_backward_case(
    head_dim: int, dtype: torch.dtype, window=(None, 0), softcap=None, group: int = 4, length: int = 4096
) -> Case:
    """Causal by default."""
    query, lse = _empty(1, 32, length, head_dim, dtype=dtype), _empty(1, 32, length, dtype=torch.float32)
    key = _empty(1, 32 // group, length, head_dim, dtype=dtype)
    return Case(
        f"attention backward {head_dim} {_name(dtype)} group {group}{_options(window, softcap)}",
        lambda: triton_attention.attention_backward(
            query, lse, query, key, key, query, lse, *window, head_dim**-0.5, softcap
        ),
        matrix=dtype.itemsize == 2,
    )


def every_case() -> list[Case]:
    """Every kernel, at widths on both sides of each decision of the launchers."""
    single, bfloat = torch.float32, torch.bfloat16
    norms = [
        norm_case(width, dtype, direction, layer)
        for layer in ("rms_norm", "layer_norm")
        for direction in ("forward", "add", "backward")
        for dtype in (bfloat, single)
        for width in (64, 640, 4096, 8192, 16384, 32768, 65536)
    ]
    rotaries = [
        rotary_case(head_dim, dtype, interleaved, length)
        for interleaved in (False, True)
        for dtype in (bfloat, single)
        for head_dim in (64, 128, 256)
        for length in (2048, 1)
    ]
    norms += [
        qk_norm_case(head_dim, dtype, direction)
        for direction in ("forward", "backward")
        for dtype in (bfloat, single)
        for head_dim in (64, 128, 256)
    ]
    options = {"window": ((None, None), (None, 0), (512, 0)), "softcap": (None, 50.0)}
    attentions = [
        attention_case(head_dim, dtype, length, window, softcap)
        for dtype in (bfloat, single)
        for head_dim in (64, 128, 256)
        for window, softcap in itertools.product(*options.values())
        for length in (4096, 1)
    ]
    backwards = [
        attention_backward_case(head_dim, dtype, window, softcap)
        for dtype in (bfloat, single)
        for head_dim in (64, 128, 256)
        for window, softcap in itertools.product(*options.values())
    ]
    feedforwards = [
        feedforward_case(width, dtype, name, direction)
        for name in ("gelu", "silu")
        for direction in ("forward", "backward")
        for dtype in (bfloat, single)
        for width in (14336, 2050)
    ]
    quantized = [
        quantized_linear_case(rows, dtype, bits, group_size, symmetric=False, bias=True)
        for dtype in (bfloat, single)
        for bits in (8, 4)
        for group_size in (32, 64, 128)
        for rows in (1, 64, 512)
    ]
    embeddings = [
        embedding_case(width, dtype, direction)
        for direction in EMBEDDING_DIRECTIONS
        for dtype in (bfloat, single)
        for width in (384, 770, 8192 // dtype.itemsize)
    ]
    half = torch.float16
    odd = [norm_case(4096, half, "backward"), rotary_case(128, half, False)]
    odd += [rotary_case(80, bfloat, interleaved, rotary_dim=32) for interleaved in (False, True)]
    odd += [attention_case(head_dim, half) for head_dim in (16, 32, 80, 96, 128)]
    odd += [attention_backward_case(head_dim, half) for head_dim in (16, 80)]
    odd += [attention_backward_case(128, bfloat, group=group) for group in (1, 7)]
    odd += [quantized_linear_case(64, half, bits) for bits in (8, 4)]
    return norms + rotaries + feedforwards + embeddings + quantized + attentions + backwards + odd


def common_cases() -> list[Case]:
    """Each family at the shapes that models have most often."""
    bfloat = torch.bfloat16
    return [
        *(norm_case(4096, bfloat, direction) for direction in ("forward", "add", "backward")),
        *(norm_case(4096, bfloat, direction, "layer_norm") for direction in ("forward", "backward")),
        rotary_case(128, bfloat, False),
        *(feedforward_case(14336, bfloat, "silu", direction) for direction in ("forward", "backward")),
        *(embedding_case(768, bfloat, direction) for direction in ("forward", "backward", "table")),
        *(quantized_linear_case(rows, bfloat, 4) for rows in (1, 512)),
        *(attention_case(head_dim, bfloat) for head_dim in (64, 128)),
        attention_case(128, bfloat, length=1),
        attention_backward_case(128, bfloat),
    ]


FAMILIES = {
    "norm": ("rms_norm", "layer_norm", "qk_norm"),
    "rotary": ("rotary",),
    "feedforward": ("feedforward",),
    "embedding": ("embedding",),
    "linear": ("quantized_linear",),
    "attention": ("attention",),
}


def family_of(case: Case) -> str:
    """The family that a case belongs to, by the first word of its name."""
    return next(family for family, words in FAMILIES.items() if case.name.split()[0] in words)
