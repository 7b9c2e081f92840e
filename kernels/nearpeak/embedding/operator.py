"""The torch operators of embeddings, and their public function.

Backward takes two steps. The gradient of `hidden`, the sum of the tables' rows, is made token by token; where there is
neither norm nor dropout it is the incoming gradient. Then each table's rows add up the gradients of the tokens that
took them, always in the order of the tokens: no atomics, and the same bits on every run.
"""

import torch

from .. import backends, dropout, operators
from ..checks import check_floating, check_parameter, check_same
from . import reference

if backends.missing("triton") is None:
    from . import triton_embedding as triton_kernels
else:
    triton_kernels = None


def _check(
    ids, weight, positions, position_ids, segments, segment_ids, norm_weight, norm_bias, scale, eps,
    dropout_seed, dropout_p, padding_idx=-1, sparse=False,
):  # fmt: skip
    _check_ids("token_ids", ids)
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must be (rows, width), of at least one column, not shape {tuple(weight.shape)}")
    if ids.device != weight.device:
        raise ValueError(f"token_ids must be on weight's device, {weight.device}, not {ids.device}")
    for name, table, of_table in (("position", positions, position_ids), ("segment", segments, segment_ids)):
        if table is not None:
            check_same(f"{name}s", table, "weight", weight, "dtype", "device")
            if table.dim() != 2 or table.shape[1] != weight.shape[1]:
                raise ValueError(f"{name}s must be (rows, {weight.shape[1]}), not shape {tuple(table.shape)}")
        if of_table is not None:
            _check_ids(f"{name}_ids", of_table)
            if table is None:
                raise ValueError(f"{name}_ids are of no use without {name}s")
            if of_table.shape != ids.shape[ids.dim() - of_table.dim() :] or of_table.device != ids.device:
                raise ValueError(f"{name}_ids must have token_ids' last dimensions, of {tuple(ids.shape)}, and device")
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_parameter(name, parameter, weight, "weight")
        if parameter is not None and eps is None:
            raise ValueError(f"eps must be given with {name}: without it nothing is normalised")
    if norm_weight is not None and norm_bias is not None and norm_weight.dtype is not norm_bias.dtype:
        raise TypeError(f"norm_bias must have norm_weight's dtype, {norm_weight.dtype}, not {norm_bias.dtype}")
    dropout.check_drawn(dropout_p, dropout_seed, weight.device)


def _check_ids(name, ids):
    if not isinstance(ids, torch.Tensor) or ids.dtype is not torch.int64:
        what = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of int32 or int64, not {what}")


def _check_rows(ids, weight, positions, position_ids, segments, segment_ids):
    """Check, on CPUs alone (GPUs would have to be waited for), that every id has a row in its table."""
    if position_ids is None and positions is not None and reference.position_numbers(ids).numel() > len(positions):
        raise IndexError(f"positions must have a row for each of {ids.shape[-1]} positions, not {len(positions)}")
    named = ("token_ids", ids, weight), ("position_ids", position_ids, positions)
    for name, of_table, table in (*named, ("segment_ids", segment_ids, segments)):
        if of_table is None or of_table.device.type != "cpu" or of_table.numel() == 0:
            continue
        low, high = (int(bound) for bound in of_table.aminmax())
        if low < 0 or high >= len(table):
            raise IndexError(f"{name} must be from 0 to {len(table) - 1}, its table's rows, not from {low} to {high}")


def _check_hidden_gradient(grad, ids, weight, *arguments):
    _check(ids, weight, *arguments)
    check_same("grad", grad, "weight", weight, "dtype", "device")
    if grad.shape != (*ids.shape, weight.shape[1]):
        raise ValueError(f"grad must have shape {(*ids.shape, weight.shape[1])}, not {tuple(grad.shape)}")


def _check_table_gradient(d_hidden, ids, rows, scale, padding_idx):
    check_floating("d_hidden", d_hidden)
    _check_ids("ids", ids)
    if d_hidden.dim() != 2 or d_hidden.shape[0] % max(1, ids.numel()) or (ids.numel() == 0) != (len(d_hidden) == 0):
        raise ValueError(f"d_hidden must be (tokens, width), tokens a multiple of the {ids.numel()} ids")


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.eps, seed, ctx.dropout_p, ctx.padding_idx, ctx.sparse = inputs
    ctx.save_for_backward(*tensors, seed)


