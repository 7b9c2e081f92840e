"""nearpeak.nn.MultiheadAttention: torch's layer, with its constructor, state and numbers; and patched models."""

import copy
import inspect

import nearpeak
import pytest
import torch
from draws import DRAWS, assert_as_exact, standards
from inputs import DTYPES, randn

WIDTH, HEADS, BATCH, LENGTH, KEYS = 12, 3, 2, 5, 7
MINUS_INFINITY = float("-inf")

LAYERS = {
    "default": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "even heads": {"batch_first": True, "num_heads": 4},
    "own key": {"add_bias_kv": True},
    "zeros": {"add_zero_attn": True, "batch_first": True},
    "own key and zeros": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "other widths": {"kdim": 8, "vdim": 10},
    "another width without bias": {"vdim": 10, "bias": False, "batch_first": True},
}
INPUTS = ("self", "memory", "three", "unbatched self", "unbatched three")
PADDING = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0]]).bool()
HIDDEN = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1] * 7, [0] * 7, [0, 0, 0, 0, 0, 1, 1]]).bool()


def masks_of(name, inputs, heads, dtype):
    """Keyword arguments for masks of the kind `name`, cut to the inputs' lengths."""
    batch, length, keys = (1 if inputs.startswith("unbatched") else BATCH), LENGTH, KEYS
    keys = LENGTH if inputs.endswith("self") else keys
    padding, hidden = PADDING[:, :keys], HIDDEN[:, :keys]
    added = randn(length, keys, dtype=dtype, seed=20)
    added[1, 2] = MINUS_INFINITY
    float_padding = torch.zeros(BATCH, keys, dtype=dtype).masked_fill(padding, MINUS_INFINITY)
    per_head = randn(batch * heads, length, keys, dtype=dtype, seed=21)
    masks = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": float_padding},
        "hidden": {"attn_mask": hidden},
        "added": {"attn_mask": added},
        "hidden per head": {"attn_mask": per_head > 0.8},
        "added per head": {"attn_mask": per_head},
        "both": {"key_padding_mask": padding, "attn_mask": hidden},
        "both floats": {"key_padding_mask": float_padding, "attn_mask": added},
        "causal": {"attn_mask": torch.ones(length, keys).triu(1).bool(), "is_causal": True},
        "causal and padding": {
            "attn_mask": torch.ones(length, keys).triu(1).bool(), "is_causal": True, "key_padding_mask": padding,
        },
    }[name]  # fmt: skip
    if batch == 1 and "key_padding_mask" in masks:
        masks["key_padding_mask"] = masks["key_padding_mask"][0]
    return masks


MASKS = ("none", "padding", "float padding", "hidden", "added", "hidden per head", "added per head", "both",
         "both floats", "causal", "causal and padding")  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads wait for each other at each small operator: three times the processor time for the whole file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def both(layer, dtype=torch.float32):
    """nearpeak's and torch's layer with the same random parameters."""
    options = {"embed_dim": WIDTH, "num_heads": HEADS, "dtype": dtype, **LAYERS[layer]}
    theirs = torch.nn.MultiheadAttention(**options)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = randn(*parameter.shape, dtype=dtype, seed=seed, magnitude=0.5)
    mine = nearpeak.nn.MultiheadAttention(**options)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def inputs_of(name, layer, dtype=torch.float32, seed=0):
    """The different tensors among query, key and value, laid out as the layer takes them, and the result's gradient."""
    widths = {"self": (WIDTH,), "memory": (WIDTH, layer.kdim)}.get(name.split()[-1], (WIDTH, layer.kdim, layer.vdim))
    lengths = (LENGTH, KEYS, KEYS)
    tensors = [
        randn(BATCH, length, width, dtype=dtype, seed=10 * seed + i)
        for i, (length, width) in enumerate(zip(lengths, widths, strict=False))
    ]
    tensors.append(randn(BATCH, LENGTH, WIDTH, dtype=dtype, seed=10 * seed + 5))
    if name.startswith("unbatched"):
        tensors = [tensor[0] for tensor in tensors]
    elif not layer.batch_first:
        tensors = [tensor.transpose(0, 1).contiguous() for tensor in tensors]
    return tensors[:-1], tensors[-1]


def run(layer, inputs, **options):
    """The layer called with (x, x, x), (x, memory, memory) or three tensors."""
    return layer(*inputs, *[inputs[-1]] * (3 - len(inputs)), **{"need_weights": False, **options})


