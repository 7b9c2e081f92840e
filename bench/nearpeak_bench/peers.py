"""Other libraries' kernels as baselines, where they are installed; where they are not, reports list them as absent.

Liger-Kernel, flash-attn, FlashInfer, xformers, quack and SDPA's own backends serve GPUs; onnxruntime serves CPUs. Each
is imported by the case that asks for it.
"""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import attention, feedforward, layer_norm, linear, norm, rotary
from .cases import Absent


def _on_gpu(tensor: torch.Tensor, narrow: bool = False) -> None:
    """narrow: the library has kernels for types of 16 bits only."""
    if not tensor.is_cuda:
        raise Absent("it serves GPUs")
    if narrow and tensor.dtype not in (torch.bfloat16, torch.float16):
        raise Absent(f"it does not serve {tensor.dtype}")


# Norms, rotary embedding, feed-forward


@norm.rms_norm.implementation("Liger", baseline=True)
def _(x, weight):
    _on_gpu(x)
    from liger_kernel.transformers.functional import liger_rms_norm

    # In place, backward would write into the incoming gradient.
    return lambda: liger_rms_norm(x, weight, norm.EPS, in_place=False)


@norm.rms_norm.implementation("FlashInfer", baseline=True)
def _(x, weight):
    _on_gpu(x, narrow=True)
    from flashinfer.norm import rmsnorm

    return lambda: rmsnorm(x, weight, norm.EPS)


@norm.rms_norm.implementation("quack", baseline=True)
def _(x, weight):
    _on_gpu(x)
    from quack import rmsnorm

    return lambda: rmsnorm(x, weight, eps=norm.EPS)


@norm.add_rms_norm.implementation("Liger", baseline=True)
def _(x, residual, weight):
    _on_gpu(x)
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda: liger_fused_add_rms_norm(x, residual, weight, norm.EPS, in_place=False)


@layer_norm.layer_norm.implementation("Liger", baseline=True)
def _(x, weight, bias):
    _on_gpu(x)
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda: liger_layer_norm(x, weight, bias, layer_norm.EPS)


# Liger turns the tensors that it is given.
@rotary.apply_rotary_inplace.implementation("Liger", baseline=True)
def _(query, key, cos, sin):
    _on_gpu(query)
    from liger_kernel.transformers.functional import liger_rope

    return lambda: liger_rope(query, key, cos, sin)


@feedforward.OPERATORS["swiglu"].implementation("Liger", baseline=True)
def _(gate, up):
    _on_gpu(gate)
    from liger_kernel.transformers.functional import liger_swiglu

    return lambda: liger_swiglu(gate, up)


@feedforward.OPERATORS["geglu_tanh"].implementation("Liger", baseline=True)
def _(gate, up):
    _on_gpu(gate)
    from liger_kernel.transformers.functional import liger_geglu

    return lambda: liger_geglu(gate, up)


# Attention. These libraries' tensors are (batch, sequence, heads, head_dim), FlashInfer's without a batch.


def _by_sequence(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _window(mask) -> tuple[int, int]:
    """(left, right) as flash-attn has it: -1 where there is no end."""
    left, right = attention.sides(mask)
    return -1 if left is None else left, -1 if right is None else right


def _flash_attn(query, key, value, mask):
    _on_gpu(query, narrow=True)
    from flash_attn import flash_attn_func

    tensors, window = _by_sequence(query, key, value), _window(mask)
    return lambda: flash_attn_func(*tensors, causal=window[1] == 0, window_size=window).transpose(1, 2)


def _flashinfer(query, key, value, mask):
    _on_gpu(query, narrow=True)
    from flashinfer import single_prefill_with_kv_cache

    tensors, (left, right) = [tensor[0] for tensor in _by_sequence(query, key, value)], _window(mask)
    return lambda: single_prefill_with_kv_cache(*tensors, causal=right == 0, window_left=left).transpose(0, 1)[None]


def _xformers(query, key, value, mask):
    _on_gpu(query)
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    # Groups of heads are a dimension of their own there; keys are expanded, not copied.
    query, key, value = _by_sequence(query, key, value)
    key_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    query = query.unflatten(2, (key_heads, group))
    key, value = (tensor[:, :, :, None].expand(-1, -1, -1, group, -1) for tensor in (key, value))
    left, right = attention.sides(mask)
    bias = None
    if left is not None:
        bias = attn_bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
    elif right == 0:
        bias = attn_bias.LowerTriangularFromBottomRightMask()
    return lambda: memory_efficient_attention(query, key, value, attn_bias=bias).flatten(2, 3).transpose(1, 2)


def _sdpa_by(backend: SDPBackend) -> Callable:
    def prepare(query, key, value, mask):
        _on_gpu(query)
        call = attention.sdpa(query, key, value, mask)

        def chosen():
            with sdpa_kernel(backend):
                return call()

        return chosen

    return prepare


for _operator in (attention.attention, attention.attention_window):
    _operator.implementation("flash-attn", baseline=True)(_flash_attn)
    _operator.implementation("FlashInfer", baseline=True)(_flashinfer)
    _operator.implementation("xformers", baseline=True)(_xformers)

for _name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
    _title = f"SDPA {_name.removesuffix('_ATTENTION').lower()}"
    attention.attention.implementation(_title, baseline=True)(_sdpa_by(getattr(SDPBackend, _name)))


@attention.attention_decode.implementation("flash-attn", baseline=True)
def _(query, key, value, mask):
    _on_gpu(query, narrow=True)
    from flash_attn import flash_attn_with_kvcache

    tensors = _by_sequence(query, key, value)
    return lambda: flash_attn_with_kvcache(*tensors).transpose(1, 2)


@attention.attention_decode.implementation("FlashInfer", baseline=True)
def _(query, key, value, mask):
    _on_gpu(query, narrow=True)
    from flashinfer import single_decode_with_kv_cache

    keys, values = (tensor[0] for tensor in _by_sequence(key, value))
    one = query[0, :, 0]
    return lambda: single_decode_with_kv_cache(one, keys, values)[None, :, None]


# onnxruntime: one operator as a model of its own, whose weights are constants, as an exported model's are.


def _onnxruntime(operator: str, x: torch.Tensor, constants: dict[str, torch.Tensor], **attributes):
    import onnx
    import onnxruntime

    if x.is_cuda or x.dtype is not torch.float32 or x.requires_grad:
        raise Absent("it is compared with on CPUs, forward, in float32")

    def described(name):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", *constants], ["y"], **attributes)],
        operator,
        [described("x")],
        [described("y")],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning into whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


@linear.SINGLE.implementation("onnxruntime", baseline=True)
def _(x, weight, bias):
    return _onnxruntime("Gemm", x, {"weight": weight, "bias": bias}, transB=1)


@layer_norm.layer_norm.implementation("onnxruntime", baseline=True)
def _(x, weight, bias):
    return _onnxruntime("LayerNormalization", x, {"weight": weight, "bias": bias}, epsilon=layer_norm.EPS)


@feedforward.OPERATORS["gelu"].implementation("onnxruntime", baseline=True)
def _(x):
    return _onnxruntime("Gelu", x, {})
