"""Cases in the shapes of real models."""

import json

import pytest
import torch
from nearpeak_bench import published, shapes, suites
from toys import CPU, invoke


def names(model, suite, dtype="float32"):
    return [case.name for case in shapes.cases((model,))[suite] if case.dtype_name == dtype]


@pytest.mark.parametrize("model", published.CONFIGS)
def test_every_published_model_has_cases_of_each_step(model):
    made = shapes.cases((model,))
    layer = shapes.layer_of(model)
    assert bool(made["rotary"]) == layer.rotary
    for suite in ("norm", "feedforward", "linear", "attention"):
        directions = {case.direction for case in made[suite]}
        assert directions == {"forward", "training" if suite == "attention" else "backward"}
        assert any(case.quick for case in made[suite])
        assert {case.dtype for case in made[suite]} == set(shapes.DTYPES)
    everything = [case.name for cases in made.values() for case in cases]
    assert len(everything) == len(set(everything))


def test_llama_has_its_published_dimensions():
    assert "rms_norm-1024x4096-float32-forward" in names("llama3-8b", "norm")
    assert "rms_norm-1x4096-float32-forward" in names("llama3-8b", "norm")
    assert "apply_rotary-32:8x1024x128-transposed-float32-backward" in names("llama3-8b", "rotary")
    assert "swiglu-1024x14336-float32-backward" in names("llama3-8b", "feedforward")
    assert "linear-1x4096x128256-float32-forward" in names("llama3-8b", "linear")
    assert names("llama3-8b", "attention") == [
        "attention-32:8x1024x128-causal-float32-forward",
        "attention-32:8x1024x128-causal-float32-training",
        "attention_decode-32:8x4096x128-float32-forward",
    ]


def test_models_that_differ_in_kind_get_what_they_have():
    assert not [name for name in names("bert-base", "attention") if "decode" in name]
    assert "attention-12:12x512x64-full-float32-forward" in names("bert-base", "attention")
    assert "post_layer_norm-512x768-float32-forward" in names("bert-base", "norm")
    assert "relu-512x3072-float32-forward" in names("t5-base", "feedforward")
    assert "attention_bias-1x12x512x64-bias-float32-training" in names("t5-base", "attention")
    assert "gelu_tanh-1024x3072-float32-forward" in names("gpt2", "feedforward")
    assert "attention_window-4:1x1024x256-window-512-float32-forward" in names("gemma3-270m", "attention")
    assert "attention_latent-128:1x1x4096x576-512-full-float32-forward" in names("deepseek-v3", "attention")
    assert "linear-1x512x32768-float32-forward" in names("deepseek-v3", "linear")


def tiny(**changes):
    """A Llama that is small enough to compute."""
    return {**published.CONFIGS["llama3-8b"], "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 8, **changes}  # fmt: skip


LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, LATENT], ids=["llama", "window", "latent"])
def test_cases_of_a_config_compute_what_their_operator_defines(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": tiny(**changes)}))
    made = shapes.cases((str(tmp_path),))
    for case in (case for cases in made.values() for case in cases if case.dtype is torch.float32):
        inputs = case.inputs(CPU)
        ours = case.bind(case.operator.implementations["nearpeak"].prepare, inputs)()
        ours = ours if isinstance(ours, tuple) else (ours,)
        for mine, exact in zip(ours, case.truth(inputs), strict=True):
            torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)
        assert case.work().flops > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(None, "choose from llama3-8b, gemma3-270m", id="no file"),
        pytest.param("{", "this is no JSON", id="no json"),
        pytest.param("[]", "is an object", id="no object"),
        pytest.param("{}", "the config has no hidden_size or n_embd or d_model", id="empty"),
        pytest.param(json.dumps(tiny(hidden_act="mish")), "activation 'mish' has no case", id="activation"),
        pytest.param(json.dumps(tiny(hidden_size="wide")), "must be a positive integer, not 'wide'", id="type"),
    ],
)
def test_wrong_shapes_get_one_line_that_says_what_to_do(toy_suite, tmp_path, config, message):
    if config is not None:
        (tmp_path / "mine.json").write_text(config)
    result = invoke("bench", "--shapes", "mine.json")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_shapes_replace_the_cases_of_all_suites(toy_suite, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    suites.restore(suites.State([], (str(tmp_path / "config.json"),)))
    assert suites.find("swiglu-8x48-bfloat16-forward").operator.name == "swiglu"
    assert suites.SUITES["overhead"] == []
    result = invoke("bench", "norm", "--shapes", "config.json", "--filter", "nothing")
    assert result.exit_code == 2
    assert "no case of norm matches" in result.stderr