def value_and_gradients(layer, inputs, grad, masks):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    added = masks.get("attn_mask")
    if added is not None and added.is_floating_point():
        added = added.detach().requires_grad_()
        leaves, masks = [*leaves, added], {**masks, "attn_mask": added}
    out, weights = run(layer, leaves[: len(inputs)], **masks)
    assert weights is None
    wanted = [*leaves, *layer.parameters()]
    return out.detach(), *torch.autograd.grad(out, wanted, grad, materialize_grads=True)


def fits(layer, inputs):
    return not ("width" in layer and inputs.split()[-1] != "three")


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    ("layer", "inputs"), [pair for pair in [(a, b) for a in LAYERS for b in INPUTS] if fits(*pair)]
)
def test_it_computes_what_torchs_layer_computes(layer, inputs, masks):
    mine, theirs = both(layer, torch.float64)
    options = masks_of(masks, inputs, mine.num_heads, torch.float64)
    tensors, grad = inputs_of(inputs, mine, torch.float64)
    results, expected = (value_and_gradients(each, tensors, grad, options) for each in (mine, theirs))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)


EXACT = [
    ("default", "self", "none"),
    ("batch first", "self", "padding"),
    ("no bias", "memory", "added per head"),
    ("other widths", "three", "hidden"),
    ("own key and zeros", "self", "both floats"),
    ("batch first", "unbatched self", "causal"),
]