def _gradient(ctx, grad):
    *tensors, seed = ctx.saved_tensors
    ids, weight, positions, position_ids, segments, segment_ids, norm_weight, norm_bias = tensors
    d_hidden, d_norm_weight, d_norm_bias = grad.reshape(ids.numel(), weight.shape[1]), None, None
    if ctx.eps is not None or ctx.dropout_p > 0.0:
        formula = ctx.scale, ctx.eps, seed, ctx.dropout_p
        d_hidden, d_norm_weight, d_norm_bias = _hidden_gradient(grad, *tensors, *formula)
    d_weight = d_positions = d_segments = None
    if ctx.needs_input_grad[1]:
        of_table = _sparse_gradient if ctx.sparse else _table_gradient
        d_weight = of_table(d_hidden, ids, weight.shape[0], ctx.scale, ctx.padding_idx)
    if positions is not None and ctx.needs_input_grad[2]:
        taken = reference.position_numbers(ids) if position_ids is None else position_ids
        d_positions = _table_gradient(d_hidden, taken, positions.shape[0], 1.0, -1)
    if segments is not None and ctx.needs_input_grad[4]:
        taken = ids.new_zeros(min(1, ids.numel())) if segment_ids is None else segment_ids
        d_segments = _table_gradient(d_hidden, taken, segments.shape[0], 1.0, -1)
    return (
        None, d_weight, d_positions, None, d_segments, None,
        None if norm_weight is None else d_norm_weight, None if norm_bias is None else d_norm_bias, *[None] * 6,
    )  # fmt: skip


def _sparse_gradient(d_hidden, ids, rows, scale, padding_idx):
    """The rows that are not zero, each once."""
    taken, places = ids.flatten().unique(return_inverse=True)
    values = _table_gradient(d_hidden, places, len(taken), scale, -1)
    if padding_idx >= 0:
        others = taken != padding_idx
        taken, values = taken[others], values[others]
    return torch.sparse_coo_tensor(
        taken[None], values, (rows, values.shape[1]), is_coalesced=True, check_invariants=False
    )


FORMULA = "float scale, float? eps, Tensor? dropout_seed, float dropout_p"
TENSORS = (
    "Tensor ids, Tensor weight, Tensor? positions, Tensor? position_ids, Tensor? segments, Tensor? segment_ids, "
    "Tensor? norm_weight, Tensor? norm_bias"
)

operators.define(
    f"embedding({TENSORS}, {FORMULA}, int padding_idx, bool sparse) -> Tensor",
    check=_check,
    reference=reference.embedding,
    shapes=lambda ids, weight, *_: weight.new_empty((*ids.shape, weight.shape[1])),
    triton=triton_kernels and triton_kernels.embedding,
    backward=_gradient,
    setup_context=_save,
)
operators.define(
    f"embedding_hidden_gradient(Tensor grad, {TENSORS}, {FORMULA}) -> (Tensor, Tensor, Tensor)",
    check=_check_hidden_gradient,
    reference=reference.hidden_gradient,
    shapes=lambda grad, ids, weight, positions, position_ids, segments, segment_ids, norm_weight, norm_bias, *_: (
        grad.new_empty(ids.numel(), weight.shape[1]),
        *(weight.new_empty(0) if p is None else torch.empty_like(p) for p in (norm_weight, norm_bias)),
    ),
    triton=triton_kernels and triton_kernels.hidden_gradient,
)
operators.define(
    "embedding_table_gradient(Tensor d_hidden, Tensor ids, SymInt rows, float scale, int padding_idx) -> Tensor",
    check=_check_table_gradient,
    reference=reference.table_gradient,
    shapes=lambda d_hidden, ids, rows, *_: d_hidden.new_empty(rows, d_hidden.shape[1]),
    triton=triton_kernels and triton_kernels.table_gradient,
)

_embedding = torch.ops.nearpeak.embedding.default
_embedding_inference = torch.ops.nearpeak.embedding_inference.default
_hidden_gradient = torch.ops.nearpeak.embedding_hidden_gradient.default
_table_gradient = torch.ops.nearpeak.embedding_table_gradient.default


