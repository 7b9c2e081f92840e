"""The gradient of an embedding's table on the GPU, without atomics: the same bits on every run.

d_table[row] = scale * the sum of d_hidden over the tokens that took the row

The tokens are sorted by their rows, those of one row in their own order, and cut into blocks of BLOCK_TOKENS. A row's
run within one block is summed by one program, and goes straight to the table where all of it lies in that block. What
is left of each block are the parts of two runs at most, one that began in a block before and one that goes on into the
next; a second kernel adds up a row's parts in their order.
"""

import torch
import triton
import triton.language as tl

from .. import triton_launch

# Long runs (of the rows of segments, or of frequent words) are summed by as many programs at once as they have blocks.
BLOCK_TOKENS = 64
WIDEST_COLUMNS = 1024  # columns that one program takes
PER_THREAD = 8


@triton.jit
def _store_row(d_table_ptr, row, rows, padding, columns, width, values):
    if (row >= 0) & (row < rows) & (row != padding):
        tl.store(d_table_ptr + row * width + columns, values.to(d_table_ptr.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["tokens", "rows", "padding", "width_vectors", "stride_vectors"])
def _sum_runs(
    d_hidden_ptr, rows_ptr, order_ptr, d_table_ptr, parts_ptr,
    tokens, rows, padding, width_vectors, stride_vectors, scale,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program for each sorted token; all but the first of a row's run in a block have nothing to do."""
    first = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + first)
    before = tl.load(rows_ptr + tl.maximum(first - 1, 0))
    begins = (first == 0) | (before != row)
    block = first // BLOCK_TOKENS
    if begins | (first % BLOCK_TOKENS == 0):
        places = first + tl.arange(0, BLOCK_TOKENS)
        in_block = (places < (block + 1) * BLOCK_TOKENS) & (places < tokens)
        count = tl.sum((in_block & (tl.load(rows_ptr + places, mask=in_block, other=-1) == row)).to(tl.int32))
        after = tl.load(rows_ptr + tl.minimum(first + count, tokens - 1))
        ends = (first + count == tokens) | (after != row)
        width = width_vectors * VECTOR
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for place in range(0, count):
            token = tl.load(order_ptr + first + place)
            from_row = d_hidden_ptr + token * stride_vectors * VECTOR
            total += tl.load(from_row + columns, mask=columns < width, other=0.0).to(tl.float32)
        if begins & ends:
            _store_row(d_table_ptr, row, rows, padding, columns, width, scale * total)
        else:
            part = 2 * block + (first % BLOCK_TOKENS != 0).to(tl.int64)
            tl.store(parts_ptr + part * width + columns, total, mask=columns < width)


@triton.jit(do_not_specialize=["tokens", "rows", "padding", "width_vectors"])
def _sum_parts(
    rows_ptr, d_table_ptr, parts_ptr, tokens, rows, padding, width_vectors, scale,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program for each block: of the run that begins in it and goes on into the next, if there is one."""
    block = tl.program_id(0).to(tl.int64)
    following = (block + 1) * BLOCK_TOKENS
    if following < tokens:
        row = tl.load(rows_ptr + following)
        places = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        count = tl.sum((tl.load(rows_ptr + places) == row).to(tl.int32))  # of the run, in this block
        before = tl.load(rows_ptr + tl.maximum(block * BLOCK_TOKENS - 1, 0))
        began_before = (count == BLOCK_TOKENS) & (block > 0) & (before == row)
        if (count > 0) & (began_before == 0):
            width = width_vectors * VECTOR
            columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            part = 2 * block + (count != BLOCK_TOKENS).to(tl.int64)
            total = tl.load(parts_ptr + part * width + columns, mask=columns < width, other=0.0)
            goes_on = row == row
            while goes_on:
                part = 2 * (following // BLOCK_TOKENS)
                total += tl.load(parts_ptr + part * width + columns, mask=columns < width, other=0.0)
                following += BLOCK_TOKENS
                next_row = tl.load(rows_ptr + tl.minimum(following, tokens - 1))
                goes_on = (following < tokens) & (next_row == row)
            _store_row(d_table_ptr, row, rows, padding, columns, width, scale * total)


def table_gradient(d_hidden, ids, rows, scale, padding_idx):
    """d_table, (rows, width). ids: of the first tokens, again and again for the others."""
    tokens, width = d_hidden.shape
    d_table = d_hidden.new_zeros(rows, width)
    if tokens == 0 or d_table.numel() == 0:
        return d_table
    d_hidden = d_hidden if d_hidden.stride(1) == 1 else d_hidden.contiguous()
    taken, order = ids.flatten().repeat(tokens // ids.numel()).sort(stable=True)
    vector = triton_launch.vector_length(d_hidden.element_size(), width, d_hidden.stride(0))
    columns = min(WIDEST_COLUMNS, max(16, triton.next_power_of_2(width)))
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    parts = torch.empty(2 * blocks, width, dtype=torch.float32, device=d_hidden.device)
    device = triton_launch.describe(d_hidden.device)
    options = {"VECTOR": vector, "BLOCK": columns, "BLOCK_TOKENS": BLOCK_TOKENS}
    options |= device.options(max(device.lanes, columns // PER_THREAD))
    sizes = tokens, rows, padding_idx, width // vector
    with triton_launch.on(d_hidden.device):
        grid = triton.cdiv(width, columns)
        _sum_runs[(tokens, grid)](
            d_hidden, taken, order, d_table, parts, *sizes, d_hidden.stride(0) // vector, scale, **options
        )
        _sum_parts[(blocks, grid)](taken, d_table, parts, *sizes, scale, **options)
    return d_table
