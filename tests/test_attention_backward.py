"""Attention's gradients: what test_attention.py does not reach, at the edges of backward's own blocks and for long lse.

The gradients of every case in test_attention.py are checked there, with the forward pass.
"""

import nearpeak
import plain
import pytest
import torch
from draws import assert_as_exact
from inputs import DTYPES, every_second, laid_out_like, padded, sequence_first
from test_attention import Case, case_name, draws_of, inputs_of, served, standard, values, window_of

# Around the edges of blocks of 72 rows and 192 keys, some of whose tiles are masked and some are not.
LENGTHS = [(71, 191), (72, 192), (73, 193), (144, 385), (145, 383), (217, 100), (40, 500)]
CASES = [
    *(Case(q, k, heads=1, causal=causal) for q, k in LENGTHS for causal in (False, True)),
    *(Case(q, k, heads=1, window=(30, 20)) for q, k in LENGTHS),
    *(Case(50, 250, head_dim=head_dim, heads=3, causal=True) for head_dim in (1, 15, 40, 65, 128, 200)),
    *(Case(100, 300, heads=heads, key_heads=2, batch=2, window=(150, 3)) for heads in (2, 10)),
    *(Case(90, 230, softcap=softcap, causal=True) for softcap in (1.0, 3.0, 30.0)),
    Case(230, 230, window=(None, -100)),
    Case(230, 230, window=(-100, None)),
]
# Where lse is so large that rounded to float32 it says too little.
FAR_FROM_ZERO = [
    Case(75, 200, magnitude=10.0, causal=True),
    Case(75, 200, magnitude=30.0, scale=1.0, window=(40, 3)),
    Case(75, 200, magnitude=30.0, scale=1.0, softcap=600.0),
    Case(5, 200, magnitude=10.0),
]


@pytest.mark.parametrize("case", [*CASES, *FAR_FROM_ZERO], ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_exact_as_plain(serving, dtype, case):
    assert_as_exact(values(served(case), draws_of(case, dtype)), standard(case, dtype))


def operands(case, dtype=torch.float32):
    """What attention_backward takes, by name."""
    (query, key, value), (grad_out, grad_lse) = inputs_of(case, dtype)
    options = (*window_of(case), case.head_dim**-0.5, case.softcap)
    out, lse = torch.ops.nearpeak.attention_inference(query, key, value, *options)
    return [grad_out, grad_lse, query, key, value, out, lse, *options]


MANY_TASKS = [
    Case(500, 1000, heads=1, causal=True),
    Case(300, 1000, heads=4, key_heads=2, window=(300, 40)),
    Case(40, 2000, head_dim=3),
    Case(200, 700, softcap=5.0, magnitude=5.0, causal=True),
]


@pytest.mark.parametrize("case", MANY_TASKS, ids=case_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_same_bits_on_any_number_of_threads(serving, dtype, case):
    if serving == "reference":
        pytest.skip("PyTorch's matrix products sum in an order that depends on the threads")
    arguments = operands(case, dtype)
    expected = torch.ops.nearpeak.attention_backward(*arguments)
    for threads in (2, 5, 2):
        torch.set_num_threads(threads)
        again = torch.ops.nearpeak.attention_backward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_gradients_of_many_threads_are_right(serving):
    torch.set_num_threads(3)
    case = MANY_TASKS[1]
    assert_as_exact(values(served(case), draws_of(case, torch.float32)), standard(case, torch.float32))


def test_no_gradient_of_lse_is_a_gradient_of_zero(serving):
    arguments = operands(Case(80, 200, causal=True))
    without = torch.ops.nearpeak.attention_backward(arguments[0], None, *arguments[2:])
    zero = torch.ops.nearpeak.attention_backward(arguments[0], torch.zeros_like(arguments[1]), *arguments[2:])
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


@pytest.mark.parametrize("layout", [sequence_first, padded, every_second], ids=lambda layout: layout.__name__)
def test_layouts_of_every_operand(serving, layout):
    check_layouts_of_every_operand(Case(80, 200, heads=4, key_heads=2, batch=2, head_dim=24, causal=True), layout)


def check_layouts_of_every_operand(case, layout):
    arguments = operands(case)
    expected = torch.ops.nearpeak.attention_backward(*arguments)
    changed = [layout(t) if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in arguments]
    changed[1], changed[6] = every_second(arguments[1]), every_second(arguments[6])
    if layout is every_second:
        changed[2:5] = arguments[2:5]  # attention's door asks for a dense last dimension
    gradients = torch.ops.nearpeak.attention_backward(*changed)
    for gradient, same, of in zip(gradients[:3], expected[:3], changed[2:5], strict=True):
        torch.testing.assert_close(gradient, same)
        assert laid_out_like(gradient, of)


def test_a_row_without_keys_spoils_no_gradient(serving):
    """Ten queries stand before the first key; whatever lies in their rows reaches no other."""
    case = Case(100, 90, causal=True)
    inputs, grads = inputs_of(case, torch.float32)
    expected = plain.value_and_gradients(served(case), inputs, grads)
    inputs[0][:, :, :10] *= 1e30
    gradients = plain.value_and_gradients(served(case), inputs, grads)
    assert (gradients[2][:, :, :10] == 0).all()
    assert torch.equal(gradients[2][:, :, 10:], expected[2][:, :, 10:])
    assert all(torch.equal(a, b) for a, b in zip(gradients[3:], expected[3:], strict=True))


def test_memory_of_backward_grows_with_the_length_alone(serving):
    if serving == "reference":
        pytest.skip("the reference holds the scores of the whole sequence")
    sizes = []
    for length in (500, 1000):
        query = torch.randn(1, 2, length, 16, requires_grad=True)
        out = nearpeak.attention(query, query, query, causal=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            out.sum().backward()
        sizes.append(sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0))
    assert sizes[1] < 2.5 * sizes[0]