def embedding(
    token_ids, weight, *, scale=1.0, positions=None, position_ids=None, segments=None, segment_ids=None,
    norm_weight=None, norm_bias=None, eps=None, dropout_p=0.0, dropout_seed=None, padding_idx=None, sparse=False,
):  # fmt: skip
    """Token embedding, with positions, segments, layer normalisation and dropout in the same pass.

        hidden = scale * weight[token_id] + positions[position_id] + segments[segment_id]
        y      = dropout(hidden)                                                 without eps
        y      = dropout((hidden - mean(hidden)) / sqrt(variance(hidden) + eps) * norm_weight + norm_bias)

    Args:
        token_ids: any shape, int32 or int64.
        weight: (rows, width), float32, bfloat16, float16 or float64.
        scale: of the token's row alone; sqrt(width) in Transformers whose output layer shares the weight.
        positions: (rows, width) in weight's dtype; None for none.
        position_ids: which of their rows each token takes, of a shape that broadcasts to token_ids'; None counts from 0
            along token_ids' last dimension.
        segments: (rows, width) in weight's dtype; None for none.
        segment_ids: as position_ids; None is segment 0 for every token.
        norm_weight, norm_bias: (width,), in weight's dtype or float32; None for none.
        eps: of the normalisation; None for no normalisation.
        dropout_p: the chance of an element to be dropped, 0 <= dropout_p < 1; the others are multiplied by
            1 / (1 - dropout_p).
        dropout_seed: which elements: an integer of 64 bits, or an int64 tensor without dimensions on weight's device;
            None draws one from torch's generator of that device. Seed, token and feature decide: see dropout.py.
        padding_idx: a row of weight that gets no gradient.
        sparse: whether weight's gradient is a sparse tensor, for optimisers that take one.

    Returns:
        y, of token_ids' shape and width, in weight's dtype. Gradients are deterministic, and nothing is saved for them
        but the arguments.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or value that does not fit. IndexError: an id
        without a row in its table (on CPUs; a GPU makes NaN of such tokens, and spares waiting for it).

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.4; Devlin et al. 2018,
    https://arxiv.org/abs/1810.04805, figure 2. CUDA C++ kernels do not exist.

    >>> token_ids, words = torch.tensor([[5, 3, 8], [2, 2, 0]]), torch.randn(10, 64)
    >>> y = nearpeak.embedding(token_ids, words, scale=64**0.5)
    >>> positions, segments, weight, bias = torch.randn(512, 64), torch.randn(2, 64), torch.ones(64), torch.zeros(64)
    >>> y = nearpeak.embedding(
    ...     token_ids, words, positions=positions, segments=segments, norm_weight=weight, norm_bias=bias, eps=1e-12
    ... )
    """
    tensors = token_ids, weight, positions, position_ids, segments, segment_ids
    norm = norm_weight, norm_bias
    try:
        token_ids = _as_int64(token_ids)
        position_ids, segment_ids = _fitted(position_ids, token_ids), _fitted(segment_ids, token_ids)
        tensors = token_ids, weight, positions, position_ids, segments, segment_ids
        if dropout_p != 0.0 or dropout_seed is not None:
            dropout_seed = dropout.seed_of(dropout_p, dropout_seed, weight.device)
        padding = -1 if padding_idx is None else _row_number(padding_idx, weight)
        if backends.reference_serves(weight, kernels=backends.WITHOUT_CUDA):
            _check(*tensors, *norm, scale, eps, dropout_seed, dropout_p)
            serve = reference.embedding
        elif operators.wants_gradient(weight, positions, segments, *norm):
            serve = _embedding
        else:
            serve = _embedding_inference
        return serve(*tensors, *norm, scale, eps, dropout_seed, dropout_p, padding, sparse)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check(*tensors, *norm, scale, eps, dropout_seed, dropout_p)
        _check_rows(*tensors)
        raise


def _as_int64(ids):
    return ids.long() if isinstance(ids, torch.Tensor) and ids.dtype is torch.int32 else ids


def _fitted(ids, token_ids):
    """Of token_ids' last dimensions, where it broadcasts to its shape."""
    if not isinstance(ids, torch.Tensor):
        return ids
    ids = _as_int64(ids)
    while ids.dim() > 0 and ids.shape[0] == 1 and (ids.dim() > token_ids.dim() or token_ids.shape[-ids.dim()] > 1):
        ids = ids[0]
    if ids.shape == token_ids.shape[token_ids.dim() - ids.dim() :]:
        return ids
    try:
        return ids.expand_as(token_ids)
    except RuntimeError:  # the check says what of it does not fit
        return ids


def _row_number(row, weight):
    """Counted from the end where it is negative, as torch.nn.functional.embedding has it."""
    if not -len(weight) <= row < len(weight):
        raise ValueError(f"padding_idx must be one of weight's {len(weight)} rows, not {row}")
    return row % len(weight)
