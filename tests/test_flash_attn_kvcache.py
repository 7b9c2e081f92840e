"""nearpeak.compat.flash_attn.flash_attn_with_kvcache: what it appends, turns and attends to, by loops."""

from typing import NamedTuple

import pytest
import torch
from flash_attn_loops import attend, slopes_of, turn
from inputs import every_second, randn
from nearpeak.compat.flash_attn import flash_attn_with_kvcache

BATCH, HEADS, KEY_HEADS, HEAD_DIM = 3, 4, 2, 10
ENTRIES, CAPACITY, PAGE = 5, 24, 4
LENGTHS = (9, 0, 14)


class Case(NamedTuple):
    query_length: int = 1
    new_length: int | None = 1
    rotary_dim: int | None = None
    interleaved: bool = True
    paged: bool = False
    batch_idx: tuple | None = None
    leftpad: tuple | None = None
    lengths: tuple | int | None = LENGTHS
    options: dict = {}  # noqa: RUF012


SLOPES = torch.tensor([[0.5, 0.25, 0.1, 1.0], [0.3, 0.0, 2.0, 0.7], [1.0, 0.2, 0.1, 0.0]])
CASES = {
    "decode": Case(),
    "decode causal": Case(options={"causal": True}),
    "full cache": Case(new_length=None, lengths=None),
    "nothing new": Case(new_length=None, query_length=3),
    "a number of keys": Case(lengths=9),
    "several": Case(4, 4, options={"causal": True}),
    "more queries than new keys": Case(4, 2, options={"causal": True}),
    "more new keys than queries": Case(2, 5, options={"causal": True, "softcap": 2.0}),
    "turned": Case(4, 4, 10, options={"causal": True}),
    "turned partly": Case(2, 2, 4, options={"causal": True}),
    "turned halves": Case(3, 3, 6, False, options={"causal": True}),
    "turned in a window": Case(3, 3, 10, options={"window_size": (4, 1)}),
    "turned at one place": Case(3, 2, 10, False),
    "turned decode": Case(1, 1, 10),
    "left padding": Case(2, 2, 10, leftpad=(3, 0, 14), options={"causal": True}),
    "left padding alone": Case(3, None, leftpad=(3, 0, 14), options={"window_size": (2, -1)}),
    "left padding of a full cache": Case(3, None, leftpad=(3, 0, 24), lengths=None),
    "entries": Case(batch_idx=(4, 0, 2), options={"causal": True}),
    "entries padded and turned": Case(2, 2, 10, batch_idx=(1, 3, 0), leftpad=(2, 0, 1), options={"causal": True}),
    "slopes": Case(3, 3, options={"causal": True, "alibi_slopes": SLOPES[0]}),
    "slopes of each": Case(3, 1, leftpad=(3, 0, 1), options={"causal": True, "alibi_slopes": SLOPES}),
    "pages": Case(paged=True),
    "pages causal": Case(5, 5, 10, paged=True, options={"causal": True}),
    "pages in a window": Case(3, 3, 4, False, paged=True, options={"window_size": (3, 0)}),
    "pages, nothing new": Case(2, None, paged=True, options={"softmax_scale": 0.8}),
    "full pages": Case(2, None, paged=True, lengths=None),
    "splits": Case(options={"num_splits": 3}),
}


def cache_of(case, dtype):
    """What the call takes as cache, and each sequence's keys and values in it: views of (CAPACITY, heads, head_dim)."""
    caches = [randn(ENTRIES, CAPACITY, KEY_HEADS, HEAD_DIM, dtype=dtype, seed=seed) for seed in (1, 2)]
    entries = case.batch_idx or range(BATCH)
    return caches, [[cache[entry] for cache in caches] for entry in entries]


