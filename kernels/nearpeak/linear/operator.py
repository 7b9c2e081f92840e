"""The torch operators of linear layers, and their public function.

There are kernels for the CPU. GPUs have cuBLAS and its like behind torch's own function, and so have CPUs for some
dtypes: those calls are handed to torch.
"""

import torch

from .. import backends, operators
from ..checks import check_floating, check_same_kind
from . import epilogue, reference

KERNELS = ("cpu",)
ZEN_5 = 26

# Fewer outputs do not fill a tile of the kernels' products, which then take up to twice torch's time in float32.
FEW_OUTPUTS = 16


def few_rows(dtype, recorded=False):
    """Up to this many rows the weight's bytes are the limit, and the kernels come closer to it than torch's do.

    With matrix units torch's overtake at 65 to 128 rows, by shape, but where gradients follow: theirs are blocks like
    any other, and take 1.1 times as long as torch's with 32 rows (AMX machine, bfloat16).
    """
    return 64 if dtype is torch.bfloat16 and not recorded and backends.isa() == "amx" else 16


def _fast_in_torch():
    """The dtypes whose products of many rows torch gives to a library that the kernels do not outrun on this CPU.

    Float32 goes to MKL, which runs AVX2 code on AMD's processors: half of what those can do that multiply 512 bits at
    once (Zen 5: the kernels take 0.4 to 0.55 of its time). On x86 oneDNN's products of 16-bit types need AVX-512 at
    least; below that torch runs a naive loop.
    """
    dtypes = []
    if not (
        backends.amd_family() >= ZEN_5 and "avx512" in backends.isas_supported() and torch.backends.mkl.is_available()
    ):
        dtypes.append(torch.float32)
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2"):
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes.append(torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            dtypes.append(torch.float16)
    return frozenset(dtypes)


FAST_IN_TORCH = _fast_in_torch()


def why_torch_serves(x, weight, recorded):
    """Why a call goes to torch's own function, or None if the kernels serve it."""
    if backends.forced("cpu"):
        return None
    if not x.is_cpu:
        return f"on {x.device.type} torch's own library is the one to use: torch's linear serves it"
    few = few_rows(x.dtype, recorded)
    if x.numel() <= few * x.shape[-1]:
        return None
    if x.dtype in FAST_IN_TORCH:
        return f"more than {few} rows of {x.dtype} are what torch's own library is fast at: torch's linear serves it"
    if x.dtype is torch.float32 and weight.shape[0] < FEW_OUTPUTS:
        return f"fewer than {FEW_OUTPUTS} outputs in float32 are what torch is fast at: torch's linear serves it"
    return None


def check_bias(bias, x, out_features):
    if bias is not None:
        check_same_kind("bias", bias, "x", x)
        if bias.shape != (out_features,):
            raise ValueError(f"bias must have shape {(out_features,)}, not {tuple(bias.shape)}")


def check_linear(x, weight, bias):
    check_floating("x", x)
    if not x.dim():
        raise ValueError("x must have at least one dimension")
    check_same_kind("weight", weight, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must be (out_features, in_features) with in_features {x.shape[-1]}, x's last dimension, "
            f"not of shape {tuple(weight.shape)}"
        )
    check_bias(bias, x, weight.shape[0])


def _check_epilogue(x, weight, bias, residual, activation, keep):
    check_linear(x, weight, bias)
    epilogue.check(x, weight.shape[0], residual, activation)


def _check_input_gradient(grad, weight):
    check_floating("grad", grad)
    check_same_kind("weight", weight, "grad", grad)
    if not grad.dim() or weight.dim() != 2 or weight.shape[0] != grad.shape[-1]:
        raise ValueError(f"grad must have weight's {tuple(weight.shape)} out_features, not shape {tuple(grad.shape)}")


def _check_weight_gradient(grad, x):
    check_floating("grad", grad)
    check_same_kind("x", x, "grad", grad)
    if not grad.dim() or x.shape[:-1] != grad.shape[:-1]:
        raise ValueError(f"x must have grad's rows {tuple(grad.shape[:-1])}, not shape {tuple(x.shape)}")


def _check_bias_gradient(grad):
    check_floating("grad", grad)
    if not grad.dim():
        raise ValueError("grad must have at least one dimension")


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx, grad):
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        torch.ops.nearpeak.linear_input_gradient(grad, weight) if for_x else None,
        torch.ops.nearpeak.linear_weight_gradient(grad, x) if for_weight else None,
        torch.ops.nearpeak.linear_bias_gradient(grad) if for_bias else None,
    )


def _save_epilogue(ctx, inputs, output):
    x, weight, _, _, activation, _ = inputs
    epilogue.save(ctx, output, activation, x, weight)


def _epilogue_gradient(ctx, grad, _):
    before, x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias, for_residual, *_ = ctx.needs_input_grad
    inner = epilogue.gradient_of_product(grad, before, ctx.activation)
    return (
        torch.ops.nearpeak.linear_input_gradient(inner, weight) if for_x else None,
        torch.ops.nearpeak.linear_weight_gradient(inner, x) if for_weight else None,
        torch.ops.nearpeak.linear_bias_gradient(inner) if for_bias else None,
        grad if for_residual else None,
        None,
        None,
    )


