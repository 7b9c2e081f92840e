"""A paged key-value cache: pages (num_blocks, page_size, heads, head_dim), and for each sequence the list of its pages.

key j of sequence b lies in row j % page_size of page block_table[b, j // page_size]
"""

import torch

from .arguments import check_integers


def used_pages(cache, block_table, lengths):
    """The table up to the longest sequence, int64, zero where a sequence has no page. lengths: (batch,).

    Raises ValueError where the table has no room for a sequence, or names a page for it that is not there. Under
    torch.compile, which has no numbers to look at, it is the whole table.
    """
    check_integers("block_table", block_table, (lengths.shape[0], None), cache.device)
    pages, page_size = cache.shape[:2]
    used = block_table.shape[1]
    if not torch.compiler.is_compiling():
        longest = max(lengths.tolist(), default=0)
        if longest > used * page_size:
            raise ValueError(
                f"block_table must have room for the longest sequence, {longest} keys, not {used} pages of {page_size}"
            )
        used = -(-longest // max(1, page_size))
    begins = torch.arange(used, device=cache.device) * page_size
    table = block_table[:, :used].long().where(begins < lengths[:, None], 0)
    if not torch.compiler.is_compiling() and ((table < 0) | (table >= pages)).any():
        raise ValueError(f"block_table must hold pages 0..{pages - 1}, not {table.tolist()}")
    return table


def gathered(cache, table):
    """(batch, keys, heads, head_dim): each sequence's pages one behind the other."""
    return cache[table].flatten(1, 2)