def pages_of(dtype):
    """The same as pages in any order, and their table; pages that are no sequence's stay as they are."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))[: BATCH * CAPACITY // PAGE]
    table = order.view(BATCH, -1).int()
    caches = [randn(40, PAGE, KEY_HEADS, HEAD_DIM, dtype=dtype, seed=seed) for seed in (1, 2)]
    return caches, table


class Call:
    """A call of the function, and what the loops say of it."""

    def __init__(self, case, dtype=torch.float64):
        self.case = case
        self.q = randn(BATCH, case.query_length, HEADS, HEAD_DIM, dtype=dtype, seed=5)
        self.new = [None, None]
        if case.new_length is not None:
            shape = BATCH, case.new_length, KEY_HEADS, HEAD_DIM
            self.new = [randn(*shape, dtype=dtype, seed=seed) for seed in (6, 7)]
        self.tables = [None, None]
        if case.rotary_dim is not None:
            angles = randn(CAPACITY + 8, case.rotary_dim // 2, dtype=dtype, seed=8)
            self.tables = [angles.cos(), angles.sin()]
        if case.paged:
            self.caches, self.block_table = pages_of(dtype)
        else:
            self.caches, _ = cache_of(case, dtype)
            self.block_table = None
        self.lengths = case.lengths
        if isinstance(case.lengths, tuple):
            self.lengths = torch.tensor(case.lengths, dtype=torch.int32)

    def arguments(self):
        def numbers(values):
            return None if values is None else torch.tensor(values, dtype=torch.int32)

        return dict(
            zip(("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"),
                (self.q, *self.caches, *self.new, *self.tables), strict=True),
            cache_seqlens=self.lengths, cache_batch_idx=numbers(self.case.batch_idx),
            cache_leftpad=numbers(self.case.leftpad), block_table=self.block_table,
            rotary_interleaved=self.case.interleaved, **self.case.options, return_softmax_lse=True,
        )  # fmt: skip

    def place(self, sequence, row):
        """Where in the caches a sequence's key lies."""
        if self.case.paged:
            return self.block_table[sequence, row // PAGE].item(), row % PAGE
        return (self.case.batch_idx or range(BATCH))[sequence], row

    def looped(self):
        """out, lse, and both caches afterwards."""
        caches, outs, lses = [cache.clone() for cache in self.caches], [], []
        for sequence in range(BATCH):
            out, lse = self._looped_sequence(sequence, caches)
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses), *caches

    def _looped_sequence(self, sequence, caches):
        case, options = self.case, dict(self.case.options)
        options.pop("num_splits", None)
        slopes = slopes_of(options.pop("alibi_slopes", None), sequence)
        if case.lengths is None:
            length = CAPACITY
        else:
            length = case.lengths if isinstance(case.lengths, int) else case.lengths[sequence]
        for row in range(case.new_length or 0):
            for cache, new in zip(caches, self.new, strict=True):
                cache[self.place(sequence, length + row)] = new[sequence, row]
            if case.rotary_dim is not None:
                for head in range(KEY_HEADS):
                    key = self.new[0][sequence, row, head]
                    turned = turn(key, *self.tables, length + row, case.interleaved)
                    caches[0][self.place(sequence, length + row)][head] = turned
        q = self.q[sequence].clone()
        if case.rotary_dim is not None:
            moves = options.get("causal") or options.get("window_size", (-1, -1)) != (-1, -1)
            for row in range(case.query_length):
                for head in range(HEADS):
                    position = length + (row if moves else 0)
                    q[row, head] = turn(self.q[sequence, row, head], *self.tables, position, case.interleaved)
        rows = range(0 if case.leftpad is None else case.leftpad[sequence], length + (case.new_length or 0))
        places = [self.place(sequence, row) for row in rows]
        keys, values = (torch.stack([cache[place] for place in places]) if places else cache[:0, 0] for cache in caches)
        return attend(q, keys, values, **options, slopes=slopes)


