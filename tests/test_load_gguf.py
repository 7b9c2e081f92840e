"""A transformers model with a GGUF file's weights computes what it does with the same weights dequantised."""

import nearpeak
import pytest
import torch
from gguf_blocks import random_blocks
from inputs import randn
from tiny_models import Operators, logits_of, transformers

gguf = pytest.importorskip("gguf")

SIZES = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
MODELS = {
    "llama": lambda tied: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied)
    ),
    "gemma3": lambda tied: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, **HEADS, tie_word_embeddings=tied)
    ),
}
# What the model calls its tensors, and the file; and in which type of blocks each is.
NAMES = {
    "self_attn.q_proj": ("attn_q", "Q5_0"),
    "self_attn.k_proj": ("attn_k", "Q8_0"),
    "self_attn.v_proj": ("attn_v", "Q6_K"),
    "self_attn.o_proj": ("attn_output", "Q4_K"),
    "mlp.gate_proj": ("ffn_gate", "Q4_0"),
    "mlp.up_proj": ("ffn_up", "Q5_K"),
    "mlp.down_proj": ("ffn_down", "Q4_K"),
}
NORMS = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    },
}


def reordered(rows, heads):
    """llama.cpp's order of Llama's query and key rows: in each head, the halves' rows in turn."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class File:
    """Writes a file, and keeps what the model's parameters are to be."""

    def __init__(self, path, architecture, model):
        self.writer = gguf.GGUFWriter(path, architecture)
        self.path, self.architecture, self.expected = path, architecture, {}
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def add_blocks(self, name, stored_name, kind):
        blocks = random_blocks(kind, *self.shapes[name], seed=len(self.expected), magnitude=0.1)
        self.expected[name] = nearpeak.GgufWeight(blocks, kind).dequantize()
        if self.architecture == "llama" and "attn_q" in stored_name:
            blocks = reordered(blocks, HEADS["num_attention_heads"])
        if self.architecture == "llama" and "attn_k" in stored_name:
            blocks = reordered(blocks, HEADS["num_key_value_heads"])
        self.writer.add_tensor(stored_name, blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])

    def add_norm(self, name, stored_name):
        weight = randn(*self.shapes[name], seed=len(self.expected))
        self.expected[name] = weight
        stored = weight + 1 if self.architecture == "gemma3" else weight
        self.writer.add_tensor(stored_name, stored.numpy())

    def close(self):
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(self.writer, step)()
        return self.path


def write(path, architecture, model, tied, without=(), kinds=None):
    file = File(path, architecture, model)
    file.add_blocks("model.embed_tokens.weight", "token_embd.weight", "Q8_0")
    if not tied:
        file.add_blocks("lm_head.weight", "output.weight", "Q6_K")
    file.add_norm("model.norm.weight", "output_norm.weight")
    for layer in range(SIZES["num_hidden_layers"]):
        for name, (stored_name, kind) in NAMES.items():
            if stored_name not in without:
                kind = (kinds or {}).get(stored_name, kind)
                file.add_blocks(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{stored_name}.weight", kind)
        for name, stored_name in NORMS[architecture].items():
            file.add_norm(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{stored_name}.weight")
    file.writer.add_tensor("rope_freqs.weight", randn(32).numpy())
    return file.close(), file.expected


def with_floats(architecture, tied, expected):
    model = MODELS[architecture](tied).eval()
    missing = model.load_state_dict(expected, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", MODELS)
def test_logits_are_those_of_the_dequantised_weights(tmp_path, architecture, tied, serving):
    model = MODELS[architecture](tied).eval()
    path, expected = write(tmp_path / "toy.gguf", architecture, model, tied)
    report = nearpeak.load_gguf(model, path)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 5))
    plain = with_floats(architecture, tied, expected)
    with Operators() as operators:
        found = logits_of(model, ids)
    assert operators.count("gguf_linear") == 15 * (serving != "reference")
    torch.testing.assert_close(found, logits_of(plain, ids), rtol=1e-4, atol=1e-4)
    with nearpeak.patched(model):
        torch.testing.assert_close(logits_of(model, ids), logits_of(plain, ids), rtol=1e-4, atol=1e-4)

    assert len(report.in_blocks) == 15 + (not tied)
    assert {tensor.kind for tensor in report.as_floats} == {"float32"}
    assert report.not_used == ("rope_freqs.weight",)
    assert "Q4_K" in str(report)
    assert "not used: rope_freqs.weight" in str(report)
    if tied:
        assert model.lm_head.blocks.data_ptr() == model.model.embed_tokens.blocks.data_ptr()


def test_other_parameters_keep_their_dtype(tmp_path):
    model = MODELS["gemma3"](True).to(torch.bfloat16)
    path, _ = write(tmp_path / "toy.gguf", "gemma3", model, True)
    nearpeak.load_gguf(model, path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits_of(model, torch.tensor([[1, 2, 3]])).dtype is torch.bfloat16


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    model = MODELS["llama"](True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modules = list(model.modules())

    def refused(message, path, error=ValueError, of=model):
        with pytest.raises(error, match=message):
            nearpeak.load_gguf(of, path)
        assert list(model.modules()) == modules
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    complete, _ = write(tmp_path / "complete.gguf", "llama", model, True)
    lacking, _ = write(tmp_path / "lacking.gguf", "llama", model, True, without=("ffn_up",))
    refused(r"holds nothing for the model's model.layers.0.mlp.up_proj.weight: no blk.0.ffn_up.weight", lacking)
    refused("model must be a transformers model, not Linear", complete, TypeError, torch.nn.Linear(3, 3))
    smaller = transformers.LlamaConfig(**{**SIZES, "intermediate_size": 256}, **HEADS)
    refused(
        "does not fit the model: blk.0.ffn_gate.weight has shape", complete, of=transformers.LlamaForCausalLM(smaller)
    )
    (tmp_path / "none.gguf").write_bytes(b"GGML")
    refused("is no GGUF file that can be read", tmp_path / "none.gguf")


def test_the_real_gemma_file_is_read_as_the_gguf_package_reads_it():
    models = pytest.importorskip("nearpeak_bench.models")
    try:
        models.require()
    except models.Missing as missing:
        pytest.skip(str(missing))
    first = {}
    for weight in nearpeak.read_gguf(models.gemma_gguf()).values():
        if isinstance(weight, nearpeak.GgufWeight):
            first.setdefault(weight.kind, weight._replace(blocks=weight.blocks[:64]))
    assert set(first) == {"Q8_0", "Q5_0", "Q4_K", "Q6_K"}
    for kind, weight in first.items():
        theirs = torch.from_numpy(gguf.dequantize(weight.blocks.numpy(), gguf.GGMLQuantizationType[kind]))
        assert torch.equal(weight.dequantize(), theirs)
        x = randn(3, weight.in_features)
        torch.testing.assert_close(nearpeak.quantized_linear(x, weight), x @ theirs.mT, rtol=1e-4, atol=1e-5)
