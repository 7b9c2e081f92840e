"""Attention with block masks: as exact as plain attention with the dense mask; what may make one, and what may not."""

import functools
from typing import NamedTuple

import hypothesis.strategies as st
import nearpeak
import plain
import pytest
import torch
from draws import assert_as_exact, standards
from inputs import DTYPES, EXAMPLES, for_all, randn
from nearpeak import masks
from nearpeak.attention import reference
from test_attention import Case, doubled, draws_of, inputs_of, mask_of, scale_of, values, window_of
from torch.nn.attention import flex_attention


class Masked(NamedTuple):
    """A case under a block mask."""

    case: Case
    mask: str = "causal"
    block: tuple = (128, 128)
    per: tuple = (False, False)  # whether the mask is another one for each batch entry, for each head
    sinks: bool = False
    alibi: bool = False


def scattered(batch, head, query, key):
    """Blocks of 16 in no order, some seen whole, many not at all; another mask for each batch entry and head."""
    place = query // 16 * 7 + key // 16 * 5 + batch * 3 + head * 2
    return (place % 5 == 0) & ((place % 3 == 0) | ((query + key) % 3 == 0))


def ids_of(case):
    """Documents of some 40 tokens, others for each batch entry."""
    longest = max(case.query_length, case.key_length)
    ends = randn(case.batch, longest, seed=case.seed % 10 + 50) > 2.0
    return ends.long().cumsum(1)


MASKS = {
    "causal": lambda case: masks.causal,
    "window": lambda case: masks.sliding_window(30, 5),
    "prefix": lambda case: masks.prefix_lm(torch.arange(case.batch) * 20 + 11),
    "chunked": lambda case: masks.both(masks.causal, masks.chunked(48)),
    "documents": lambda case: masks.both(masks.causal, masks.documents(ids_of(case))),
    "either": lambda case: masks.either(masks.sliding_window(3), lambda b, h, q, k: k < 4),
    "scattered": lambda case: scattered,
    "nothing": lambda case: lambda b, h, q, k: q < 0,
    "all": lambda case: lambda b, h, q, k: q >= 0,
    "last": lambda case: lambda b, h, q, k: (q == case.query_length - 1) & (k == case.key_length - 1),
}
LONG, TALL = Case(300, 410, heads=4, key_heads=2, batch=2), Case(200, 70, heads=3, key_heads=1, batch=2)
# Of cases of many rows: largest errors are averaged over draws, and of two they are chance.
FEW_DRAWS = 4
BATCH, EACH = (True, False), (True, True)
CASES = [
    *(Masked(case, mask) for case in (LONG, TALL) for mask in ("causal", "window", "scattered", "last")),
    *(Masked(LONG, mask, per=BATCH) for mask in ("prefix", "documents")),
    *(Masked(LONG, mask) for mask in ("chunked", "either", "nothing", "all")),
    *(Masked(LONG, "scattered", block, EACH) for block in ((128, 128), (16, 16), (17, 19), (64, 200), (1000, 1))),
    *(Masked(LONG, "scattered", (16, 16), per) for per in ((False, True), BATCH)),
    *(Masked(Case(q, 33, causal=True), "window", (8, 4)) for q in (1, 2, 3, 9, 17)),
    *(Masked(Case(q, k), "causal", (4, 4)) for q, k in ((0, 5), (5, 0), (0, 0), (1, 1))),
    Masked(Case(70, 300, head_dim=65, heads=8), "window", (1, 1)),
    Masked(Case(257, 257, head_dim=128), "chunked", (32, 64)),
    Masked(TALL._replace(softcap=3.0), "scattered", (16, 16), EACH, sinks=True, alibi=True),
    Masked(LONG._replace(causal=True, window=(100, None)), "scattered", (16, 32), EACH, alibi=True),
    Masked(LONG._replace(causal=True, window=(100, None), scale=-0.3), "scattered", (16, 32), sinks=True),
    Masked(LONG._replace(magnitude=10.0), "window"),
    Masked(Case(70, 70, batch=0), "causal"),
]


