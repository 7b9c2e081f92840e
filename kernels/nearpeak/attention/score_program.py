"""The definition of score programs: each instruction on whole tensors, in plain PyTorch."""

import torch

from .score_instructions import decoded


def _index(place, size, stride, base):
    """base + index * stride; -1 where the index, which may count from the end, lies outside, or one before did."""
    place = torch.where(place < 0, place + size, place)
    return torch.where((place >= 0) & (place < size) & (base >= 0), base + place * stride, -1)


def _loaded(tensor, place, outside):
    return torch.where(place >= 0, tensor.flatten()[place.clamp(min=0)], outside)


OF_VALUES = {
    "add": torch.add, "subtract": torch.sub, "multiply": torch.mul, "divide": torch.div, "minimum": torch.minimum,
    "maximum": torch.maximum, "negative": torch.neg, "absolute": torch.abs, "exp": torch.exp, "log": torch.log,
    "sqrt": torch.sqrt, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sin": torch.sin, "cos": torch.cos,
    "power": torch.pow, "floor": torch.floor, "select": torch.where, "less": torch.lt, "less_equal": torch.le,
    "equal": torch.eq, "add_integers": torch.add, "subtract_integers": torch.sub, "multiply_integers": torch.mul,
    "floor_divide": torch.floor_divide, "remainder": torch.remainder, "minimum_integers": torch.minimum,
    "maximum_integers": torch.maximum, "negative_integer": torch.neg, "absolute_integer": torch.abs,
    "less_integers": torch.lt, "less_equal_integers": torch.le, "equal_integers": torch.eq,
    "select_integers": torch.where, "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor,
    "not": torch.logical_not, "to_integer": lambda x: x.long(), "truth_to_integer": lambda x: x.long(),
}  # fmt: skip
OPERANDS = {"select": 3, "select_integers": 3} | {
    name: 1
    for name in (
        "negative", "absolute", "exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos", "floor", "negative_integer",
        "absolute_integer", "not", "to_float", "truth_to_float", "to_integer", "truth_to_integer",
    )
}  # fmt: skip


def run(program, tensors, scores, first, derivative=False):
    """The new scores, and with `derivative` their derivative with respect to the old ones.

    scores: (batch, key heads, group, query length, key length). first: the batch entry, row and key that the first ones
    are counted as. program: as a tensor, or its rows.
    """
    *rows, last = program.tolist() if isinstance(program, torch.Tensor) else program
    values = [scores, *_places(scores, first)]
    for row in rows if derivative else rows[: last[2]]:
        values.append(_step(values, tensors, scores, *decoded(row)))
    new = values[last[0]].to(scores.dtype).expand_as(scores)
    return (new, values[last[1]].to(scores.dtype).expand_as(scores)) if derivative else new


def _places(scores, first):
    """The numbers of batch entry, head, query and key, to broadcast against the scores."""
    batch, key_heads, group, queries, keys = scores.shape
    of_batch, of_query, of_key = (
        torch.arange(begin, begin + size, device=scores.device)
        for begin, size in zip(first, (batch, queries, keys), strict=True)
    )
    heads = torch.arange(key_heads * group, device=scores.device).view(key_heads, group, 1, 1)
    return of_batch.view(-1, 1, 1, 1, 1), heads, of_query[:, None], of_key


def _step(values, tensors, scores, name, operands):
    if name == "constant":
        return torch.full((), operands[0], dtype=scores.dtype, device=scores.device)
    if name == "integer":
        return torch.full((), operands[0], dtype=torch.int64, device=scores.device)
    if name == "index":
        index, size, stride, base = operands
        return _index(values[index], size, stride, values[base])
    if name == "load":
        return _loaded(tensors[operands[0]].to(scores.dtype), values[operands[1]], float("nan"))
    if name == "load_integer":
        return _loaded(tensors[operands[0]].long(), values[operands[1]], 0)
    if name in ("to_float", "truth_to_float"):
        return values[operands[0]].to(scores.dtype)
    return OF_VALUES[name](*(values[number] for number in operands[: OPERANDS.get(name, 2)]))
