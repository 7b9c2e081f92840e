"""The operators as PyTorch's machinery sees them: opcheck, compile, export, checkpointing, threads."""

import concurrent.futures
from typing import NamedTuple

import nearpeak
import plain
import pytest
import torch
from inputs import randn
from nearpeak.attention import reference as attention_reference
from nearpeak.norm import reference as norm_reference
from operator_samples import (
    COS,
    IDS,
    PACKED,
    SAMPLES,
    SCORE_MOD,
    SIN,
    WEIGHT,
    WORDS,
    X,
    attention_operands,
    epilogue_operands,
    linear_operands,
    norm_operands,
    qk_operands,
    quantized_operands,
    rotary_operands,
)
from torch._dynamo.testing import CompileCounterWithBackend


def registered():
    names = (name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nearpeak::"))
    return sorted(name.removeprefix("nearpeak::") for name in names)


def test_every_operator_has_samples():
    assert sorted(SAMPLES) == registered()


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    operator = getattr(torch.ops.nearpeak, name).default
    for arguments in SAMPLES[name]:
        torch.library.opcheck(operator, arguments)


class Layer(NamedTuple):
    """A public function of tensors alone, and tensors for it."""

    function: callable
    inputs: tuple
    # The tensors' dimension that a model varies, per input.
    varying: tuple


LAYERS = {
    "rms_norm": Layer(lambda x, w: nearpeak.rms_norm(x, w, offset=1.0), norm_operands(), (1, None)),
    "add_rms_norm": Layer(lambda x, r: nearpeak.rms_norm(x, residual=r), (X, X + 1), (1, 1)),
    "layer_norm": Layer(
        lambda x, w, b: nearpeak.layer_norm(x, w, b), (*norm_operands(), randn(17, seed=2)), (1, None, None)
    ),
    "add_layer_norm": Layer(lambda x, r: nearpeak.layer_norm(x, residual=r), (X, X + 1), (1, 1)),
    "post_layer_norm": Layer(
        lambda x, r, w: nearpeak.layer_norm(x, w, residual=r, return_residual=False), (X, X + 1, WEIGHT), (1, 1, None)
    ),
    "qk_norm": Layer(lambda q, k: nearpeak.qk_norm(q, k, WEIGHT[:16].to(q.dtype), offset=1.0), qk_operands(), (2, 2)),
    "rotary": Layer(lambda q, k, c, s: nearpeak.apply_rotary(q, k, c, s), (*rotary_operands(), COS, SIN), (2, 2, 0, 0)),
    "rotary_interleaved": Layer(
        lambda q, k, c, s: nearpeak.apply_rotary(q, k, c, s, interleaved=True),
        (*rotary_operands(), COS, SIN),
        (2, 2, 0, 0),
    ),
    "rotary_partial": Layer(
        lambda q, k, c, s: nearpeak.apply_rotary(q, k, c, s, rotary_dim=12),
        (*rotary_operands(), COS[:, :6], SIN[:, :6]),
        (2, 2, 0, 0),
    ),
    "attention": Layer(
        lambda q, k, v: nearpeak.attention(q, k, v, causal=True, window=(4, None), softcap=5.0, return_lse=True),
        attention_operands(),
        (2, None, None),
    ),
    "attention_bias": Layer(
        lambda q, k, bias: nearpeak.attention(
            q, k, k, mask=torch.arange(k.shape[2]) != 1, bias=bias, alibi_slopes=torch.full((4,), 0.1), return_lse=True
        ),
        (*attention_operands()[:2], randn(2, 4, 9, 1, seed=5)),
        (2, None, 2),
    ),
    "attention_score_mod": Layer(
        lambda q, k, v: nearpeak.attention(q, k, v, score_mod=SCORE_MOD),
        attention_operands(),
        (2, None, None),
    ),
    "sdpa": Layer(
        lambda q, k, v: nearpeak.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        attention_operands(),
        (2, None, None),
    ),
    "embedding": Layer(
        lambda words, positions, weight: nearpeak.embedding(
            IDS[:, :3] % 3, words, scale=2.0, positions=positions, norm_weight=weight, eps=1e-5
        ),
        (WORDS, WORDS + 1, WEIGHT),
        (0, 0, None),
    ),
    "gelu": Layer(lambda x: nearpeak.activation(x, "gelu"), (X,), (1,)),
    "swiglu": Layer(nearpeak.swiglu, (X, X + 1), (1, 1)),
    "swiglu_packed": Layer(nearpeak.swiglu, (PACKED,), (1,)),
    "linear": Layer(nearpeak.linear, linear_operands(), (1, None, None)),
    "linear_epilogue": Layer(
        lambda x, weight, residual: nearpeak.linear(x, weight, activation="silu", residual=residual),
        (*linear_operands()[:2], epilogue_operands()[3]),
        (1, None, 1),
    ),
    "QuantizedLinear": Layer(
        nearpeak.nn.QuantizedLinear.from_weight(*quantized_operands(bits=4)[1:]), quantized_operands()[:1], (1,)
    ),
    "RMSNorm": Layer(nearpeak.nn.RMSNorm(17, eps=1e-6), (X,), (1,)),
    "LayerNorm": Layer(nearpeak.nn.LayerNorm(17), (X,), (1,)),
    "LayerNorm of two dimensions": Layer(nearpeak.nn.LayerNorm((3, 17)), (randn(5, 3, 17),), (0,)),
}
FAMILIES = ["add_rms_norm", "add_layer_norm", "rotary", "swiglu_packed", "attention", "linear", "QuantizedLinear"]


def results(function, inputs):
    """Outputs, and gradients of the inputs that may want one (a rotary table may not)."""
    wanted = inputs[:2] if len(inputs) == 4 else inputs
    parts = [t.detach().requires_grad_() for t in wanted]
    outputs = function(*parts, *inputs[len(wanted) :])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, parts, [randn(*t.shape, seed=7 + i) for i, t in enumerate(outputs)])
    return *(t.detach() for t in outputs), *gradients


