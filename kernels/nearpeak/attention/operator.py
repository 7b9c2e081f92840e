"""The torch operators of attention, and its full public function.

Backward recomputes the probabilities from lse: block by block in the C++ and Triton kernels, in memory that grows with
the length of the sequence; elsewhere by the reference's formula in plain PyTorch, which holds the scores of the whole
sequence.
"""

import math

import torch

from .. import backends, dropout, operators
from ..checks import check_dense_last, check_float_of, check_floating, check_same_kind
from . import block_mask as block_masks
from . import reference
from . import score_mod as score_mods

if backends.missing("triton") is None:
    from . import triton_attention as triton_kernels
else:
    triton_kernels = None

MAX_HEAD_DIM = 576
OPEN = (None, None)


def _shapes(query, key, value, *options):
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return operators.empty_laid_out_like(query, value.shape[-1]), lse


def _backward_shapes(
    grad_out, grad_lse, query, key, value, out, lse, window_left, window_right, scale, softcap,
    mask=None, bias=None, alibi_slopes=None, sinks=None,
    query_starts=None, key_starts=None, key_ends=None, dropout_seed=None, dropout_p=0.0,
    score_program=None, score_tensors=None, bias_gradient=False,
):  # fmt: skip
    d_bias = bias.new_empty(bias.shape) if bias_gradient else query.new_empty(0)
    return *(operators.empty_laid_out_like(t) for t in (query, key, value)), d_bias


def _save_for_attention(ctx, inputs, output):
    _save(ctx, inputs[:3], (), inputs[3:], output)


def _save_for_attention_blocks(ctx, inputs, output):
    _save(ctx, inputs[:3], inputs[3:6], inputs[6:], output)


def _save(ctx, tensors, blocks, options, output):
    ctx.options, terms, ctx.dropout_p = options[:4], options[4:12], options[12]
    score_program, score_tensors = options[13:]
    ctx.saved_blocks = len(blocks)
    ctx.save_for_backward(*tensors, *output, *terms, *blocks, score_program, *(score_tensors or ()))
    ctx.set_materialize_grads(False)


def _attention_gradient(ctx, grad_out, grad_lse):
    query, key, value, out, lse, *rest = ctx.saved_tensors
    terms, blocks = rest[:8], rest[8 : 8 + ctx.saved_blocks]
    score_program, *score_tensors = rest[8 + ctx.saved_blocks :]
    _, bias, _, sinks, *_ = terms
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # The dispatcher drops trailing arguments that have their default.
    of_bias = bias is not None and ctx.needs_input_grad[8 + len(blocks)]
    of_sinks = sinks is not None and ctx.needs_input_grad[10 + len(blocks)]
    backward = torch.ops.nearpeak.attention_blocks_backward if blocks else torch.ops.nearpeak.attention_backward
    *gradients, d_bias = backward(
        grad_out, grad_lse, query, key, value, out, lse, *blocks, *ctx.options, *terms, ctx.dropout_p,
        score_program, score_tensors, of_bias,
    )  # fmt: skip
    d_sinks = reference.sinks_gradient(grad_out, grad_lse, out, lse, sinks) if of_sinks else None
    return *gradients, *[None] * (5 + len(blocks)), d_bias if of_bias else None, None, d_sinks, *[None] * 7