def masked_name(masked):
    options = [f"{name}={v}" for name, v in masked.case._asdict().items() if v != Case._field_defaults[name]]
    more = [f"{name}={v}" for name, v in list(masked._asdict().items())[1:] if v != Masked._field_defaults[name]]
    return "-".join([*options, *more]).replace(" ", "")


def mask_mod_of(masked):
    mask_mod, (per_batch, per_head) = MASKS[masked.mask](masked.case), masked.per

    def call(batch, head, query, key):
        return mask_mod(batch if per_batch else 0 * batch, head if per_head else 0 * head, query, key)

    return call


def sizes_of(masked):
    case = masked.case
    return (case.batch if masked.per[0] else None), (case.heads if masked.per[1] else None)


def block_mask_of(masked):
    case = masked.case
    lengths = case.query_length, case.key_length
    return nearpeak.create_block_mask(mask_mod_of(masked), *sizes_of(masked), *lengths, block_size=masked.block)


def dense_of(masked):
    """Asked of all queries and keys at once."""
    case = masked.case
    batch, heads = (count or 1 for count in sizes_of(masked))
    b, h, q, k = (torch.arange(n) for n in (batch, heads, case.query_length, case.key_length))
    allowed = mask_mod_of(masked)(b[:, None, None, None], h[:, None, None], q[:, None], k)
    return allowed.expand(batch, heads, len(q), len(k))


def extras_of(masked):
    sinks = randn(masked.case.heads, seed=masked.case.seed + 6) if masked.sinks else None
    slopes = randn(masked.case.heads, seed=8).abs() * 0.1 if masked.alibi else None
    return sinks, slopes


def served(masked):
    case, block_mask = masked.case, block_mask_of(masked)
    sinks, slopes = extras_of(masked)

    def call(query, key, value):
        return nearpeak.attention(
            query, key, value, causal=case.causal, window=case.window, scale=case.scale, softcap=case.softcap,
            block_mask=block_mask, sinks=sinks, alibi_slopes=slopes, return_lse=True,
        )  # fmt: skip

    return call


def exact_layer(masked):
    case, dense = masked.case, dense_of(masked)
    sinks, slopes = (each if each is None else each.double() for each in extras_of(masked))

    def call(query, key, value):
        options = *window_of(case), scale_of(case), case.softcap
        return reference.attention(query, key, value, *options, dense, None, slopes, sinks)

    return call


def plain_layers(masked):
    """Eager operators, and torch's fused attention where it can do the case."""
    case, mask = masked.case, dense_of(masked) & mask_of(masked.case)
    mask = mask.expand(case.batch, case.heads, *mask.shape[2:])
    sinks, slopes = extras_of(masked)
    distance = reference.distances(case.query_length, case.key_length, "cpu").abs()

    def eager(query, key, value):
        terms = [] if slopes is None else [-slopes[:, None, None].to(query.dtype) * distance]
        sink = sinks if sinks is None else sinks.to(query.dtype)
        return plain.attention(query, key, value, mask, scale_of(case), case.softcap, terms, sink)

    def fused(query, key, value):
        out = plain.fused_attention(query, key, value, mask, scale_of(case))
        return out, eager(query, key, value)[1]

    alone = case.softcap or masked.sinks or masked.alibi or case.key_length == 0 or not mask.any(-1).all()
    return [eager] if alone else [eager, fused]


def standards_of(masked, draws):
    plains = [values(layer, draws) for layer in plain_layers(masked)]
    return standards(plains, values(exact_layer(masked), doubled(draws)))


@functools.lru_cache(maxsize=2)
def standard(masked, dtype):
    return standards_of(masked, draws_of(masked.case, dtype, count=FEW_DRAWS))


