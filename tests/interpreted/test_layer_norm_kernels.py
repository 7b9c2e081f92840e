"""The Triton kernels of LayerNorm, held to the rule that tests/test_layer_norm.py holds every backend to."""

import nearpeak
import plain
import pytest
import test_layer_norm as norm
import torch
from draws import assert_as_exact
from inputs import DTYPES, every_second, some_by_default
from nearpeak import triton_row_tiles
from test_layer_norm import Case

CASES = [
    *(Case(rows=(17,), width=width, residual=residual) for width in (7, 33, 64, 100) for residual in norm.RESIDUALS),
    Case(rows=(17,), width=1, eps=1.0),
    *(Case(rows=rows, residual="pre") for rows in ((), (0,), (1,), (2, 0, 3), (2, 3, 5))),
    *(Case(rows=(17,), weight=weight, bias=bias) for weight, bias in ((False, False), (True, False), (False, True))),
    Case(rows=(17,), parameters=torch.float32, residual="post"),
    *(Case(rows=(40,), width=width) for width in (33, 64)),
    Case(rows=(17,), mean=1000.0, width=100),
]


def judge(case, draws):
    assert_as_exact(norm.results(case, draws), norm.standards_of(case, draws))


@pytest.mark.parametrize("case", some_by_default(CASES, 3, norm.case_name))
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(blocks, dtype, case):
    # Rounding to 16 bits drowns what float32 sums do by chance; float32 itself takes more draws to judge.
    seeds = range(0, 30, 10) if dtype is torch.float32 else (0,)
    judge(case, [norm.inputs_of(case._replace(seed=seed), dtype) for seed in seeds])


def test_a_row_too_wide_for_registers():
    case = Case(rows=(2,), width=triton_row_tiles.WHOLE_ROW_FORWARD // 4 + 1)
    judge(case, [norm.inputs_of(case, torch.float32)])


@pytest.mark.parametrize("width", [33, 100])
def test_a_large_mean_costs_no_digits(blocks, width):
    norm.test_a_large_mean_costs_no_digits(None, width)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("extreme", norm.EXTREMES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_where_plain_stays_finite_so_does_nearpeak(blocks, dtype, extreme):
    norm.test_where_plain_stays_finite_so_does_nearpeak(None, dtype, extreme, eps=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_bad_row_spoils_no_other(blocks):
    norm.test_a_bad_row_spoils_no_other(None, float("inf"))


@pytest.mark.parametrize("layout", norm.LAYOUTS)
def test_layouts_of_inputs_and_gradients(blocks, layout):
    strange = norm.LAYOUTS[layout]
    case = Case(rows=(4, 5), width=67, residual="pre", eps=1.0 if layout == "expanded_width" else 1e-5)
    (x, residual, *parameters), grads = norm.inputs_of(case, torch.bfloat16)
    inputs = strange(x), strange(residual), *map(every_second, parameters)
    judge(case, [(inputs, [strange(grad) for grad in grads])])


@pytest.mark.parametrize("residual", norm.RESIDUALS)
def test_out_is_written_whole_and_nothing_beside_it(blocks, residual):
    for width in (1, 67):
        norm.test_out_is_written_whole_and_nothing_beside_it(None, width, torch.bfloat16, residual)


@pytest.mark.parametrize("places", ["x,new", "new,residual", "x,residual", "residual,x"])
def test_out_may_be_the_inputs(blocks, places):
    norm.test_out_may_be_the_inputs(None, 67, places)


def test_post_norm_inference_writes_the_result_alone(blocks):
    norm.test_post_norm_inference_writes_the_result_alone(None)


def test_the_parameters_gradients_are_the_same_every_time(blocks):
    case = Case(rows=(40,), width=33)
    inputs, grads = norm.inputs_of(case, torch.float32)
    first = plain.value_and_gradients(norm.served(case), inputs, grads)
    second = plain.value_and_gradients(norm.served(case), inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_may_lie_further_apart_than_32_bits_count(blocks, far_apart):
    x = far_apart((2, 33), torch.float16)
    assert torch.equal(nearpeak.layer_norm(x), nearpeak.layer_norm(x.contiguous()))
