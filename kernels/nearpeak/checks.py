"""Checks of arguments that several families need; each error names the argument, its value and what is allowed."""

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}")


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor, *properties: str) -> None:
    """Check that `tensor` agrees with `other` in each of "shape", "dtype" and "device" that is given."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    for attribute in properties:
        value, expected = getattr(tensor, attribute), getattr(other, attribute)
        if value != expected:
            error = TypeError if attribute == "dtype" else ValueError
            value, expected = (tuple(v) if attribute == "shape" else v for v in (value, expected))
            raise error(f"{name} must have {other_name}'s {attribute}, {expected}, not {value}")


def check_same_kind(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that `tensor` agrees with `other` in dtype and device, at a third of check_same's cost."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != other.dtype or tensor.device != other.device:
        check_same(name, tensor, other_name, other, "dtype", "device")


def check_dense_last(name: str, tensor: torch.Tensor) -> None:
    """Check that elements of the last dimension are neighbours in memory."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(
            f"{name} must be dense in its last dimension (stride 1, not {tensor.stride(-1)}): "
            f"call {name}.contiguous() first"
        )


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")


def check_float_of(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Check that `tensor` is on query's device, and of query's dtype or float32, which every kernel reads beside it."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in (like.dtype, torch.float32):
        raise TypeError(f"{name} must have query's dtype, {like.dtype}, or float32, not {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on query's device, {like.device}, not {tensor.device}")


def check_parameter(name: str, parameter: torch.Tensor | None, x: torch.Tensor, x_name: str) -> None:
    """Check that a weight or bias over x's last dimension is on its device, and of its dtype or float32."""
    if parameter is None:
        return
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, not {type(parameter).__name__}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x_name}'s device {x.device}, not on {parameter.device}")
    if parameter.shape != x.shape[-1:]:
        raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, {x_name}'s last, not {tuple(parameter.shape)}")
    if parameter.dtype is not x.dtype and parameter.dtype is not torch.float32:
        raise TypeError(f"{name} must be {x.dtype} as {x_name}, or float32, not {parameter.dtype}")