@pytest.mark.parametrize("masked", CASES, ids=masked_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_are_as_exact_as_plain(serving, dtype, masked):
    assert_as_exact(values(served(masked), draws_of(masked.case, dtype, count=FEW_DRAWS)), standard(masked, dtype))


@pytest.mark.parametrize("per", [(False, False), EACH], ids=["one", "each"])
@pytest.mark.parametrize("bounds", ["packed", "ranges"])
def test_sequences_of_different_lengths(serving, bounds, per):
    """The block mask counts in the tensors, whatever sequences lie in them."""
    case = Case(200, 260, heads=4, key_heads=2, batch=1 if bounds == "packed" else 2)
    masked = Masked(case, "scattered", (16, 32), per)
    inputs, grads = inputs_of(case, torch.float32)
    options = {"key_starts": torch.tensor([3, 70]), "key_ends": torch.tensor([250, 260])}
    if bounds == "packed":
        options = {"query_starts": torch.tensor([0, 90, 90, 200]), "key_starts": torch.tensor([0, 101, 130, 260])}

    def masked_by(**mask):
        def call(query, key, value):
            return nearpeak.attention(query, key, value, causal=True, return_lse=True, **options, **mask)

        return plain.value_and_gradients(call, inputs, grads)

    mine, expected = masked_by(block_mask=block_mask_of(masked)), masked_by(mask=dense_of(masked))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_dropout_bias_and_mask_go_with_it(serving):
    masked = Masked(LONG, "scattered", (16, 16), EACH)
    (query, key, value), grads = inputs_of(LONG, torch.float32)
    bias, mask = randn(1, 4, 1, 410, seed=9), randn(2, 1, 300, 410, seed=10) < 1.0

    def masked_by(mask, **block_mask):
        def call(query, key, value, bias):
            options = {"mask": mask, "bias": bias, "dropout_p": 0.3, "dropout_seed": 5, **block_mask}
            return nearpeak.attention(query, key, value, return_lse=True, **options)

        return plain.value_and_gradients(call, (query, key, value, bias), grads)

    mine, expected = masked_by(mask, block_mask=block_mask_of(masked)), masked_by(mask & dense_of(masked))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_rows_without_a_key(serving):
    """Zeros, lse of -inf, and gradients of zero, also where other rows of the block see keys."""
    case = Case(150, 300, heads=2)
    block_mask = nearpeak.create_block_mask(lambda b, h, q, k: (q % 3 == 0) & (q < 140), None, None, 150, 300)
    inputs, grads = inputs_of(case, torch.float32)
    out, lse, d_query, d_key, d_value = plain.value_and_gradients(
        lambda *tensors: nearpeak.attention(*tensors, block_mask=block_mask, return_lse=True), inputs, grads
    )
    unseeing = (torch.arange(150) % 3 != 0) | (torch.arange(150) >= 140)
    assert (out[:, :, unseeing] == 0).all()
    assert (lse[:, :, unseeing] == -torch.inf).all()
    assert (d_query[:, :, unseeing] == 0).all()
    assert all(t.isfinite().all() for t in (out, lse[:, :, ~unseeing], d_query, d_key, d_value))


@pytest.mark.parametrize("mask", ["documents", "scattered", "window"])
def test_same_bits_on_any_number_of_threads(serving, mask):
    if serving == "reference":
        pytest.skip("PyTorch's matrix products sum in an order that depends on the threads")
    masked = Masked(Case(210, 400, heads=4, key_heads=2, batch=2), mask, (32, 64), EACH)
    inputs, grads = inputs_of(masked.case, torch.float32)
    expected = plain.value_and_gradients(served(masked), inputs, grads)
    for threads in (2, 5, 2):
        torch.set_num_threads(threads)
        again = plain.value_and_gradients(served(masked), inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_values_of_keys_in_blocks_that_nobody_lists_are_not_read(serving):
    """What makes masked blocks cheap: NaN in them does not show."""
    if serving == "reference":
        pytest.skip("the reference multiplies all values, by zeros")
    block_mask = nearpeak.create_block_mask(lambda b, h, q, k: (k < 256) | (k >= 1024), None, None, 64, 1300)
    query, key = randn(1, 2, 64, 32), randn(1, 2, 1300, 32, seed=1)
    key[:, :, 288:960] = torch.nan
    assert nearpeak.attention(query, key, key, block_mask=block_mask).isfinite().all()


# What makes a block mask.


@pytest.mark.parametrize("masked", CASES, ids=masked_name)
def test_a_block_mask_says_what_its_mask_mod_says(masked):
    block_mask, dense = block_mask_of(masked), dense_of(masked)
    assert torch.equal(block_mask.dense(), dense)
    rows, keys = masked.block
    pads = 0, -dense.shape[3] % keys, 0, -dense.shape[2] % rows
    blocks = torch.nn.functional.pad(dense, pads).unflatten(3, (-1, keys)).unflatten(2, (-1, rows))
    seen = int(blocks.any(5).any(3).sum()) if blocks.numel() else 0
    assert len(block_mask.entries) == seen
    assert block_mask.density() == pytest.approx(seen / max(1, blocks.shape[:3].numel() * blocks.shape[4]))


def test_equal_bits_are_kept_once():
    block_mask = nearpeak.create_block_mask(masks.sliding_window(1024), None, None, 4096, 4096)
    assert len(block_mask.bits) == 2
    assert len(block_mask.entries) == 24 * 9 + sum(range(1, 9))


@pytest.mark.parametrize("apart", [True, False], ids=["full blocks apart", "all partial"])
@pytest.mark.parametrize("block", [128, 64, (32, 16)], ids=str)
@pytest.mark.parametrize("mask", ["documents", "window", "scattered"])
def test_a_block_mask_of_torch(serving, mask, block, apart):
    size = block if isinstance(block, tuple) else (block, block)
    masked = Masked(LONG, mask, size, EACH)
    shape = *sizes_of(masked), 300, 410
    of_torch = flex_attention.create_block_mask(mask_mod_of(masked), *shape, device="cpu", BLOCK_SIZE=block)
    if not apart:
        blocks = of_torch.to_dense().bool()
        of_torch = flex_attention.BlockMask.from_kv_blocks(
            blocks.sum(-1).int(), blocks.int().sort(dim=-1, descending=True, stable=True).indices.int(),
            BLOCK_SIZE=size, mask_mod=mask_mod_of(masked), seq_lengths=(300, 410),
        )  # fmt: skip
        assert of_torch.full_kv_num_blocks is None
    ours, converted = block_mask_of(masked), nearpeak.BlockMask.from_torch(of_torch)
    assert all(torch.equal(a, b) for a, b in zip(converted[:3], ours[:3], strict=True))
    inputs, _ = inputs_of(LONG, torch.float32)
    mine, expected = (nearpeak.attention(*inputs, block_mask=each) for each in (of_torch, ours))
    assert torch.equal(mine, expected)


def test_compiles_without_graph_break():
    masked = Masked(LONG, "scattered", (16, 32), EACH)
    inputs, grads = inputs_of(LONG, torch.float32)
    block_mask = block_mask_of(masked)

    def layer(query, key, value, block_mask):
        return nearpeak.attention(query, key, value, block_mask=block_mask, return_lse=True)

    def results(function):
        return plain.value_and_gradients(lambda *tensors: function(*tensors, block_mask), inputs, grads)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(results(compiled), results(layer), strict=True))


def test_explain_names_the_kernel():
    block_mask = nearpeak.create_block_mask(masks.causal, None, None, 40, 40)
    x = randn(1, 1, 40, 8)
    text = nearpeak.explain(nearpeak.attention, x, x, x, block_mask=block_mask)
    assert "nearpeak::attention_blocks_inference on cpu" in text


def attend(block_mask=None, query=None, **replaced):
    """Of 2 batch entries, 4 heads, 50 queries and 60 keys, under a causal mask in blocks of 16."""

    def run():
        whole = nearpeak.create_block_mask(masks.causal, None, None, 50, 60, block_size=16)
        mask = whole._replace(**{name: change(getattr(whole, name)) for name, change in replaced.items()})
        key = torch.ones(2, 2, 60, 8)
        return nearpeak.attention(
            torch.ones(2, 4, 50, 8) if query is None else query,
            key,
            key,
            block_mask=mask if block_mask is None else block_mask,
        )

    return run


def create(mask_mod=masks.causal, batch=None, heads=None, length=60, size=16):
    return lambda: nearpeak.create_block_mask(mask_mod, batch, heads, 50, length, block_size=size)


def changed(index, number):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = number
        return tensor

    return change


BAD = {
    "mask_of_another_kind": (TypeError, "block_mask must", attend(torch.ones(50, 60).bool())),
    "other_lengths": (ValueError, "block_mask must be of query's", attend(query=torch.ones(2, 4, 49, 8))),
    "query_of_3_dimensions": (ValueError, "query must", attend(query=torch.ones(4, 50, 8))),
    "other_batch": (ValueError, "block_mask must be of query's batch", attend(starts=lambda t: t.expand(3, 1, 5))),
    "other_heads": (ValueError, "block_mask must be of query's batch", attend(starts=lambda t: t.expand(1, 2, 5))),
    "starts_of_int32": (TypeError, "block_mask.starts must", attend(starts=lambda t: t.int())),
    "entries_of_int64": (TypeError, "block_mask.entries must", attend(entries=lambda t: t.long())),
    "bits_of_uint8": (TypeError, "block_mask.bits must", attend(bits=lambda t: t.to(torch.uint8))),
    "starts_too_few": (ValueError, "block_mask.starts, entries", attend(starts=lambda t: t[..., :-1])),
    "starts_flat": (ValueError, "block_mask.starts must", attend(starts=lambda t: t[0, 0])),
    "entries_of_three": (ValueError, "block_mask.starts, entries", attend(entries=lambda t: t.repeat(1, 2)[:, :3])),
    "bits_elsewhere": (ValueError, "block_mask.bits must", attend(bits=lambda t: t.to("meta"))),
    "starts_beyond": (ValueError, "block_mask's lists", attend(starts=changed((0, 0, -1), 1000))),
    "starts_fall": (ValueError, "block_mask's lists", attend(starts=changed((0, 0, 1), 9))),
    "starts_negative": (ValueError, "block_mask's lists", attend(starts=changed((0, 0, 0), -1))),
    "key_block_beyond": (ValueError, "block_mask's lists", attend(entries=changed((-1, 0), 4))),
    "key_block_negative": (ValueError, "block_mask's lists", attend(entries=changed((0, 0), -1))),
    "key_block_twice": (ValueError, "block_mask's lists", attend(entries=changed((2, 0), 0))),
    "bits_beyond": (ValueError, "block_mask's lists", attend(entries=changed((0, 1), 99))),
    "bits_negative": (ValueError, "block_mask's lists", attend(entries=changed((0, 1), -2))),
    "mask_mod_of_floats": (TypeError, "mask_mod must", create(lambda b, h, q, k: (q - k).float())),
    "mask_mod_of_python": (TypeError, "mask_mod must", create(lambda b, h, q, k: True)),
    "mask_mod_of_another_shape": (ValueError, "mask_mod must", create(lambda b, h, q, k: torch.ones(3, 7).bool())),
    "no_batch": (ValueError, "batch and heads must", create(batch=0)),
    "heads_as_text": (ValueError, "batch and heads must", create(heads="4")),
    "length_below_0": (ValueError, "query_length and key_length must", create(length=-1)),
    "block_of_none": (ValueError, "block_size must", create(size=0)),
    "block_of_three": (ValueError, "block_size must", create(size=(16, 16, 16))),
    "chunk_of_none": (ValueError, "size must", lambda: masks.chunked(0)),
    "documents_3d": (ValueError, "ids must", lambda: masks.documents(torch.ones(2, 3, 4).long())),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(serving, bad):
    error, message, run = BAD[bad]
    with pytest.raises(error, match=message):
        run()


@st.composite
def random_masked(draw):
    key_heads = draw(st.integers(1, 2))
    case = Case(
        query_length=draw(st.integers(1, 70)),
        key_length=draw(st.integers(1, 200)),
        head_dim=draw(st.integers(1, 40)),
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        batch=draw(st.integers(1, 2)),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        seed=draw(st.integers(0, 99)),
    )
    sides = st.sampled_from([1, 5, 16, 17, 32, 64, 100, 128])
    return Masked(
        case,
        mask=draw(st.sampled_from(sorted(MASKS))),
        block=(draw(sides), draw(sides)),
        per=(draw(st.booleans()), draw(st.booleans())),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_block_masks_are_as_exact_as_plain(serving, dtype, examples):
    @for_all(examples, masked=random_masked())
    def check(masked):
        draws = draws_of(masked.case, dtype, count=examples.draws)
        assert_as_exact(values(served(masked), draws), standards_of(masked, draws))