@pytest.mark.parametrize("case", EXACT, ids=", ".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_as_exact_as_torchs(serving, dtype, case):
    layer, inputs, masks = case
    mine, theirs = both(layer, dtype)
    exact = copy.deepcopy(theirs).double()
    draws = [inputs_of(inputs, mine, dtype, seed) for seed in range(2 * DRAWS)]
    options = masks_of(masks, inputs, mine.num_heads, dtype)
    doubles = {name: mask.double() if torch.is_tensor(mask) and mask.is_floating_point() else mask
               for name, mask in options.items()}  # fmt: skip
    results, plains = ([value_and_gradients(each, *draw, options) for draw in draws] for each in (mine, theirs))
    exacts = [
        value_and_gradients(exact, [tensor.double() for tensor in tensors], grad.double(), doubles)
        for tensors, grad in draws
    ]
    assert_as_exact(results, standards([plains], exacts))


def test_the_kernels_serve_it(serving):
    mine, _ = both("batch first")
    tensors, _ = inputs_of("self", mine)
    explained = nearpeak.explain(run, mine, tensors)
    if serving != "reference":
        assert "nearpeak::attention" in explained
        assert explained.count("nearpeak::linear") == 1
    assert "need_weights" in nearpeak.explain(run, mine, tensors, need_weights=True)


WEIGHTS = {"averaged": {}, "per head": {"average_attn_weights": False}}


@pytest.mark.parametrize("average", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_weights_are_torchs(training, inputs, average):
    mine, theirs = (each.train(training) for each in both("even heads"))
    tensors, _ = inputs_of(inputs, mine)
    options = {"need_weights": True, **WEIGHTS[average]}
    with torch.set_grad_enabled(training):
        results, expected = (run(each, tensors, **options) for each in (mine, theirs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    default = mine(*tensors, *[tensors[-1]] * (3 - len(tensors)))
    assert default[1] is not None


def test_dropout_in_training_is_torchs():
    tensors, _ = inputs_of("self", both("default")[0])
    results = []
    for layer in both("default"):
        layer.dropout = 0.5
        torch.manual_seed(3)
        results.append(run(layer, tensors)[0])
        if isinstance(layer, nearpeak.nn.MultiheadAttention):
            assert "dropout" in nearpeak.explain(run, layer, tensors)
        assert not torch.equal(results[-1], run(layer.eval(), tensors)[0])
    assert torch.equal(*results)


def test_constructor_state_and_repr_are_torchs():
    assert inspect.signature(nearpeak.nn.MultiheadAttention) == inspect.signature(torch.nn.MultiheadAttention)
    mine, theirs = (inspect.signature(each.forward).parameters.values() for each in both("default"))
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]
    mine, theirs = both("own key")
    assert isinstance(mine, torch.nn.MultiheadAttention)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert repr(mine) == repr(theirs)
    theirs.load_state_dict(mine.state_dict(), strict=True)


def test_one_graph_under_compile(serving):
    mine, _ = both("batch first")
    tensors, _ = inputs_of("self", mine)
    torch._dynamo.reset()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, tensors)[0], run(mine, tensors)[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_casts_as_torch_does(serving, dtype):
    mine, theirs = both("batch first")
    exact = copy.deepcopy(theirs).double()
    for masks in ("none", "added", "padding"):
        options, doubles = (masks_of(masks, "self", HEADS, each) for each in (torch.float32, torch.float64))
        draws = [inputs_of("self", mine, seed=seed)[0] for seed in range(2 * DRAWS)]
        with torch.autocast("cpu", dtype=dtype):
            results, plains = ([run(each, draw, **options)[:1] for draw in draws] for each in (mine, theirs))
        assert results[0][0].dtype is plains[0][0].dtype is dtype
        if "attn_mask" in doubles:
            doubles["attn_mask"] = options["attn_mask"].double()
        exacts = [run(exact, [tensor.double() for tensor in draw], **doubles)[:1] for draw in draws]
        assert_as_exact(results, standards([plains], exacts))


X, MEMORY = torch.ones(LENGTH, BATCH, WIDTH), torch.ones(KEYS, BATCH, WIDTH)
REFUSED = {
    "width": ((X[..., :8], X[..., :8], X[..., :8]), {}),
    "lengths": ((X, MEMORY, X), {}),
    "batch": ((X, MEMORY[:, :1], MEMORY[:, :1]), {}),
    "dimensions": ((X, MEMORY[:, 0], MEMORY[:, 0]), {}),
    "four dimensions": ((X[None], X[None], X[None]), {}),
    "mask of another shape": ((X, X, X), {"attn_mask": HIDDEN}),
    "padding of another shape": ((X, X, X), {"key_padding_mask": PADDING}),
    "mask of integers": ((X, X, X), {"attn_mask": torch.ones(LENGTH, LENGTH).int()}),
    "causal without mask": ((X, X, X), {"is_causal": True}),
    "another dtype": ((X.half(), X.half(), X.half()), {}),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_torch_refuses_is_refused(call):
    tensors, options = REFUSED[call]
    errors = AssertionError, AttributeError, RuntimeError, TypeError, ValueError
    for layer in both("default"):
        with pytest.raises(errors):
            layer(*tensors, need_weights=False, **options)


def encoder_layer(dtype=torch.float32, **options):
    torch.manual_seed(4)
    return torch.nn.TransformerEncoderLayer(
        16, 4, 32, **{"dropout": 0.0, "batch_first": True, "dtype": dtype, **options}
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "batch_first": False}], ids=["default", "norm first"])
def test_a_patched_encoder_layer_computes_the_same(training, options):
    layer = encoder_layer(**options).train(training)
    x, mask = randn(6, 6, 16), torch.nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(6, 6).masked_fill(
        torch.arange(6) >= torch.tensor([6, 4, 3, 6, 1, 2])[:, None], MINUS_INFINITY
    )
    for masks in ({}, {"src_mask": mask, "is_causal": True}, {"src_key_padding_mask": padding}):
        with torch.set_grad_enabled(training):
            expected = layer(x, **masks)
            with nearpeak.patched(layer) as report:
                assert report.count("attention") == 1
                assert isinstance(layer.self_attn, torch.nn.MultiheadAttention)
                torch.testing.assert_close(layer(x, **masks), expected)
            assert type(layer.self_attn) is torch.nn.MultiheadAttention
            assert torch.equal(layer(x, **masks), expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_a_patched_encoder_takes_nested_tensors_on_torchs_fast_path():
    encoder = torch.nn.TransformerEncoder(encoder_layer(), 2).eval()
    x, padding = randn(3, 6, 16), torch.arange(6) >= torch.tensor([6, 4, 3])[:, None]
    with torch.no_grad(), nearpeak.patched(encoder) as report:
        assert report.count("attention") == 2
        served = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        assert torch.equal(encoder(x, src_key_padding_mask=padding), served)


def test_a_patched_layer_shares_its_parameters_and_is_given_back():
    _, layer = both("own key")
    model = torch.nn.ModuleDict({"attention": layer})
    tensors, _ = inputs_of("self", layer)
    before, parameters = run(layer, tensors)[0], [p.data_ptr() for p in layer.parameters()]
    report = nearpeak.patch(model)
    assert [(entry.layer, entry.count) for entry in report.replaced] == [("MultiheadAttention", 1)]
    assert [entry.detail for entry in report.left_alone] == [
        "never called: the MultiheadAttention that holds it reads its parameters"
    ]
    assert [p.data_ptr() for p in layer.parameters()] == parameters
    assert "nearpeak::attention" in nearpeak.explain(run, layer, tensors)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin["attention"], tensors)[0], run(layer, tensors)[0])
    nearpeak.unpatch(model)
    assert type(layer) is torch.nn.MultiheadAttention
    assert torch.equal(run(layer, tensors)[0], before)


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Other(torch.nn.MultiheadAttention):
        def forward(self, query, key, value):
            return query

    assert nearpeak.patch(Other(WIDTH, HEADS)).count("attention") == 0
