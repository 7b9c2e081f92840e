"""Positions: the published formulas, and the numbers that transformers gives."""

import math

import nearpeak
import pytest
import torch
from inputs import randn


def test_sinusoidal_positions_are_the_formula_of_2017():
    width, base = 10, 10000.0
    table = nearpeak.nn.SinusoidalPositions(width)(torch.zeros(50, width))
    for position in (0, 1, 7, 49):
        for i in range(width // 2):
            angle = position / base ** (2 * i / width)
            assert abs(float(table[position, 2 * i]) - math.sin(angle)) < 1e-5
            assert abs(float(table[position, 2 * i + 1]) - math.cos(angle)) < 1e-5


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_given_positions_are_taken_instead_of_counting(kind):
    layer = nearpeak.nn.SinusoidalPositions(8) if kind == "sinusoidal" else nearpeak.nn.LearnedPositions(20, 8)
    x = randn(2, 5, 8)
    whole = layer(x)
    assert torch.equal(layer(x[:, 3:], torch.arange(3, 5)), whole[:, 3:])
    order = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    shuffled = layer(x.gather(1, order[..., None].expand(x.shape)), order)
    assert torch.equal(shuffled, whole.gather(1, order[..., None].expand(x.shape)))
    assert layer(x.bfloat16()).dtype is torch.bfloat16


def test_learned_positions_are_an_embedding_that_is_added():
    layer = nearpeak.nn.LearnedPositions(20, 8)
    x, positions = randn(2, 5, 8), torch.tensor([3, 3, 0, 19, 1])
    y = layer(x, positions)
    assert torch.equal(y, x + layer.weight[positions])
    (gradient,) = torch.autograd.grad(y.sum(), layer.weight)
    assert torch.equal(gradient[:, 0], torch.bincount(positions, minlength=20) * 2.0)
    with pytest.raises(IndexError):
        layer(x, positions + 1)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 20, 33])
def test_alibi_slopes_are_blooms(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    alibi = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # slope times position, by head
    torch.testing.assert_close(nearpeak.nn.alibi_slopes(heads), alibi[:, 0, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("buckets", [32, 8])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_t5s(bidirectional, buckets):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    options = {"max_distance": 128, "bidirectional": bidirectional}
    distances = torch.arange(-400, 401)
    theirs = t5.T5Attention._relative_position_bucket(distances, num_buckets=buckets, **options)
    assert torch.equal(nearpeak.nn.relative_position_bucket(distances, buckets=buckets, **options), theirs)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_bias_is_t5s(decoder):
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(d_model=16, d_kv=4, num_heads=4, is_decoder=decoder)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    mine = nearpeak.nn.RelativePositionBias(4, bidirectional=not decoder)
    mine.load_state_dict(theirs.relative_attention_bias.state_dict())
    assert torch.equal(mine(150, 150), theirs.compute_bias(150, 150))
    assert torch.equal(mine(1, 150), mine(150, 150)[:, :, -1:])


X = torch.ones(2, 5, 8)
BAD = {
    "width_odd": (ValueError, "width must be even", lambda: nearpeak.nn.SinusoidalPositions(7)),
    "base": (ValueError, "base must be positive", lambda: nearpeak.nn.SinusoidalPositions(8, base=0.0)),
    "count": (ValueError, "count and width", lambda: nearpeak.nn.LearnedPositions(0, 8)),
    "x_int": (TypeError, "x must", lambda: nearpeak.nn.SinusoidalPositions(8)(X.int())),
    "x_width": (ValueError, "x must", lambda: nearpeak.nn.SinusoidalPositions(6)(X)),
    "positions_float": (TypeError, "positions must", lambda: nearpeak.nn.SinusoidalPositions(8)(X, torch.ones(5))),
    "positions_length": (ValueError, "positions must", lambda: nearpeak.nn.SinusoidalPositions(8)(X, torch.arange(4))),
    "heads_float": (TypeError, "heads must", lambda: nearpeak.nn.alibi_slopes(8.0)),
    "heads_zero": (ValueError, "heads must", lambda: nearpeak.nn.alibi_slopes(0)),
    "distances": (TypeError, "distances must", lambda: nearpeak.nn.relative_position_bucket(torch.ones(3))),
    "buckets": (ValueError, "buckets must", lambda: nearpeak.nn.RelativePositionBias(4, buckets=6)),
    "max_distance": (ValueError, "max_distance must", lambda: nearpeak.nn.RelativePositionBias(4, max_distance=8)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()