@pytest.mark.parametrize("case", CASES)
def test_it_does_what_flash_attn_documents(case):
    call = Call(CASES[case])
    expected = call.looped()
    untouched = [cache.clone() for cache in call.caches]
    out, lse = flash_attn_with_kvcache(**call.arguments())
    for result, wanted in zip((out, lse, *call.caches), expected, strict=True):
        torch.testing.assert_close(result, wanted)
    for cache, wanted, before in zip(call.caches, expected[2:], untouched, strict=True):
        assert torch.equal(cache[wanted == before], before[wanted == before])


@pytest.mark.parametrize("case", ["turned", "left padding", "entries padded and turned", "pages causal"])
def test_the_kernels_do_it_too(serving, case):
    call, expected = Call(CASES[case], torch.float32), Call(CASES[case]).looped()
    out, lse = flash_attn_with_kvcache(**call.arguments())
    for result, wanted in zip((out, lse, *call.caches), expected, strict=True):
        torch.testing.assert_close(result, wanted.float())


def test_out_alone_by_default():
    arguments = Call(Case()).arguments()
    expected = flash_attn_with_kvcache(**arguments)[0]
    arguments.pop("return_softmax_lse")
    assert torch.equal(flash_attn_with_kvcache(**arguments), expected)


def test_no_gradient_is_recorded_and_the_cache_stays_a_plain_tensor():
    call = Call(Case())
    call.q.requires_grad_()
    call.new[0].requires_grad_()
    out, _ = flash_attn_with_kvcache(**call.arguments())
    assert out.grad_fn is None
    assert call.caches[0].grad_fn is None


def test_strided_queries_and_new_keys_are_read():
    call = Call(CASES["turned"])
    expected = call.looped()
    call.q, *call.new = map(every_second, (call.q, *call.new))
    torch.testing.assert_close(flash_attn_with_kvcache(**call.arguments())[0], expected[0])


def test_decoding_step_by_step_gives_the_causal_whole(serving):
    """A cache filled by one prefill and single steps, against attention of the whole sequence."""
    from nearpeak.compat.flash_attn import flash_attn_func

    q, k, v = (randn(2, 12, heads, 8, seed=heads + i) for i, heads in enumerate((4, 2, 2)))
    caches = [torch.zeros(2, 16, 2, 8) for _ in range(2)]
    outs = [flash_attn_with_kvcache(q[:, :7], *caches, k[:, :7], v[:, :7], cache_seqlens=0, causal=True)]
    for step in range(7, 12):
        now = slice(step, step + 1)
        outs.append(flash_attn_with_kvcache(q[:, now], *caches, k[:, now], v[:, now], cache_seqlens=step, causal=True))
    torch.testing.assert_close(torch.cat(outs, 1), flash_attn_func(q, k, v, causal=True))


def changed(**changes):
    """The arguments of a call that is all right, but for these."""

    def call():
        call = Call(Case(2, 2, 10, options={"causal": True}))
        flash_attn_with_kvcache(**{**call.arguments(), **changes})

    return call


def paged(**changes):
    def call():
        call = Call(Case(2, 2, paged=True))
        flash_attn_with_kvcache(**{**call.arguments(), **changes})

    return call


@pytest.mark.parametrize("case", ["turned", "entries", "pages causal"])
def test_one_graph_under_compile(case):
    """Numbers are checked by what reads them there; the cache is written in place all the same."""
    call, again = Call(CASES[case], torch.float32), Call(CASES[case], torch.float32)
    expected = flash_attn_with_kvcache(**call.arguments())
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    for result, wanted in zip((*compiled(**again.arguments()), *again.caches), (*expected, *call.caches), strict=True):
        torch.testing.assert_close(result, wanted)