def _check(
    query, key, value, mask=None, bias=None, alibi_slopes=None, sinks=None,
    query_starts=None, key_starts=None, key_ends=None,
):  # fmt: skip
    check_floating("query", query)
    check_same_kind("key", key, "query", query)
    check_same_kind("value", value, "query", query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, sequence, head_dim), not shape {tuple(tensor.shape)}")
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim of 1 to {MAX_HEAD_DIM}, not {tensor.shape[3]}")
    batch, heads, _, head_dim = query.shape
    key_batch, key_heads, _, key_dim = key.shape
    if key_batch != batch or key_dim != head_dim:
        raise ValueError(f"key must have query's batch {batch} and head_dim {head_dim}, not shape {tuple(key.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must have key's shape {tuple(key.shape)} but for head_dim, not {tuple(value.shape)}")
    if (key_heads == 0 and heads > 0) or (key_heads > 0 and heads % key_heads):
        raise ValueError(f"key must have a number of heads that divides query's {heads}, not {key_heads}")
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        check_dense_last("query", query)
        check_dense_last("key", key)
        check_dense_last("value", value)
    _check_terms(query, key, mask, bias, alibi_slopes, sinks)
    for name, bounds in (("query_starts", query_starts), ("key_starts", key_starts), ("key_ends", key_ends)):
        if bounds is not None:
            _check_bounds(name, bounds, query)
    if query_starts is not None and key_starts is None:
        raise ValueError("key_starts must be given beside query_starts")


def _check_bounds(name, bounds, query):
    if not isinstance(bounds, torch.Tensor) or bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be a tensor of int32 or int64")
    if bounds.dim() != 1 or bounds.device != query.device:
        raise ValueError(f"{name} must have one dimension, and query's device {query.device}")


def _check_terms(query, key, mask, bias, alibi_slopes, sinks):
    batch, heads = query.shape[:2]
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
            raise TypeError("mask must be a boolean tensor, True where a query may look at a key")
        _check_pairs("mask", mask, query, key)
    if bias is not None:
        check_float_of("bias", bias, query)
        _check_pairs("bias", bias, query, key)
    if alibi_slopes is not None:
        check_float_of("alibi_slopes", alibi_slopes, query)
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must have the shape ({heads},) or ({batch}, {heads}), not {tuple(alibi_slopes.shape)}"
            )
    if sinks is not None:
        check_float_of("sinks", sinks, query)
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"sinks must have the shape ({heads},), not {tuple(sinks.shape)}")


def _check_pairs(name, tensor, query, key):
    full = (*query.shape[:3], key.shape[2])
    fits = tensor.dim() == 4 and all(size in (1, whole) for size, whole in zip(tensor.shape, full, strict=True))
    if not fits or tensor.device != query.device:
        raise ValueError(f"{name} must broadcast to {full} on {query.device}, not {tuple(tensor.shape)}")


def _check_window(window):
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) of integers or None, not {window!r}")
    for side in window:
        if side is not None and not isinstance(side, (int, torch.SymInt)):
            raise ValueError(f"window must be a pair (left, right) of integers or None, not {window!r}")


def _check_softcap(softcap):
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"softcap must be positive and finite, or None for no softcap, not {softcap!r}")


def _check_forward(
    query, key, value, window_left, window_right, scale, softcap,
    mask=None, bias=None, alibi_slopes=None, sinks=None, query_starts=None, key_starts=None, key_ends=None,
    dropout_seed=None, dropout_p=0.0, score_program=None, score_tensors=None,
):  # fmt: skip
    _check(query, key, value, mask, bias, alibi_slopes, sinks, query_starts, key_starts, key_ends)
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is not None and tensor.shape[3] != key.shape[2]:
            raise ValueError(f"{name} must hold an element per key, {key.shape[2]}, not {tensor.shape[3]}")
    _check_softcap(softcap)
    score_mods.check(score_program, score_tensors, query.device)
    dropout.check_drawn(dropout_p, dropout_seed, query.device)


def _check_backward(
    grad_out, grad_lse, query, key, value, out, lse, window_left, window_right, scale, softcap,
    mask=None, bias=None, alibi_slopes=None, sinks=None,
    query_starts=None, key_starts=None, key_ends=None, dropout_seed=None, dropout_p=0.0,
    score_program=None, score_tensors=None, bias_gradient=False,
):  # fmt: skip
    terms = mask, bias, alibi_slopes, sinks, query_starts, key_starts, key_ends
    terms = *terms, dropout_seed, dropout_p, score_program, score_tensors
    _check_forward(query, key, value, window_left, window_right, scale, softcap, *terms)
    if bias_gradient and bias is None:
        raise ValueError("bias must be given where its gradient is asked for")
    for name, tensor in (("out", out), ("grad_out", grad_out)):
        check_same_kind(name, tensor, "query", query)
        if tensor.shape != (*query.shape[:3], value.shape[3]):
            raise ValueError(f"{name} must have query's shape with value's head_dim, not {tuple(tensor.shape)}")
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        if tensor is not None and (tensor.shape != query.shape[:3] or tensor.device != query.device):
            raise ValueError(f"{name} must have query's shape without head_dim, and its device")


