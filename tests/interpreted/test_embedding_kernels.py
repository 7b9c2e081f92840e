"""The Triton kernels of embeddings, held to the rule that tests/test_embedding.py holds every backend to."""

import nearpeak
import pytest
import test_embedding as embedding
import torch
from draws import assert_as_exact
from inputs import DTYPES, some_by_default
from nearpeak import triton_row_tiles
from nearpeak.embedding import triton_embedding, triton_table_gradient
from test_embedding import BERT, Case

CASES = [case for case in embedding.CASES if case.width <= 100 and len(case.tokens) < 3 and case.rows < 1000]


def judge(case, dtype):
    """Rounding to 16 bits drowns what float32 sums do by chance; float32 itself takes more draws to judge."""
    draws = embedding.draws_of(case, dtype, 3 if dtype is torch.float32 else 1)
    assert_as_exact(embedding.results(case, draws), embedding.standards_of(case, draws))


@pytest.mark.parametrize("case", some_by_default(CASES, 3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(dtype, case):
    judge(case._replace(tokens=(2, 5)) if case.tokens == (3, 17) else case, dtype)


def test_programs_that_walk_over_several_tiles(monkeypatch):
    tile = triton_row_tiles.Tile(2, 32, triton_embedding.RESIDENT_THREADS)
    for name in ("forward_tile", "backward_tile"):
        monkeypatch.setattr(triton_embedding, name, lambda *sizes: tile)
    judge(BERT._replace(width=20), torch.float32)


@pytest.mark.parametrize("tokens", [(1, 8), (1, 9), (5, 7), (3, 16)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_that_tokens_of_several_blocks_took(monkeypatch, rows, tokens):
    monkeypatch.setattr(triton_table_gradient, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(triton_table_gradient, "WIDEST_COLUMNS", 16)
    for seed in range(3):
        judge(Case(tokens=tokens, rows=rows, width=20, padding_idx=0, seed=seed), torch.float32)


def test_rows_too_wide_for_registers(monkeypatch):
    monkeypatch.setattr(triton_row_tiles, "WHOLE_ROW_FORWARD", 64)
    monkeypatch.setattr(triton_row_tiles, "WHOLE_ROW_BACKWARD", 32)
    judge(BERT._replace(width=70, tokens=(2, 3)), torch.float32)


@pytest.mark.parametrize("layout", embedding.LAYOUTS)
def test_layouts_of_tables_and_gradients(layout):
    embedding.test_layouts_of_tables_and_gradients(None, torch.float32, layout)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_sparse_gradient_is_the_dense_one(padding_idx):
    embedding.test_a_sparse_gradient_is_the_dense_one(None, padding_idx)


def test_ids_without_a_row_make_nan_and_touch_no_other():
    weight, ids = torch.randn(4, 20).requires_grad_(), torch.tensor([0, 4, 3, -1])
    y = torch.ops.nearpeak.embedding(ids, weight, *[None] * 6, 1.0, None, None, 0.0, -1, False)
    assert y.isnan().any(-1).tolist() == [False, True, False, True]
    assert torch.equal(y[[0, 2]], weight[[0, 3]])
    (gradient,) = torch.autograd.grad(y[[0, 2]].sum(), weight)
    assert torch.equal(gradient, torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None].expand(4, 20))


def test_rows_may_lie_further_apart_than_32_bits_count(far_apart):
    weight, ids = far_apart((2, 8), torch.float16), torch.tensor([0, 1, 1])
    assert torch.equal(nearpeak.embedding(ids, weight), weight.contiguous()[ids])