F64 = {"dtype": torch.float64}
BAD = {
    "integers": (TypeError, "q must", changed(q=torch.ones(3, 2, 4, 10).int())),
    "no batch": (ValueError, "q must", changed(q=torch.ones(2, 4, 10, **F64))),
    "another dtype": (TypeError, "v_cache must", changed(v_cache=torch.ones(5, 24, 2, 10))),
    "another head_dim": (ValueError, "k_cache must", changed(k_cache=torch.ones(5, 24, 2, 8, **F64))),
    "strided cache": (ValueError, "v_cache must", changed(v_cache=torch.ones(5, 24, 10, 2, **F64).mT)),
    "small cache": (ValueError, "v_cache must", changed(v_cache=torch.ones(5, 23, 2, 10, **F64))),
    "too few entries": (
        ValueError,
        "k_cache must",
        changed(k_cache=torch.ones(2, 24, 2, 10, **F64), v_cache=torch.ones(2, 24, 2, 10, **F64)),
    ),
    "k alone": (ValueError, "k and v must", changed(v=None)),
    "no lengths": (ValueError, "cache_seqlens must", changed(cache_seqlens=None)),
    "new head_dim": (ValueError, "k must", changed(k=torch.ones(3, 2, 2, 8, **F64))),
    "new length": (ValueError, "v must", changed(v=torch.ones(3, 1, 2, 10, **F64))),
    "rotary alone": (ValueError, "rotary_cos must", changed(k=None, v=None)),
    "cos alone": (ValueError, "rotary_sin must", changed(rotary_sin=None)),
    "wide tables": (
        ValueError,
        "rotary_cos must",
        changed(rotary_cos=torch.ones(32, 6, **F64), rotary_sin=torch.ones(32, 6, **F64)),
    ),
    "short tables": (
        ValueError,
        "rotary_cos must",
        changed(rotary_cos=torch.ones(15, 5, **F64), rotary_sin=torch.ones(15, 5, **F64)),
    ),
    "full cache": (ValueError, "cache_seqlens must", changed(cache_seqlens=23)),
    "one full cache": (ValueError, "cache_seqlens must", changed(cache_seqlens=torch.tensor([0, 24, 3]))),
    "negative length": (ValueError, "cache_seqlens must", changed(cache_seqlens=torch.tensor([0, -1, 3]))),
    "negative number": (ValueError, "cache_seqlens must", changed(cache_seqlens=-1)),
    "float lengths": (TypeError, "cache_seqlens must", changed(cache_seqlens=torch.ones(3))),
    "lengths of others": (ValueError, "cache_seqlens must", changed(cache_seqlens=torch.tensor([0, 3]))),
    "entry that is not there": (ValueError, "cache_batch_idx must", changed(cache_batch_idx=torch.tensor([0, 1, 5]))),
    "negative entry": (ValueError, "cache_batch_idx must", changed(cache_batch_idx=torch.tensor([0, 1, -1]))),
    "padding beyond": (ValueError, "cache_leftpad must", changed(cache_leftpad=torch.tensor([0, 3, 0]))),
    "entries of pages": (ValueError, "cache_batch_idx must", paged(cache_batch_idx=torch.tensor([0, 1, 2]))),
    "padding of pages": (ValueError, "cache_leftpad must", paged(cache_leftpad=torch.tensor([0, 0, 0]))),
    "table of others": (ValueError, "block_table must", paged(block_table=torch.zeros(2, 6).int())),
    "short table": (ValueError, "block_table must", paged(block_table=torch.zeros(3, 3).int())),
    "float table": (TypeError, "block_table must", paged(block_table=torch.zeros(3, 6))),
    "page that is not there": (ValueError, "block_table must", paged(block_table=torch.full((3, 6), 40))),
    "window": (ValueError, "window_size must", changed(window_size=(1, 2, 3))),
    "slopes": (ValueError, "alibi_slopes must", changed(alibi_slopes=torch.ones(3))),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad):
    error, message, call = BAD[bad]
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_written_where_a_length_does_not_fit():
    call = Call(Case(2, 2, lengths=(0, 23, 3)))
    before = [cache.clone() for cache in call.caches]
    with pytest.raises(ValueError, match="cache_seqlens"):
        flash_attn_with_kvcache(**call.arguments())
    assert all(torch.equal(a, b) for a, b in zip(call.caches, before, strict=True))