operators.define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    check=check_linear,
    reference=reference.linear,
    shapes=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    backward=_gradient,
    setup_context=_save,
)
operators.define(
    "linear_epilogue(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int? activation, bool keep) "
    "-> (Tensor, Tensor)",
    check=_check_epilogue,
    reference=reference.linear_epilogue,
    shapes=lambda x, weight, bias, residual, activation, keep: epilogue.shapes(x, weight.shape[0], keep),
    backward=_epilogue_gradient,
    setup_context=_save_epilogue,
)
operators.define(
    "linear_input_gradient(Tensor grad, Tensor weight) -> Tensor",
    check=_check_input_gradient,
    reference=reference.linear_input_gradient,
    shapes=lambda grad, weight: grad.new_empty(*grad.shape[:-1], weight.shape[1]),
)
operators.define(
    "linear_weight_gradient(Tensor grad, Tensor x) -> Tensor",
    check=_check_weight_gradient,
    reference=reference.linear_weight_gradient,
    shapes=lambda grad, x: x.new_empty(grad.shape[-1], x.shape[-1]),
)
# torch's own sum is as good as any; as an operator it is the same sum in compiled graphs.
operators.define(
    "linear_bias_gradient(Tensor grad) -> Tensor",
    check=_check_bias_gradient,
    reference=reference.linear_bias_gradient,
    shapes=lambda grad: grad.new_empty(grad.shape[-1]),
)

# Looked up once: each attribute of torch.ops costs 0.1 us a call.
_linear = torch.ops.nearpeak.linear.default
_linear_inference = torch.ops.nearpeak.linear_inference.default
_epilogue = torch.ops.nearpeak.linear_epilogue.default
_epilogue_inference = torch.ops.nearpeak.linear_epilogue_inference.default


def linear(x, weight, bias=None, *, activation=None, residual=None):
    """A linear layer, and what follows it: y = f(x weight^T + bias) + residual.

    Sums are float32 whatever the dtype; f and residual are applied to them, and y is rounded once. Calls on GPUs, and
    of many rows in dtypes for which torch has a tuned library on this CPU, go to torch's own function, with f and
    residual after it, and `nearpeak.explain` says so.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64; any strides (a dense last dimension is read
            without a copy).
        weight: (out_features, in_features), x's dtype.
        bias: (out_features,), x's dtype; None for none.
        activation: the name of f, as `nearpeak.activation` takes it; None: f(x) = x.
        residual: (..., out_features), x's dtype, any strides; added last. Under torch.autocast of any dtype, as a sum
            of its own would have it.

    Returns:
        y, (..., out_features), in x's dtype, contiguous. Under torch.autocast as torch's own function.
        With gradients and an activation, what the activation is of is kept for backward beside x and weight.

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or activation that does not fit.

    Tiling: Goto and van de Geijn 2008, https://doi.org/10.1145/1356052.1356053.

    >>> x, weight = torch.randn(4, 640, dtype=torch.bfloat16), torch.randn(2048, 640, dtype=torch.bfloat16)
    >>> y = nearpeak.linear(x, weight)
    >>> y = nearpeak.linear(x, weight, activation="gelu", residual=y)
    """
    if activation is not None or residual is not None:
        return _with_epilogue(x, weight, bias, activation, residual)
    try:
        # On other devices torch's own function sees to it.
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            x, weight, bias = operators.autocast(x), operators.autocast(weight), operators.autocast(bias)
        if backends.reference_serves(x, kernels=KERNELS):
            check_linear(x, weight, bias)
            return reference.linear(x, weight, bias)
        recorded = operators.wants_gradient(x, weight, bias)
        if (why := why_torch_serves(x, weight, recorded)) is not None:
            # What torch would take beyond this: else the same call would fail with fewer rows.
            if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
                check_linear(x, weight, bias)
            backends.because(why)
            return torch.nn.functional.linear(x, weight, bias)
        return (_linear if recorded else _linear_inference)(x, weight, bias)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        check_linear(x, weight, bias)
        raise


def _with_epilogue(x, weight, bias, activation, residual):
    kind = epilogue.kind_of(activation)
    arguments = x, weight, bias, residual, kind, False
    try:
        if operators.autocasts(x):
            x, weight, bias = operators.autocast(x), operators.autocast(weight), operators.autocast(bias)
            if residual is not None and residual.dtype is not x.dtype:
                return linear(x, weight, bias, activation=activation) + residual
        arguments = x, weight, bias, residual, kind, False
        if backends.reference_serves(x, kernels=KERNELS):
            _check_epilogue(*arguments)
            return reference.linear_epilogue(*arguments)[0]
        recorded = operators.wants_gradient(x, weight, bias) or operators.wants_gradient(residual)
        if (why := why_torch_serves(x, weight, recorded)) is not None:
            _check_epilogue(*arguments)
            backends.because(f"{why}, and what follows it after that")
            return epilogue.follow(torch.nn.functional.linear(x, weight, bias), kind, residual)
        if recorded:
            return _epilogue(x, weight, bias, residual, kind, kind is not None)[0]
        return _epilogue_inference(*arguments)[0]
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check_epilogue(*arguments)
        raise
