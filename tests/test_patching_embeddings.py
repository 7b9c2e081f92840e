"""Embedding modules that `patch` recognises by what they compute."""

import copy
import pickle

import nearpeak
import pytest
import torch
from exactness import assert_as_exact_as_plain
from nearpeak.patching import embeddings
from tiny_models import Operators, exactly, make, random_ids, transformers

IDS = torch.tensor([[5, 3, 0], [2, 2, 7]])


class Scaled(torch.nn.Embedding):
    scale = 3.0

    def forward(self, input_ids):
        return super().forward(input_ids) * self.scale


class Shifted(torch.nn.Embedding):
    def forward(self, input_ids):
        return super().forward(input_ids) + 1.0


class Renamed(torch.nn.Embedding):
    pass


def gemmas(scale):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(10, 33, 0, scale)


def bert(**options):
    from transformers.models.bert.modeling_bert import BertEmbeddings

    sizes = {"vocab_size": 61, "hidden_size": 32, "max_position_embeddings": 64, "layer_norm_eps": 1e-3}
    return BertEmbeddings(transformers.BertConfig(**sizes, **options)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "detail"),
    [
        (torch.nn.Embedding(10, 33), embeddings.PLAIN_DETAIL),
        (Renamed(10, 33, padding_idx=3), embeddings.PLAIN_DETAIL),
        (Scaled(10, 33), "nearpeak.embedding, scale 3"),
        (gemmas(33**0.5), "nearpeak.embedding, scale 5.7"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_tables_are_served_forward_and_backward(serving, module, detail, dtype):
    model = torch.nn.Sequential(copy.deepcopy(module).to(dtype))

    def run(model):
        model.zero_grad()
        y = model(IDS)
        y.backward(torch.ones_like(y))
        return y.detach(), model[0].weight.grad

    expected = run(model)
    with nearpeak.patched(model) as report:
        assert report.count("embedding") == 1
        assert report.replaced[0].detail.startswith(detail)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(run(model), expected, strict=True))
    assert type(model[0]) is type(module)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Shifted(10, 33), "computes something else"),
        (torch.nn.Embedding(10, 33, max_norm=1.0), "max_norm"),
        (torch.nn.Embedding(10, 33, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (Scaled(10, 33, device="meta"), "computes something else"),
    ],
)
def test_what_is_left_alone_is_said(module, why):
    report = nearpeak.patch(torch.nn.Sequential(module))
    assert not report.replaced
    assert why in report.left_alone[0].detail


def test_a_scale_that_another_dtype_rounds_is_that_dtypes():
    model = torch.nn.Sequential(gemmas(33**0.5))
    nearpeak.patch(model)
    narrow = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        assert torch.equal(narrow(IDS), narrow[0].weight[IDS] * torch.tensor(33**0.5).bfloat16())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"token_type_ids": torch.tensor([[0, 1, 1], [1, 0, 0]])},
        {"position_ids": torch.tensor([[4, 9, 0]])},
        {"token_type_ids": torch.tensor([[0, 1, 1], [1, 0, 0]]), "position_ids": torch.tensor([[4, 9, 0], [1, 2, 3]])},
    ],
    ids=lambda given: " ".join(given),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_berts_sum_is_as_exact(serving, dtype, given):
    module = bert()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    module = module.to(dtype)
    with torch.no_grad():
        plain, exact = module(IDS, **given), exactly(module, lambda module: module(IDS, **given))
        with nearpeak.patched(module), Operators() as operators:
            y = module(IDS, **given)
    assert_as_exact_as_plain(y, plain, exact)
    if serving != "reference":
        assert [name for name in operators.names if name != "aten::select.int"] == ["nearpeak::embedding_inference"]


def test_what_bert_is_given_beside_ids_is_its_own():
    module = bert()
    inputs = torch.randn(2, 3, 32)
    with torch.no_grad():
        expected = module(inputs_embeds=inputs), module(IDS, cache_length=2)
        with nearpeak.patched(module):
            torch.testing.assert_close(module(inputs_embeds=inputs), expected[0])
            torch.testing.assert_close(module(IDS, cache_length=2), expected[1])


def test_hooks_on_its_parts_are_called():
    module, called = bert(), []
    module.LayerNorm.register_forward_hook(lambda *_: called.append(True))
    with nearpeak.patched(module):
        module(IDS)
    assert called == [True]


def test_training_drops_and_evaluation_does_not(serving):
    module = bert(hidden_dropout_prob=0.5)
    with nearpeak.patched(module):
        assert not (module(IDS) == 0).any()
        dropped = (module.train()(IDS) == 0).double().mean()
    assert 0.3 < dropped < 0.7


def test_a_sum_with_positions_of_its_own_is_left_alone():
    config = transformers.RobertaConfig(vocab_size=61, hidden_size=32, max_position_embeddings=64)
    module = transformers.models.roberta.modeling_roberta.RobertaEmbeddings(config).eval()
    report = nearpeak.patch(module)
    assert all(entry.layer == "Embedding" for entry in report.replaced if entry.kind == "embedding")


def test_patched_embeddings_copy_and_pickle():
    for module in (bert(), gemmas(2.0), torch.nn.Embedding(10, 33)):
        nearpeak.patch(module)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is type(module)
            assert torch.equal(other(IDS), module(IDS))


def test_a_whole_model_trains_the_same():
    model, ids = make("bert"), random_ids()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.bert.embeddings.parameters()]

    expected = gradients()
    with nearpeak.patched(model):
        for mine, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
