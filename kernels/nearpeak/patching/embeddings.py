"""Embedding modules, recognised by what they compute:

    scaled    y = scale * weight[id]                                                              Gemma, T5Gemma, BART
    summed    y = dropout(LayerNorm(words[id] + positions[position] + segments[segment]))         BERT, ELECTRA

The scaled ones are subclasses of torch.nn.Embedding; the summed ones hold three of them under BERT's names. A candidate
is run on its own weights, and served where its result is the formula's. Plain torch.nn.Embedding modules are served
where gradients are recorded: without, they only copy.
"""

import copy
import functools

import torch
import torch.nn.functional as F

from ..embedding import embedding, layers
from ..embedding import reference as definition
from ..operators import widened
from . import probing
from .classes import serving_subclass

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
NORM, DROPOUT = "LayerNorm", "dropout"

# Of tokens, segments and positions, with which a candidate is run.
IDS = [[0, 5, 2], [3, 1, 1]], [[0, 1, 1], [1, 0, 1]], [[2, 0, 1], [5, 4, 3]]

SUMMED_DETAIL = "nearpeak.embedding with positions, segments and LayerNorm"
PLAIN_DETAIL = "nearpeak.embedding for training, torch's own copy of rows without gradients"


@functools.cache
def serving_plain(base: type) -> type:
    """The subclass of torch.nn.Embedding, or of a class that keeps its forward, that nearpeak serves."""

    def forward(self, input):
        return layers.rows_of(self, base.forward, input)

    return serving_subclass(base, forward, serving_plain, (base,))


@functools.cache
def serving_scaled(base: type, scale: float, dtype: torch.dtype) -> type:
    """The subclass of the scaled embedding class `base` that nearpeak serves while the weight is of `dtype`."""

    def forward(self, input_ids):
        if self.weight.dtype is not dtype:  # in another the scale may be rounded to another number
            return base.forward(self, input_ids)
        return embedding(input_ids, self.weight, scale=scale, padding_idx=self.padding_idx, sparse=self.sparse)

    return serving_subclass(base, forward, serving_scaled, (base, scale, dtype))


@functools.cache
def serving_summed(base: type) -> type:
    """The subclass of BERT's embedding class `base` that nearpeak serves; the modules in it are not called."""

    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, *others, **named):
        unlike = inputs_embeds is not None or any(others) or any(named.values())
        if input_ids is None or unlike or any(probing.is_hooked(child) for child in self.children()):
            return base.forward(self, input_ids, token_type_ids, position_ids, inputs_embeds, *others, **named)
        words, positions, segments = (getattr(self, name) for name in TABLES)
        norm, dropout = getattr(self, NORM), getattr(self, DROPOUT)
        return embedding(
            input_ids, words.weight, positions=positions.weight, position_ids=position_ids, segments=segments.weight,
            segment_ids=token_type_ids, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
            dropout_p=dropout.p if self.training else 0.0, padding_idx=words.padding_idx,
        )  # fmt: skip

    return serving_subclass(base, forward, serving_summed, (base,))


def served(module: torch.nn.Module) -> tuple[type | None, str] | None:
    """The class that serves the module, and what serves it; or None and why not; None if it is no embedding."""
    if isinstance(module, torch.nn.Embedding):
        return _served_table(module)
    if all(_copies_rows(getattr(module, name, None)) for name in TABLES) and _sums(module):
        return serving_summed(type(module)), SUMMED_DETAIL
    return None


def scale_of(module: torch.nn.Module) -> float | None:
    """The factor by which an embedding multiplies its rows; None of any other module."""
    if not isinstance(module, torch.nn.Embedding) or layers.is_torchs_own(module):
        return None
    if _copies_rows(module):
        return 1.0
    return None if module.weight.device.type == "meta" else _found_scale(module)