def assert_equal(mine, expected):
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def shorter(layer, by):
    """Copies of the layer's inputs with `by` fewer elements along the dimensions that vary."""
    parts = zip(layer.inputs, layer.varying, strict=True)
    narrowed = (t if dim is None else t.narrow(dim, 0, t.shape[dim] - by) for t, dim in parts)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in narrowed)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_graph_break(name, backend):
    layer = LAYERS[name]
    compiled = torch.compile(layer.function, fullgraph=True, backend=backend)
    assert_equal(results(compiled, layer.inputs), results(layer.function, layer.inputs))
    with torch.no_grad():
        mine, expected = compiled(*layer.inputs), layer.function(*layer.inputs)
    assert_equal(*((t if isinstance(t, tuple) else (t,)) for t in (mine, expected)))


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_with_inductor(name):
    layer = LAYERS[name]
    compiled = torch.compile(layer.function, fullgraph=True)
    for mine, expected in zip(results(compiled, layer.inputs), results(layer.function, layer.inputs), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_for_all_lengths_at_once(name):
    layer = LAYERS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer.function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for by in (0, 1, 2):
        assert_equal(results(compiled, shorter(layer, by)), results(layer.function, shorter(layer, by)))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_code_follows_use_backend(name):
    layer = LAYERS[name]
    compiled = torch.compile(layer.function, fullgraph=True, backend="aot_eager")
    dispatched = results(compiled, layer.inputs)
    with nearpeak.use_backend("reference"):
        for mine, expected in zip(results(compiled, layer.inputs), results(layer.function, layer.inputs), strict=True):
            torch.testing.assert_close(mine, expected)
    assert_equal(results(compiled, layer.inputs), dispatched)


def test_writing_functions_compile():
    def write(x, query, key):
        out = torch.empty_like(x)
        nearpeak.rms_norm(x, out=out)
        nearpeak.rms_norm(x, residual=out, out=(out, x))
        nearpeak.layer_norm(x, residual=out, out=(out, x))
        nearpeak.layer_norm(x, residual=out, return_residual=False, out=x)
        nearpeak.apply_rotary(query, key, COS[:, :6], SIN[:, :6], rotary_dim=12, inplace=True)
        return out, x, *nearpeak.apply_rotary(query, key, COS, SIN, inplace=True)

    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    arguments = [t.clone() for t in (X, *rotary_operands())]
    again = [t.clone() for t in arguments]
    with torch.no_grad():
        mine, expected = compiled(*arguments), write(*again)
    for a, b in zip((*mine, *arguments), (*expected, *again), strict=True):
        assert torch.equal(a, b)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", LAYERS)
def test_exports(name, strict):
    layer = LAYERS[name]
    varying = tuple(None if d is None else {d: torch.export.Dim.DYNAMIC} for d in layer.varying)
    program = torch.export.export(Module(layer.function), shorter(layer, 0), dynamic_shapes=(varying,), strict=strict)
    assert any("nearpeak" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        for by in (0, 1):
            mine, expected = program.module()(*shorter(layer, by)), layer.function(*shorter(layer, by))
            assert_equal(*((t if isinstance(t, tuple) else (t,)) for t in (mine, expected)))


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_is_a_loop(name):
    layer = LAYERS[name]
    stacked = [torch.stack([t, t.flip(0)]) for t in layer.inputs]
    with torch.no_grad():
        together = torch.vmap(layer.function)(*stacked)
        one_by_one = [layer.function(*inputs) for inputs in zip(*stacked, strict=True)]
    if isinstance(together, tuple):
        one_by_one = zip(*one_by_one, strict=True)
    else:
        together, one_by_one = (together,), [one_by_one]
    for mine, expected in zip(together, one_by_one, strict=True):
        assert torch.equal(mine, torch.stack(list(expected)))


@pytest.mark.parametrize("name", LAYERS)
def test_activation_checkpointing_changes_nothing(serving, name):
    layer = LAYERS[name]

    def checkpointed(*inputs):
        return torch.utils.checkpoint.checkpoint(layer.function, *inputs, use_reentrant=False)

    assert_equal(results(checkpointed, layer.inputs), results(layer.function, layer.inputs))


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name not in ("sdpa", "linear", "linear_epilogue", "QuantizedLinear")]
)
def test_autocast_leaves_dtypes_alone(serving, name):
    """As it leaves F.rms_norm and eager arithmetic alone; drop-ins for what torch casts have tests of their own."""
    layer = LAYERS[name]

    def inside(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer.function(*inputs)

    assert_equal(results(inside, layer.inputs), results(layer.function, layer.inputs))


def sizeable(name):
    """Inputs large enough that the kernels share them out over threads."""
    if "two dimensions" in name:
        return (randn(140, 3, 17),)
    if name != "qk_norm" and "norm" in name.lower():
        return tuple(randn(400, 17, seed=i) if t.dim() > 1 else t for i, t in enumerate(LAYERS[name].inputs))
    if "glu" in name or name == "gelu":
        return tuple(t.repeat(1, 3000, 1) for t in LAYERS[name].inputs)
    if name == "linear":
        return randn(3, 40, 170), randn(500, 170, seed=1), randn(500, seed=2)
    if name == "linear_epilogue":
        return randn(3, 40, 170), randn(500, 170, seed=1), randn(3, 40, 500, seed=2)
    if name == "QuantizedLinear":
        return (randn(3, 200, 64),)
    if "rotary" in name:
        return tuple(t.repeat(1, 9, 1, 1) if t.dim() == 4 else t for t in LAYERS[name].inputs)
    if name == "embedding":
        return randn(300, 130), randn(300, 130, seed=1), randn(130, seed=2)
    if name == "qk_norm":
        return randn(2, 50, 60, 16), randn(2, 20, 60, 16, seed=1)
    if name == "attention_bias":
        return randn(2, 4, 200, 16), randn(2, 2, 300, 16, seed=1), randn(2, 4, 200, 300, seed=2)
    return randn(2, 8, 200, 16), randn(2, 2, 300, 16, seed=1), randn(2, 2, 300, 16, seed=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_at_every_call(serving, name, threads):
    torch.set_num_threads(threads)
    first = results(LAYERS[name].function, sizeable(name))
    for _ in range(3):
        assert_equal(results(LAYERS[name].function, sizeable(name)), first)


@pytest.mark.parametrize("name", [*LAYERS, "decode"])
def test_same_bits_in_one_thread_and_in_two(serving, name):
    if serving == "reference" and name in ("attention_bias", "attention_score_mod"):
        pytest.skip("PyTorch's matrix products sum in an order that depends on the threads")
    layer = nearpeak.attention if name == "decode" else LAYERS[name].function
    inputs = tuple(randn(1, heads, length, 64) for heads, length in ((4, 1), (1, 3000), (1, 3000)))
    inputs = inputs if name == "decode" else sizeable(name)
    first = results(layer, inputs)
    torch.set_num_threads(2)
    assert_equal(results(layer, inputs), first)


def test_python_threads_may_call_at_once(serving):
    expected = {name: results(layer.function, layer.inputs) for name, layer in LAYERS.items()}

    def call(name):
        return name, results(LAYERS[name].function, LAYERS[name].inputs)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, mine in pool.map(call, [*LAYERS] * 6):
            # torch's own products depend on where in memory their operands lie.
            if serving != "reference" or name not in ("linear", "linear_epilogue", "QuantizedLinear"):
                assert_equal(mine, expected[name])


@pytest.mark.parametrize("weight", [None, randn(17, dtype=torch.float64, seed=2)], ids=["plain", "weight"])
def test_gradient_formula_of_rms_norm_is_the_derivative(weight):
    x, grad, grad_hidden = (randn(4, 17, dtype=torch.float64, seed=i) for i in range(3))
    inputs = (x, x.flip(0)) if weight is None else (x, x.flip(0), weight)

    def forward(x, residual, weight=None):
        return norm_reference.add_rms_norm(x, residual, weight, 1e-3, 1.0, False)

    expected = plain.value_and_gradients(forward, inputs, (grad, grad_hidden))[2:]
    d_hidden, d_weight = norm_reference.rms_norm_backward(grad, x + x.flip(0), weight, grad_hidden, 1e-3, 1.0)
    torch.testing.assert_close(d_hidden, expected[0])
    if weight is not None:
        torch.testing.assert_close(d_weight, expected[2])


@pytest.mark.parametrize("parameters", [0, 1, 2], ids=["plain", "weight", "weight and bias"])
def test_gradient_formula_of_layer_norm_is_the_derivative(parameters):
    x, grad, grad_hidden = (randn(4, 17, dtype=torch.float64, seed=i) for i in range(3))
    given = tuple(randn(17, dtype=torch.float64, seed=3 + i) for i in range(parameters))

    def forward(x, residual, weight=None, bias=None):
        return norm_reference.add_layer_norm(x, residual, weight, bias, 1e-3)

    expected = plain.value_and_gradients(forward, (x, x.flip(0), *given), (grad, grad_hidden))[2:]
    weight, bias = (*given, None, None)[:2]
    d_hidden, *mine = norm_reference.layer_norm_backward(grad, x + x.flip(0), weight, bias, grad_hidden, 1e-3)
    torch.testing.assert_close(d_hidden, expected[0])
    torch.testing.assert_close(tuple(mine[:parameters]), expected[2:])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [(None, None), (3, 0), (None, -13)], ids=str)
def test_gradient_formula_of_attention_is_the_derivative(window, softcap):
    inputs = plain.doubled(attention_operands())
    options = (*window, 0.4, softcap)
    out, lse = attention_reference.attention(*inputs, *options)
    grads = randn(*out.shape, dtype=torch.float64, seed=5), randn(*lse.shape, dtype=torch.float64, seed=6)
    *mine, _ = attention_reference.attention_backward(*grads, *inputs, out, lse, *options)
    expected = plain.value_and_gradients(lambda *qkv: attention_reference.attention(*qkv, *options), inputs, grads)
    for a, b in zip(mine, expected[2:], strict=True):
        torch.testing.assert_close(a, b)


def summed(function, of):
    """A number made of all of a function's outputs: the sum of of(output, its number)."""

    def call(*inputs):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(of(t, number).sum() for number, t in enumerate(outputs))

    return call


@pytest.mark.parametrize("name", LAYERS)
def test_torch_func_differentiates(name):
    layer = LAYERS[name]
    *_, count = (0, 1, 2) if len(layer.inputs) == 4 else range(len(layer.inputs) + 1)  # a rotary table has no gradient
    number_of = summed(layer.function, lambda t, number: t * randn(*t.shape, seed=7 + number))
    gradients = torch.func.grad(number_of, argnums=tuple(range(count)))(*layer.inputs)
    for mine, expected in zip(gradients, results(layer.function, layer.inputs)[-count:], strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("name", ["rms_norm", "add_layer_norm", "attention", "linear", "swiglu", "qk_norm"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_gives_the_gradients_of_each_sample(name):
    layer = LAYERS[name]
    number_of = summed(layer.function, lambda t, number: t.square())
    gradient = torch.func.grad(number_of, argnums=tuple(range(len(layer.inputs))))
    samples = [tuple(t + 0.1 * number for t in layer.inputs) for number in range(3)]
    together = torch.func.vmap(gradient)(*map(torch.stack, zip(*samples, strict=True)))
    for number, sample in enumerate(samples):
        for mine, expected in zip(together, gradient(*sample), strict=True):
            torch.testing.assert_close(mine[number], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_of_the_references(name):
    layer = LAYERS[name]
    wanted = layer.inputs[:2] if len(layer.inputs) == 4 else layer.inputs
    parts = [t[..., :3, :].double().requires_grad_() if t.dim() > 1 else t.double().requires_grad_() for t in wanted]
    tables = [t[:3].double() for t in layer.inputs[len(wanted) :]]
    function = layer.function.double() if isinstance(layer.function, torch.nn.Module) else layer.function
    assert torch.autograd.gradcheck(lambda *t: function(*t, *tables), parts, fast_mode=True)
    if isinstance(layer.function, torch.nn.Module):
        layer.function.float()
