"""`explain` says which kernels a call runs, without running it."""

import threading

import nearpeak
import pytest
import torch
from nearpeak import backends


def _x(**options):
    return torch.randn(3, 16, **options)


def _query(dtype=torch.float32):
    return torch.randn(1, 2, 5, 16, dtype=dtype)


@pytest.mark.skipif(backends.native.missing is not None, reason=str(backends.native.missing))
def test_a_call_names_operator_device_dtype_and_instruction_set():
    for isa in backends.isas_supported():
        with nearpeak.use_isa(isa):
            said = nearpeak.explain(nearpeak.rms_norm, _x())
        assert said == f"nearpeak::rms_norm_inference on cpu, float32: C++ kernel, instruction set {isa}"


def test_without_the_extension_the_reference_is_named_and_the_remedy(monkeypatch):
    monkeypatch.setattr(backends, "kernel_name", lambda operator, device: "reference")
    monkeypatch.setattr(backends.native, "missing", "the C++ extension was not built: install a compiler")
    said = nearpeak.explain(lambda x: nearpeak.rms_norm(nearpeak.rms_norm(x)), _x()).splitlines()
    assert said == [
        "2 x nearpeak::rms_norm_inference on cpu, float32: plain PyTorch reference",
        "the reference serves cpu here because the C++ extension was not built: install a compiler",
    ]


def test_the_operator_for_gradients_is_told_apart():
    assert "recorded for gradients" in nearpeak.explain(nearpeak.rms_norm, _x(requires_grad=True))
    assert "recorded for gradients" not in nearpeak.explain(nearpeak.rms_norm, _x())
    with torch.no_grad():
        assert "recorded for gradients" not in nearpeak.explain(nearpeak.rms_norm, _x(requires_grad=True))
    not_a_leaf = 2 * _x(requires_grad=True)
    assert "recorded for gradients" in nearpeak.explain(nearpeak.rms_norm, not_a_leaf)


@pytest.mark.parametrize(
    ("call", "operators"),
    [
        (lambda: (nearpeak.rms_norm, _x(), torch.ones(16)), ["rms_norm_inference"]),
        (lambda: (nearpeak.apply_rotary, _query(), _query(), *torch.rand(2, 5, 8)), ["apply_rotary_inference"]),
        (lambda: (nearpeak.attention, _query(), _query(), _query()), ["attention_inference"]),
        (lambda: (nearpeak.scaled_dot_product_attention, *[_query()] * 3), ["attention_inference"]),
        (lambda: (nearpeak.linear, _x(), torch.ones(5, 16)), ["linear_inference"]),
        (lambda: (nearpeak.nn.RMSNorm(16), _x()), ["rms_norm"]),
    ],
    ids=["rms_norm", "apply_rotary", "attention", "scaled_dot_product_attention", "linear", "module"],
)
def test_every_family_shows(call, operators):
    said = nearpeak.explain(*call())
    assert all(f"nearpeak::{name} on cpu, float32" in said for name in operators)


def test_a_forced_reference_is_given_as_the_reason():
    with nearpeak.use_backend("reference"):
        said = nearpeak.explain(nearpeak.rms_norm, _x())
    assert said == "the user forced the backend 'reference'"


def test_a_dtype_without_kernels_is_given_as_the_reason():
    assert "float64 has no kernel" in nearpeak.explain(nearpeak.rms_norm, _x(dtype=torch.float64))


def test_what_goes_to_torch_is_named_with_the_reason():
    said = nearpeak.explain(nearpeak.scaled_dot_product_attention, *[_query()] * 3, dropout_p=1.0)
    assert "torch's scaled_dot_product_attention on cpu, float32: its plain formula" in said
    assert "dropout_p is not from 0 to less than 1" in said
    said = nearpeak.explain(
        lambda: nearpeak.scaled_dot_product_attention(*[torch.empty(1, 2, 5, 16, device="cuda")] * 3, dropout_p=0.5)
    )
    if backends.missing("triton") is not None:
        assert "dropout_p > 0, which only the kernels for the CPU and Triton's apply" in said
    said = nearpeak.explain(nearpeak.scaled_dot_product_attention, *[_query()] * 3, dropout_p=0.5)
    assert "nearpeak::attention_inference on cpu" in said
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        said = nearpeak.explain(torch.nn.functional.scaled_dot_product_attention, *[_query()] * 3)
    assert said == "torch's scaled_dot_product_attention on cpu, float32: its plain formula"


def test_a_call_without_attention_or_nearpeak_says_so():
    assert nearpeak.explain(torch.add, _x(), 1) == (
        "no nearpeak operator and no scaled_dot_product_attention runs in this call"
    )


def test_nothing_is_changed():
    query, key = _query(), _query()
    before = query.clone()
    nearpeak.explain(nearpeak.apply_rotary, query, key, *torch.rand(2, 5, 8), inplace=True)
    assert torch.equal(query, before)
    norm = torch.nn.BatchNorm1d(16)
    nearpeak.explain(norm, _x())
    assert norm.num_batches_tracked == 0
    assert type(norm.running_mean) is torch.Tensor
    kept = []
    nearpeak.explain(lambda x, to: to.append(x), _x(), kept)
    assert kept == []


def test_errors_of_the_call_come_through():
    with pytest.raises(ValueError, match="weight must have shape"):
        nearpeak.explain(nearpeak.rms_norm, _x(), torch.ones(3))


def test_a_call_that_reads_values_is_explained_up_to_there():
    def call(x):
        y = nearpeak.rms_norm(x)
        return y if y.sum() > 0 else nearpeak.attention(x, x, x)

    said = nearpeak.explain(call, _x()).splitlines()
    assert "nearpeak::rms_norm_inference" in said[0]
    assert said[-1].startswith("stops here: the function reads values of tensors")


def test_things_that_refuse_to_be_copied_are_passed_as_they_are():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, x):
            return nearpeak.rms_norm(x)

    assert "nearpeak::rms_norm" in nearpeak.explain(Locked(), _x())


def test_compiled_functions_are_explained_without_being_compiled():
    assert "nearpeak::rms_norm" in nearpeak.explain(torch.compile(nearpeak.rms_norm), _x())


def test_a_patched_model_is_explained_and_its_cache_left_alone():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 31, (1, 7))
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad(), nearpeak.patched(model):
        model(ids, past_key_values=cache)
        said = nearpeak.explain(model, ids, past_key_values=cache)
        assert "5 x nearpeak::rms_norm_inference on cpu" in said
        assert "2 x nearpeak::apply_rotary_inference on cpu" in said
        assert "2 x nearpeak::attention_inference on cpu" in said
        assert cache.get_seq_length() == 7
        padded = nearpeak.explain(model, ids, attention_mask=torch.ones_like(ids))
    assert "2 x nearpeak::attention_inference on cpu" in padded
    assert "nearpeak" not in nearpeak.explain(model, ids)


def test_embeddings_are_named_by_their_tables():
    said = nearpeak.explain(nearpeak.embedding, torch.tensor([[1, 2]]), torch.randn(4, 8).bfloat16(), scale=2.0)
    assert "nearpeak::embedding_inference on cpu, bfloat16" in said