def _blocks_backward_shapes(
    grad_out, grad_lse, query, key, value, out, lse, block_starts, block_entries, block_bits, *options
):
    return _backward_shapes(grad_out, grad_lse, query, key, value, out, lse, *options)


def _check_blocks(query, key, value, block_starts, block_entries, block_bits, *options):
    _check_forward(query, key, value, *options)
    _check_tables(query, key, block_starts, block_entries, block_bits)


def _check_blocks_backward(
    grad_out, grad_lse, query, key, value, out, lse, block_starts, block_entries, block_bits, *options
):
    _check_backward(grad_out, grad_lse, query, key, value, out, lse, *options)
    _check_tables(query, key, block_starts, block_entries, block_bits)


def _check_tables(query, key, *tables):
    block_masks.check(block_masks.BlockMask(*tables, query.shape[2], key.shape[2]), query, key)


OPTIONS = (
    "SymInt? window_left, SymInt? window_right, float scale, float? softcap, "
    "Tensor? mask=None, Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, "
    "Tensor? query_starts=None, Tensor? key_starts=None, Tensor? key_ends=None, "
    "Tensor? dropout_seed=None, float dropout_p=0.0, Tensor? score_program=None, Tensor[]? score_tensors=None"
)

operators.define(
    f"attention(Tensor query, Tensor key, Tensor value, {OPTIONS}) -> (Tensor, Tensor)",
    check=_check_forward,
    reference=reference.attention,
    shapes=_shapes,
    triton=triton_kernels and triton_kernels.attention,
    backward=_attention_gradient,
    setup_context=_save_for_attention,
)
operators.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {OPTIONS}, bool bias_gradient=False) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    reference=reference.attention_backward,
    shapes=_backward_shapes,
    triton=triton_kernels and triton_kernels.attention_backward,
)

