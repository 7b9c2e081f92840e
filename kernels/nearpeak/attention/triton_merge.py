"""The Triton kernel that merges attention over parts of the keys into attention over all of them.

lse = log(sum(exp(lse_i))),   out = sum(exp(lse_i - lse) out_i)
"""

import triton
import triton.language as tl

ROWS = 4
THREADS = 128


@triton.jit(do_not_specialize=["splits", "rows", "heads", "length", "out_batch", "out_head", "out_step"])
def merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, rows, heads, length, out_batch, out_head, out_step,
    VECTOR: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """part: (splits, rows, head_dim) float32, rows being (batch, head, position); out has strides of its own."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows)[:, None] & (column < HEAD_DIM)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + at, mask=row < rows, other=float("-inf"))
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, decay = tl.exp(lse - shift), tl.exp(top - shift)
        part = tl.load(part_ptr + at[:, None] * HEAD_DIM + column, mask=inside, other=0.0)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = new_top
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    batch, head, index = row // length // heads, row // length % heads, row % length
    out_rows = out_ptr + batch * out_batch * VECTOR + head * out_head * VECTOR + index * out_step * VECTOR
    tl.store(out_rows[:, None] + column, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row, top + tl.log(total), mask=row < rows)
