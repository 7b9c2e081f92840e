"""Rotary frequencies and tables: the numbers that transformers gives, for any positions."""

import math

import nearpeak
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

HEAD_DIM = 64
TRAINED = {"original_max_position_embeddings": 512}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED}
LONG = {
    "short_factor": [1 + i / 100 for i in range(HEAD_DIM // 2)],
    "long_factor": [1 + i for i in range(HEAD_DIM // 2)],
    **TRAINED,
}
# kind, its options, and how many positions the call has where the kind asks.
CASES = {
    "linear": ("linear", {"factor": 4.0}, None),
    "dynamic at first": ("dynamic", {"factor": 2.0}, None),
    "dynamic, short": ("dynamic", {"factor": 2.0}, 100),
    "dynamic, long": ("dynamic", {"factor": 2.0}, 5000),
    "yarn": ("yarn", {"factor": 4.0, **TRAINED}, None),
    "yarn, betas": ("yarn", {"factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, **TRAINED}, None),
    "yarn, mscale": ("yarn", {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.2, **TRAINED}, None),
    "yarn, one mscale": ("yarn", {"factor": 40.0, "mscale": 0.7, **TRAINED}, None),
    "yarn, attention factor": ("yarn", {"factor": 4.0, "attention_factor": 1.7, **TRAINED}, None),
    "yarn, not truncated": ("yarn", {"factor": 4.0, "truncate": False, **TRAINED}, None),
    "yarn, smaller": ("yarn", {"factor": 0.5, **TRAINED}, None),
    "yarn, one turn": ("yarn", {"factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False, **TRAINED}, None),
    "longrope at first": ("longrope", {"factor": 4.0, **LONG}, None),
    "longrope, short": ("longrope", {"factor": 4.0, **LONG}, 512),
    "longrope, long": ("longrope", {"factor": 4.0, **LONG}, 513),
    "longrope, smaller": ("longrope", {"factor": 0.5, **LONG}, None),
    "longrope, attention factor": ("longrope", {"attention_factor": 1.3, **LONG}, None),
    "llama3": ("llama3", LLAMA3, None),
    "proportional": ("proportional", {"proportion": 0.3}, None),
    "proportional, factor": ("proportional", {"proportion": 0.5, "factor": 3.0}, None),
    "proportional, all": ("proportional", {}, None),
}
THEIR_NAMES = {"proportion": "partial_rotary_factor"}
NEEDS_LENGTH = {"dynamic": {"max_position_embeddings": 2048}}


def their_config(kind, options, base):
    options = {THEIR_NAMES.get(name, name): value for name, value in options.items()}
    return transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": base, **options},
    )


def mine(kind, options, base, length):
    options = {**NEEDS_LENGTH.get(kind, {}), **options, **({} if length is None else {"sequence_length": length})}
    return nearpeak.rotary_frequencies(kind, rotary_dim=HEAD_DIM, base=base, **options)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_the_numbers_of_transformers(name, base):
    kind, options, length = CASES[name]
    theirs, their_factor = ROPE_INIT_FUNCTIONS[kind](their_config(kind, options, base), seq_len=length)
    frequencies, attention_factor = mine(kind, options, base, length)
    assert frequencies.dtype is torch.float32
    assert torch.equal(frequencies, theirs)
    assert attention_factor == their_factor


def test_every_kind_of_transformers_is_there():
    assert {*ROPE_INIT_FUNCTIONS} <= {kind for kind, *_ in CASES.values()}


POSITIONS = {
    "from zero": torch.arange(7),
    "behind a cache": 1000 + torch.arange(5),
    "one of a long text": torch.tensor([100_000]),
    "none": torch.arange(0),
    "ragged batch": torch.tensor([[40], [7], [1999]]) + torch.arange(3),
    "left padding": torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["default", "yarn", "llama3"])
def test_tables_are_those_of_transformers_at_any_positions(kind, positions, dtype):
    positions = POSITIONS[positions]
    options = {"default": {}, "yarn": CASES["yarn"][1], "llama3": LLAMA3}[kind]
    theirs = LlamaRotaryEmbedding(their_config(kind, options, 10000.0))
    expected = theirs(torch.empty(0, dtype=dtype), positions if positions.dim() == 2 else positions[None])
    tables = nearpeak.rotary_tables(positions, *mine(kind, options, 10000.0, None), dtype=dtype)
    for table, full in zip(tables, expected, strict=True):
        assert table.dtype is dtype
        assert torch.equal(table if positions.dim() == 2 else table[None], full[..., : HEAD_DIM // 2])


SECTIONED = {
    "Qwen2-VL": (Qwen2VLRotaryEmbedding, transformers.Qwen2VLTextConfig, [8, 12, 12], False),
    "Qwen3-VL": (Qwen3VLTextRotaryEmbedding, transformers.Qwen3VLTextConfig, [14, 10, 8], True),
    "Qwen3-VL, one stream most": (Qwen3VLTextRotaryEmbedding, transformers.Qwen3VLTextConfig, [30, 1, 1], True),
}


@pytest.mark.parametrize("name", SECTIONED)
def test_multi_section_tables_are_those_of_transformers(name):
    embedding, config, sections, interleaved = SECTIONED[name]
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    options = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "head_dim": HEAD_DIM}
    theirs = embedding(config(**options, rope_parameters=parameters))
    positions = torch.randint(2000, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    tables = nearpeak.rotary_tables(
        positions,
        *nearpeak.rotary_frequencies(rotary_dim=HEAD_DIM, base=1e6),
        sections=sections,
        interleaved_sections=interleaved,
    )
    for table, full in zip(tables, theirs(torch.empty(0), positions), strict=True):
        assert torch.equal(table, full[..., : HEAD_DIM // 2])


@pytest.mark.parametrize("interleaved", [False, True])
def test_equal_streams_are_one_stream(interleaved):
    frequencies = nearpeak.rotary_frequencies(rotary_dim=HEAD_DIM)
    positions = torch.arange(9).expand(3, 9)
    sections = {"sections": (10, 12, 10), "interleaved_sections": interleaved}
    tables = nearpeak.rotary_tables(positions, *frequencies, **sections)
    for table, expected in zip(tables, nearpeak.rotary_tables(positions[0], *frequencies), strict=True):
        assert torch.equal(table, expected)


def test_float64_frequencies_give_float64_arithmetic():
    frequencies = 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    cos, _ = nearpeak.rotary_tables(torch.arange(100), frequencies, 2.0, dtype=torch.float64)
    expected = 2 * torch.outer(torch.arange(100, dtype=torch.float64), frequencies).cos()
    torch.testing.assert_close(cos, expected, rtol=1e-15, atol=1e-15)


def test_tables_compile_without_graph_break():
    frequencies = nearpeak.rotary_frequencies(rotary_dim=HEAD_DIM)
    positions = torch.arange(27).reshape(3, 9)

    def call(positions):
        return nearpeak.rotary_tables(positions, *frequencies, sections=(8, 12, 12), interleaved_sections=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(compiled(positions), call(positions), strict=True):
        assert torch.equal(mine, expected)


def frequencies(kind="default", rotary_dim=8, **options):
    return lambda: nearpeak.rotary_frequencies(kind, rotary_dim=rotary_dim, **options)


P, F = torch.arange(5), torch.ones(4)


def tables(positions=P, frequencies=F, **options):
    return lambda: nearpeak.rotary_tables(positions, frequencies, **options)


BAD = {
    "kind": (ValueError, "kind must be one of default, linear", frequencies("ntk")),
    "rotary_dim_float": (TypeError, "rotary_dim must be an int", frequencies(rotary_dim=8.0)),
    "rotary_dim_odd": (ValueError, "rotary_dim must be even", frequencies(rotary_dim=7)),
    "rotary_dim_zero": (ValueError, "rotary_dim must be even", frequencies(rotary_dim=0)),
    "rotary_dim_dynamic": (ValueError, "rotary_dim", frequencies("dynamic", 2, factor=2.0, max_position_embeddings=9)),
    "base_zero": (ValueError, "base must be positive", frequencies(base=0.0)),
    "base_text": (TypeError, "base must be of numbers", frequencies(base="1e4")),
    "factor_missing": (TypeError, "factor must be given", frequencies("linear")),
    "factor_negative": (ValueError, "factor must be positive", frequencies("linear", factor=-1.0)),
    "factor_nan": (ValueError, "factor must be positive", frequencies("linear", factor=math.nan)),
    "factor_unknown": (TypeError, "factor is no option of default", frequencies(factor=2.0)),
    "proportion": (ValueError, "proportion must be at most 1", frequencies("proportional", proportion=1.5)),
    "low_freq_factor": (
        ValueError,
        "low_freq_factor must",
        frequencies("llama3", **{**LLAMA3, "low_freq_factor": 4.0}),
    ),
    "short_factor": (ValueError, "short_factor must", frequencies("longrope", factor=2.0, **LONG)),
    "longrope_factor": (ValueError, "factor must be given", frequencies("longrope", HEAD_DIM, **LONG)),
    "positions_list": (TypeError, "positions must", tables([1])),
    "positions_bool": (TypeError, "positions must", tables(P > 1)),
    "positions_0d": (ValueError, "positions must", tables(P[0])),
    "positions_3d": (ValueError, "positions must", tables(P[None, None])),
    "positions_meta": (ValueError, "positions must", tables(P.to("meta"))),
    "positions_unstacked": (ValueError, "positions must", tables(sections=(2, 2))),
    "frequencies_list": (TypeError, "frequencies must", tables(frequencies=[1.0])),
    "frequencies_half": (TypeError, "frequencies must", tables(frequencies=F.half())),
    "frequencies_2d": (ValueError, "frequencies must", tables(frequencies=F[None])),
    "sections_count": (ValueError, "sections must be 2", tables(P.expand(2, 5), sections=(1, 1, 2))),
    "sections_sum": (ValueError, "sections must", tables(P.expand(2, 5), sections=(2, 1))),
    "sections_negative": (ValueError, "sections must", tables(P.expand(2, 5), sections=(5, -1))),
    "dtype": (TypeError, "dtype must", tables(dtype=torch.int32)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()
