"""Embeddings: Gemma's, a scaled row of each token, and BERT's, three tables summed and normalised; also backward."""

import nearpeak
import torch
import torch.nn.functional as F
from nearpeak.embedding import reference

from .cases import Case, Operator, Work, compiled

EPS = 1e-12
LENGTH = 128  # tokens of a sequence, where there are so many
SCALE = 25.25  # sqrt(640) as bfloat16 has it
WORDS = {"rows": 32000, "width": 640}
BERT = {"rows": 30522, "width": 768}
TOKENS = [1, 128, 2048]


def _ids(random, tokens, rows):
    """(sequences, length), drawn evenly from the rows."""
    return (random(tokens).double() * 1e6).long().remainder(rows).view(-1, min(tokens, LENGTH))


def scaled(token_ids, weight):
    return F.embedding(token_ids, weight) * SCALE


def bert(token_ids, segment_ids, weight, positions, segments, norm_weight, norm_bias):
    hidden = F.embedding(token_ids, weight) + F.embedding(segment_ids, segments)
    hidden = hidden + F.embedding(torch.arange(token_ids.shape[-1], device=token_ids.device), positions)
    return F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias, EPS)


def _tables_of_bert(random, tokens, rows, width):
    return {
        "token_ids": _ids(random, tokens, rows),
        "segment_ids": _ids(random, tokens, 2),
        "weight": random(rows, width),
        "positions": random(512, width),
        "segments": random(2, width),
        "norm_weight": random(width),
        "norm_bias": random(width),
    }


embedding = Operator(
    name="embedding",
    shape="{tokens} of {rows}x{width}",
    inputs=lambda random, tokens, rows, width: {
        "token_ids": _ids(random, tokens, rows),
        "weight": random(rows, width),
    },
    reference=lambda token_ids, weight: reference.embedding(
        token_ids, weight, *[None] * 6, SCALE, None, None, 0.0, -1, False
    ),
    plain=scaled,
    work={
        "forward": lambda tokens, rows, width: Work(tokens * width, tokens * width, tokens * width),
        "backward": lambda tokens, rows, width: Work(tokens * width, tokens * width, rows * width),
    },
    kernels={"forward": "embedding_inference", "backward": "embedding_table_gradient"},
    differentiable=("weight",),
)


@embedding.implementation("nearpeak")
def _(token_ids, weight):
    return lambda: nearpeak.embedding(token_ids, weight, scale=SCALE)


@embedding.implementation("F.embedding", baseline=True)
def _(token_ids, weight):
    return lambda: scaled(token_ids, weight)


@embedding.implementation("torch.compile", baseline=True, compiled=True)
def _(token_ids, weight):
    function = compiled(scaled)
    return lambda: function(token_ids, weight)


embedding_layer_norm = Operator(
    name="embedding_layer_norm",
    shape="{tokens} of {rows}x{width}",
    inputs=_tables_of_bert,
    reference=lambda token_ids, segment_ids, weight, positions, segments, norm_weight, norm_bias: reference.embedding(
        token_ids,
        weight,
        positions,
        None,
        segments,
        segment_ids,
        norm_weight,
        norm_bias,
        1.0,
        EPS,
        None,
        0.0,
        -1,
        False,
    ),
    plain=bert,
    work={
        "forward": lambda tokens, rows, width: Work(10 * tokens * width, tokens * width, tokens * width),
        "backward": lambda tokens, rows, width: Work(20 * tokens * width, 2 * tokens * width, rows * width),
    },
    kernels={"forward": "embedding_inference", "backward": "embedding_hidden_gradient"},
    differentiable=("weight", "positions", "segments", "norm_weight", "norm_bias"),
)


@embedding_layer_norm.implementation("nearpeak")
def _(token_ids, segment_ids, weight, positions, segments, norm_weight, norm_bias):
    return lambda: nearpeak.embedding(
        token_ids, weight, positions=positions, segments=segments, segment_ids=segment_ids,
        norm_weight=norm_weight, norm_bias=norm_bias, eps=EPS,
    )  # fmt: skip


@embedding_layer_norm.implementation("eager", baseline=True)
def _(**inputs):
    return lambda: bert(**inputs)


@embedding_layer_norm.implementation("torch.compile", baseline=True, compiled=True)
def _(**inputs):
    function = compiled(bert)
    return lambda: function(**inputs)


def _cases():
    for operator, sizes in ((embedding, WORDS), (embedding_layer_norm, BERT)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tokens in TOKENS:
                quick = (tokens, dtype) in ((1, torch.float32), (2048, torch.float32), (2048, torch.bfloat16))
                yield Case(operator, {"tokens": tokens, **sizes}, dtype, quick=quick)
            yield Case(operator, {"tokens": 2048, **sizes}, dtype, "backward", quick=dtype is torch.float32)


CASES = list(_cases())
