"""Which elements dropout keeps: the definition, in integers of PyTorch.

    (low, high) = the halves of mix(mix(mix(seed) + batch entry * heads + head) + row)
    x           = column + low
    x           = (x ^ x >> 16) * 0x21f0aaad ^ high
    x           = (x ^ x >> 15) * 0xd35a2d97
    keep        = (x ^ x >> 15) >= round(2^32 p)                                       (all in 32 bits without sign)

and mix is splitmix64's, in 64 bits. Of attention weights rows and columns are counted in the query and key tensors as
they are given: in a packed batch not from each sequence's first. Of a layer's output, which has one head, rows are
tokens and columns features. So the mask is a function of seed and place: every backend, tile and thread
finds the same one, forward and backward, and none is stored.

Counter-based generators: Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. Their Philox takes seven rounds
of two products of 32 by 32 bits into 64 for four numbers, which vectors make for half their lanes at a time; here a
weight costs two products of 32 bits. mix: Steele et al. 2014, https://doi.org/10.1145/2660193.2660195. The other is
lowbias32, https://github.com/skeeto/hash-prospector, with the row's second half between its rounds, so that rows are no
shifted copies of one another.
"""

import torch

from . import operators

_LOW = 0xFFFFFFFF


def check(dropout_p, seed, device):
    """Check the arguments of a public function; device: of its input."""
    if not (isinstance(dropout_p, (int, float)) and 0.0 <= dropout_p < 1.0):
        raise ValueError(f"dropout_p must be a number from 0 to less than 1, not {dropout_p!r}")
    if seed is None or (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        return
    if not isinstance(seed, torch.Tensor) or seed.dtype is not torch.int64:
        raise TypeError(f"dropout_seed must be an integer of 64 bits, or a tensor of int64 with one, not {seed!r}")
    if seed.dim() != 0 or seed.device != device:
        raise ValueError(f"dropout_seed must have no dimension and lie on {device}, not have shape {tuple(seed.shape)}")


def check_drawn(dropout_p, seed, device):
    """Check the arguments of an operator, whose seed is drawn already."""
    check(dropout_p, seed, device)
    if dropout_p > 0.0 and seed is None:
        raise ValueError("dropout_seed must be given where dropout_p is")


def seed_of(dropout_p, seed, device):
    """The seed given, checked, or one drawn by torch's generator: a tensor, so that compiled graphs hold no number."""
    check(dropout_p, seed, device)
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    return seed if isinstance(seed, torch.Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def threshold(p):
    """The elements whose hash, a number of 32 bits without sign, is at least this are kept."""
    return min(round(p * 2**32), _LOW)


def kept(seed, p, shape, first=(0, 0, 0)):
    """The boolean mask of `shape`, (batch, heads, query length, key length): True where an element is kept.

    seed: an int64 tensor of one element. first: the batch entry, row and column that the mask begins with.
    """
    return torch.ops.nearpeak.dropout_mask(seed, p, shape, first)


def _kept(seed, p, shape, first):
    batch, heads, query_length, key_length = shape
    numbers = [torch.arange(size, device=seed.device) for size in (batch * heads, query_length, key_length)]
    of_heads = _mixed(_mixed(seed) + (numbers[0] + first[0] * heads))
    of_rows = _mixed(of_heads[:, None] + (numbers[1] + first[1]))[..., None]
    x = (numbers[2] + first[2] + of_rows) & _LOW
    x = ((x ^ (x >> 16)) * 0x21F0AAAD & _LOW) ^ _shifted(of_rows, 32)
    x = (x ^ (x >> 15)) * 0xD35A2D97 & _LOW
    x = x ^ (x >> 15)
    return (x >= threshold(p)).unflatten(0, (batch, heads))


def _mixed(x):
    """Products and sums of int64 tensors are those of 64 bits without sign."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x, bits):
    """To the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _check(seed, p, shape, first):
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be one int64, not {tuple(seed.shape)} of {seed.dtype}")
    if len(shape) != 4 or len(first) != 3:
        raise ValueError(f"shape must have four dimensions and first three numbers, not {shape} and {first}")


# An operator, so that compilers leave it alone: of a seed that is a constant, torch 2.13's inductor made another mask.
operators.define(
    "dropout_mask(Tensor seed, float p, SymInt[] shape, SymInt[] first) -> Tensor",
    check=_check,
    reference=_kept,
    shapes=lambda seed, p, shape, first: seed.new_empty(shape, dtype=torch.bool),
)