# The same with a block mask (block_mask.py). On CPU in the kernels, elsewhere in plain PyTorch.
BLOCKS = "Tensor block_starts, Tensor block_entries, Tensor block_bits"
operators.define(
    f"attention_blocks(Tensor query, Tensor key, Tensor value, {BLOCKS}, {OPTIONS}) -> (Tensor, Tensor)",
    check=_check_blocks,
    reference=reference.attention_blocks,
    shapes=_shapes,
    backward=_attention_gradient,
    setup_context=_save_for_attention_blocks,
)
operators.define(
    "attention_blocks_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {BLOCKS}, {OPTIONS}, bool bias_gradient=False) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_blocks_backward,
    reference=reference.attention_blocks_backward,
    shapes=_blocks_backward_shapes,
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_attention = torch.ops.nearpeak.attention.default
_attention_inference = torch.ops.nearpeak.attention_inference.default
_attention_blocks = torch.ops.nearpeak.attention_blocks.default
_attention_blocks_inference = torch.ops.nearpeak.attention_blocks_inference.default


def mask_and_bias(attn_mask):
    """`attention`'s options for what others pass as one tensor: boolean, or to be added; None for none."""
    if attn_mask is None:
        return None, None
    return (attn_mask, None) if attn_mask.dtype is torch.bool else (None, attn_mask)


def of_all_keys(pairs, key):
    """A mask or bias in four dimensions, the last of them whole."""
    if not isinstance(pairs, torch.Tensor) or pairs.dim() > 4:
        return pairs
    pairs = pairs[(None,) * (4 - pairs.dim())]
    return pairs if pairs.shape[3] != 1 else pairs.expand(*pairs.shape[:3], key.shape[2])


def _serving_blocks(*differentiable):
    """What serves a call with a block mask."""
    query = differentiable[0]
    if backends.reference_serves(query, kernels=("cpu",)):
        return reference.attention_blocks
    if query.device.type != "cpu":
        backends.because("block masks have no kernel for GPUs: plain PyTorch serves them")
    return _attention_blocks if operators.wants_gradient(*differentiable) else _attention_blocks_inference


def attention(
    query, key, value, *, causal=False, window=OPEN, scale=None, softcap=None,
    mask=None, block_mask=None, mask_mod=None, score_mod=None, bias=None, alibi_slopes=None, sinks=None,
    dropout_p=0.0, dropout_seed=None, query_starts=None, key_starts=None, key_ends=None, return_lse=False,
):  # fmt: skip
    """Attention: softmax(scale query key^T) value, without ever holding the scores of a whole sequence.

        scores = scale * query key^T;   scores = softcap * tanh(scores / softcap)
        scores = score_mod(scores, batch, head, query, key)
        scores = scores + bias - alibi_slope |p - k|, and -inf where a mask forbids
        out    = drop(exp(scores - lse)) value,   lse = log(exp(sink) + sum(exp(scores)))

    Row i of query stands at position p = i + (key length - query length), so that the last query sees the last
    key, as a KV cache needs. A row that may look at no key gives zeros and lse = -inf (its sink, if there is one).

    Args:
        query: (batch, heads, query length, head_dim), float32, bfloat16, float16 or float64; head_dim 1..576; any
            strides with a dense last dimension, and `out` is laid out in memory as query is.
        key: (batch, key heads, key length, head_dim), query's dtype. key heads must divide query's heads
            (grouped-query attention): query head h reads key head h // (heads / key heads).
        value: key's shape, but with a head_dim of its own if need be, which is then that of `out`.
        causal: only keys at positions <= p.
        window: (left, right), only keys at p - left .. p + right; None leaves a side open.
        scale: None means 1 / sqrt(head_dim).
        softcap: None for none.
        mask: boolean, True where a query may look at a key; broadcasts to (batch, heads, query length, key length).
        block_mask: a `nearpeak.BlockMask` (see `nearpeak.create_block_mask`), or torch's, which is converted at every
            call: blocks of keys that none of a block of queries may look at cost nothing. It counts queries and keys
            in the tensors. On CPU in the kernels, on GPUs in plain PyTorch.
        mask_mod: a function of (batch, head, query, key), the numbers of a score's places in the tensors, that returns
            False where the query may not look at the key; asked in the kernels, key by key, where a block_mask is
            asked once, and spares what it hides.
        score_mod: a function of (score, batch, head, query, key) that returns the new score: `trace_score_mod` says
            what it may do. Functions are traced at each call, which takes milliseconds: pass a `ScoreMod` where that
            counts, and under torch.compile.
        bias: added to the scores; broadcasts likewise. query's dtype, or float32. It gets a gradient.
        alibi_slopes: (heads,) or (batch, heads), the slope of each head; query's dtype, or float32. No gradient.
        sinks: (heads,), the score of one more key per head, whose value is zero. It gets a gradient.
        dropout_p: the chance of a weight to be dropped, 0 <= dropout_p < 1 in steps of 2^-32; the others are multiplied
            by 1 / (1 - dropout_p). lse is that of all weights.
        dropout_seed: which weights: an integer of 64 bits, or an int64 tensor without dimensions on query's device;
            None draws one from torch's generator of that device, for torch.manual_seed to set. Seed, head, batch entry,
            row and column (of the tensors as they are given, packed or not) decide, and nothing else: the same weights
            on every backend and machine.
        query_starts, key_starts: (sequences + 1,) int32 or int64, where each sequence of a packed batch begins, and
            where the last one ends: sequences of different lengths lie one behind the other, in a batch of 1, and
            none looks at another. Positions count within a sequence. query_starts begins with 0 and ends with the
            query length. Known as cu_seqlens elsewhere.
        key_starts, key_ends: without query_starts, (batch,), of each batch entry the keys that there are, as in a
            padded batch or a cache that is not full. With query_starts, key_ends (sequences,) says where each
            sequence's keys end if not where the next one's begin.
        return_lse: also return lse.

    Returns:
        out, query's shape (with value's head_dim) and dtype; or with `return_lse` the pair (out, lse), lse being the
        natural logarithm in float32 (float64 for float64), of shape (batch, heads, query length). Gradients flow
        through both.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device, stride or option that does not fit.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; online softmax: Milakov and Gimelshein 2018,
    https://arxiv.org/abs/1805.02867; tiling: Dao 2023, https://arxiv.org/abs/2307.08691; ALiBi: Press et al. 2021,
    https://arxiv.org/abs/2108.12409; sinks: Xiao et al. 2023, https://arxiv.org/abs/2309.17453; dropout: dropout.py.

    >>> query, key = torch.randn(1, 8, 10, 64), torch.randn(1, 2, 100, 64)
    >>> out, lse = nearpeak.attention(query, key, key, causal=True, window=(64, None), return_lse=True)
    >>> starts = torch.tensor([0, 30, 100])  # two sequences of 30 and 70 keys, of which 3 and 7 are queries
    >>> out = nearpeak.attention(query, key, key, query_starts=torch.tensor([0, 3, 10]), key_starts=starts)
    >>> out = nearpeak.attention(query, key, key, dropout_p=0.1, dropout_seed=7)
    >>> out = nearpeak.attention(query, key, key, score_mod=lambda score, b, h, q, k: score - 0.1 * (k - q).abs())
    >>> out = nearpeak.attention(query, key, key, mask_mod=lambda b, h, q, k: (q // 4 == k // 40) | (k < 5))
    >>> padding = torch.arange(100) < torch.tensor([90])[:, None]  # (batch, key length), True for tokens
    >>> out = nearpeak.attention(query, key, key, mask=padding[:, None, None], bias=torch.randn(8, 10, 100))
    """
    if window is not OPEN:
        _check_window(window)
    if softcap is not None:
        _check_softcap(softcap)
    blocks = ()
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    try:
        if scale is None:
            scale = 1.0 / math.sqrt(query.shape[-1])
        if mask is not None:
            mask = of_all_keys(mask, key)
        if bias is not None:
            bias = of_all_keys(bias, key)
        if dropout_p != 0.0 or dropout_seed is not None:
            dropout_seed = dropout.seed_of(dropout_p, dropout_seed, query.device)
        score_rows = score_program = score_tensors = None
        if score_mod is not None or mask_mod is not None:
            score_rows, score_program, score_tensors = score_mods.of_functions(score_mod, mask_mod)
        if block_mask is not None:
            _check(query, key, value, mask, bias, alibi_slopes, sinks, query_starts, key_starts, key_ends)
            block_mask = block_masks.fitted(block_mask, query, key)
            blocks = block_mask[:3]
            serve = _serving_blocks(query, key, value, bias, sinks)
        elif backends.reference_serves(query, kernels=backends.WITHOUT_CUDA):
            _check(query, key, value, mask, bias, alibi_slopes, sinks, query_starts, key_starts, key_ends)
            serve, score_program = reference.attention, score_rows  # numbers, which compilers see
        elif operators.wants_gradient(query, key, value, bias, sinks):
            serve = _attention
        else:
            serve = _attention_inference
        out, lse = serve(
            query, key, value, *blocks, left, right, scale, softcap,
            mask, bias, alibi_slopes, sinks, query_starts, key_starts, key_ends, dropout_seed, dropout_p,
            score_program, score_tensors,
        )  # fmt: skip
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError):
        _check(query, key, value, mask, bias, alibi_slopes, sinks, query_starts, key_starts, key_ends)
        reference.sequences(query, key, query_starts, key_starts, key_ends)
        if blocks:
            block_masks.check_lists(*blocks, key.shape[2])
        raise
    return (out, lse) if return_lse else out