def _served_table(module: torch.nn.Embedding) -> tuple[type | None, str]:
    kind, weight = type(module), module.weight
    if layers.is_torchs_own(module):
        return None, "max_norm and scale_grad_by_freq are torch's own"
    if _copies_rows(module):
        return serving_plain(kind), PLAIN_DETAIL
    scale = scale_of(module)
    if scale is None:
        return None, "computes something else than a row, or a scaled one"
    return serving_scaled(kind, scale, weight.dtype), f"nearpeak.embedding, scale {scale:g}"


def _copies_rows(module: object) -> bool:
    return isinstance(module, torch.nn.Embedding) and type(module).forward is torch.nn.Embedding.forward


def _with_rows(module: torch.nn.Embedding, rows: torch.Tensor) -> torch.nn.Embedding:
    """The module with a few other rows."""
    stand_in = copy.copy(module)
    parameters = {"weight": torch.nn.Parameter(rows.to(module.weight.device), requires_grad=False)}
    vars(stand_in).update(_parameters=parameters, num_embeddings=len(rows), padding_idx=None)
    return stand_in


def _found_scale(module: torch.nn.Embedding) -> float | None:
    """The scale of which the module's result is scale * rows, rounded once; None if there is none."""
    dtype, width = module.weight.dtype, module.embedding_dim

    def result_of(rows):
        ids = torch.arange(len(rows), device=module.weight.device)
        return probing.run(type(module).forward, _with_rows(module, rows), ids)

    rows = probing.random(8, width).to(dtype)
    result = result_of(rows)
    # Gemma rounds the scale to the dtype, others do not.
    for kind in (dtype, torch.float32):
        ones = result_of(torch.ones(1, width, dtype=kind))
        if not isinstance(ones, torch.Tensor) or ones.numel() == 0:
            return None
        scale = ones.flatten()[0].item()
        expected = (widened(rows) * scale).to(dtype)
        if isinstance(result, torch.Tensor) and torch.equal(result.cpu(), expected):
            return scale
    return None


@torch.no_grad()
def _sums(module: torch.nn.Module) -> bool:
    """Whether the module computes BERT's sum, with positions and segments given and not."""
    norm, dropout = getattr(module, NORM, None), getattr(module, DROPOUT, None)
    if getattr(type(norm), "forward", None) is not torch.nn.LayerNorm.forward or not isinstance(
        dropout, torch.nn.Dropout
    ):
        return False
    device = getattr(module, TABLES[0]).weight.device
    if device.type == "meta" or len(norm.normalized_shape) != 1:
        return False
    width = norm.normalized_shape[0]
    tables = [probing.random(6, width, seed=seed) for seed in range(3)]
    weight, bias = probing.random(width, seed=3), probing.random(width, seed=4)
    # In place of its parts: small, of float32, and without their hooks.
    parts = {
        name: functools.partial(F.embedding, weight=table.to(device))
        for name, table in zip(TABLES, tables, strict=True)
    }
    parts[NORM] = functools.partial(
        F.layer_norm, normalized_shape=(width,), weight=weight.to(device), bias=bias.to(device), eps=norm.eps
    )
    parts[DROPOUT] = torch.nn.Identity()
    stand_in = copy.copy(module)
    vars(stand_in)["_modules"] = {**module._modules, **parts}
    ids, kinds, places = (torch.tensor(numbers, device=device) for numbers in IDS)
    found = [probing.run(type(module).forward, stand_in, *given) for given in ((ids,), (ids, kinds, places))]
    ids, kinds, places = (torch.tensor(numbers) for numbers in IDS)
    formula = weight, bias, 1.0, norm.eps, None, 0.0, -1, False
    expected = [
        definition.embedding(ids, tables[0], tables[1], position_ids, tables[2], segment_ids, *formula)
        for position_ids, segment_ids in ((None, None), (places, kinds))
    ]
    return all(
        isinstance(result, torch.Tensor) and probing.is_same(result.cpu(), y)
        for result, y in zip(found, expected, strict=True)
    )
