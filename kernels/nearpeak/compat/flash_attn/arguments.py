"""flash-attn's arguments checked under flash-attn's names, and put into `nearpeak.attention`'s terms."""

import torch

from ...checks import check_floating, check_same_kind


def options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p=0.0):
    """The keyword arguments of `nearpeak.attention`, in which None is what -1 or 0.0 is in flash-attn."""
    if not isinstance(window_size, (tuple, list, torch.Tensor)) or len(window_size) != 2:
        raise ValueError(f"window_size must be a pair (left, right) of integers, -1 for open, not {window_size!r}")
    return {
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": tuple(None if side < 0 else int(side) for side in window_size),
        "softcap": softcap if softcap > 0.0 else None,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
    }


def check_heads(name, tensor, shape, like=None):
    """Check that a tensor has the dimensions that `shape` names, the last two being heads and head_dim."""
    if like is None:
        check_floating(name, tensor)
    else:
        check_same_kind(name, tensor, "q", like)
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must be {shape}, not of shape {tuple(tensor.shape)}")


def check_grouped(q, k, k_name, v, v_name):
    """Check that heads and head_dim, the last two dimensions, of q and the keys fit, and that v has k's shape."""
    heads, key_heads = q.shape[-2], k.shape[-2]
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} must have q's head_dim, {q.shape[-1]}, not {k.shape[-1]}")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{k_name} must have a number of heads that divides q's {heads}, not {key_heads}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{v_name} must have {k_name}'s shape but for head_dim, {tuple(k.shape)}, not {tuple(v.shape)}"
        )


def check_parts(name, packed, shape):
    """Check a tensor that holds several, in the dimension that is a number in `shape`."""
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(packed).__name__}")
    sizes = shape.strip("()").split(", ")
    if packed.dim() != len(sizes) or any(
        wanted.isdigit() and size != int(wanted) for size, wanted in zip(packed.shape, sizes, strict=True)
    ):  # fmt: skip
        raise ValueError(f"{name} must be {shape}, not of shape {tuple(packed.shape)}")


def check_integers(name, tensor, shape, device):
    """Check an index tensor of flash-attn's, int32 there, int64 as well here."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be a tensor of int32 or int64")
    if tensor.device != device or tensor.dim() != len(shape) or any(
        want is not None and size != want for size, want in zip(tensor.shape, shape, strict=True)
    ):  # fmt: skip
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(
            f"{name} must have the shape {wanted} on {device}, not {tuple(tensor.shape)} on {tensor.device}"
        )


def dense_last(tensor):
    """The tensor, or a copy that is dense in its last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
