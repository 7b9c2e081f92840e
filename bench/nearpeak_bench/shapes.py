"""Cases in the shapes of real models: `nearpeak bench --shapes llama3-8b`, or any Hugging Face config.json.

    prefill    forward, of PREFILL tokens
    decode     forward, of one token behind CONTEXT others
    training   backward (attention: forward and backward together), of PREFILL tokens

For each step of one layer: norms, rotary embedding, activation of the feed-forward part, attention, linear layers.
Of T5, and of BERT and its like, the encoder's layer. Of a mixture of experts, one expert's and the shared width.
"""

import dataclasses
import json
import math
import pathlib

import torch

from . import attention, attention_terms, feedforward, layer_norm, linear, norm, rotary
from .cases import Case
from .exits import UsageError
from .published import CONFIGS

PREFILL, CONTEXT = 1024, 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
GATED = {"silu": "swiglu", "gelu_tanh": "geglu_tanh"}
# Larger weights, those of a language model's head, take gigabytes in float64.
MOST_QUICK_WEIGHTS = 2**27


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's dimensions; latent: DeepSeek's ranks and head sizes (query, key and value, plain, rotary, value)."""

    hidden: int
    inner: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    rms: bool
    activation: str
    gated: bool
    rotary: bool
    encoder: bool
    relative_bias: bool
    window: int | None
    positions: int
    vocabulary: int | None
    latent: tuple[int, int, int, int, int] | None

    @property
    def prefill(self) -> int:
        return min(PREFILL, self.positions)


def layer_of(name: str) -> Layer:
    """The layer of a published model, or of a config.json; UsageError with one line where there is none."""
    if name in CONFIGS:
        return _read(CONFIGS[name], name)
    path = pathlib.Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"--shapes {name}: choose from {', '.join(CONFIGS)}, or give the path of a config.json")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--shapes {name}: this is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"--shapes {name}: a model's config.json is an object, with its dimensions by name")
    return _read(config.get("text_config", config), name)


def _read(config: dict, name: str) -> Layer:
    def get(*keys, default=None):
        """The first key that is set: model families spell them differently."""
        value = next((config[key] for key in keys if config.get(key) is not None), default)
        if value is None:
            raise UsageError(f"--shapes {name}: the config has no {' or '.join(keys)}")
        return value

    def size(*keys, default=None):
        value = get(*keys, default=default)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"--shapes {name}: {keys[0]} must be a positive integer, not {value!r}")
        return value

    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head", "num_heads")
    t5 = "feed_forward_proj" in config
    rms = t5 or "rms_norm_eps" in config
    act = get("hidden_activation", "hidden_act", "activation_function", "feed_forward_proj")
    activation = ACTIVATIONS.get(str(act).removeprefix("gated-"))
    gated = str(act).startswith("gated-") if t5 else rms
    if activation is None or (gated and activation not in GATED):
        raise UsageError(f"--shapes {name}: activation {act!r} has no case; those that have: {', '.join(ACTIVATIONS)}")
    inner = size("intermediate_size", "n_inner", "d_ff", default=4 * hidden)
    experts = [size("moe_intermediate_size")] if config.get("moe_intermediate_size") else []
    latent = None
    if config.get("kv_lora_rank"):
        latent_names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        latent = tuple(size(each) for each in latent_names)
    return Layer(
        hidden=hidden, inner=tuple(dict.fromkeys([inner, *experts])), heads=heads,
        key_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", "d_kv", default=hidden // heads),
        rms=rms, activation=activation, gated=gated, rotary=any(key.startswith("rope") for key in config),
        encoder=t5 or "type_vocab_size" in config, relative_bias=t5, window=config.get("sliding_window"),
        positions=size("max_position_embeddings", "n_positions", default=CONTEXT), vocabulary=config.get("vocab_size"),
        latent=latent,
    )  # fmt: skip


def cases(names: tuple[str, ...]) -> dict[str, list[Case]]:
    """By suite, the cases of these models; what two of them share is there once."""
    makers = {"norm": _norm, "rotary": _rotary, "feedforward": _feedforward, "linear": _linear, "attention": _attention}
    found: dict[str, dict[str, Case]] = {suite: {} for suite in makers}
    for layer in map(layer_of, names):
        for suite, make in makers.items():
            for dtype in DTYPES:
                for case in make(layer, dtype):
                    found[suite].setdefault(case.name, case)
    return {suite: list(by_name.values()) for suite, by_name in found.items()}


def _in_all_steps(operator, parameters, layer, dtype, tokens: str, quick=True):
    """Prefill, decode and training; `tokens` is the parameter that counts them."""
    quick = quick and dtype is not torch.float16
    yield Case(operator, {**parameters, tokens: layer.prefill}, dtype, quick=quick)
    if not layer.encoder:
        yield Case(operator, {**parameters, tokens: 1}, dtype, quick=quick)
    if "backward" in operator.work:
        yield Case(operator, {**parameters, tokens: layer.prefill}, dtype, "backward", quick=quick)


def _norm(layer: Layer, dtype):
    if layer.rms:
        operators = [norm.rms_norm, norm.add_rms_norm]
    elif layer.encoder:
        operators = [layer_norm.layer_norm, layer_norm.post_layer_norm]
    else:
        operators = [layer_norm.layer_norm, layer_norm.add_layer_norm]
    for operator in operators:
        yield from _in_all_steps(operator, {"width": layer.hidden}, layer, dtype, "rows")
    for rank in layer.latent[:2] if layer.latent else ():
        yield from _in_all_steps(norm.rms_norm, {"width": rank}, layer, dtype, "rows")


def _rotary(layer: Layer, dtype):
    if layer.rotary:
        key_heads, head_dim = (1, layer.latent[3]) if layer.latent else (layer.key_heads, layer.head_dim)
        heads = {"heads": layer.heads, "key_heads": key_heads, "head_dim": head_dim, "layout": "transposed"}
        yield from _in_all_steps(rotary.apply_rotary, heads, layer, dtype, "sequence")


def _feedforward(layer: Layer, dtype):
    operator = feedforward.OPERATORS[GATED[layer.activation] if layer.gated else layer.activation]
    for width in layer.inner:
        yield from _in_all_steps(operator, {"width": width}, layer, dtype, "rows")


def _linear_sizes(layer: Layer):
    """(in_features, out_features) of a layer's projections, and of the model's head."""
    if layer.latent:
        query_rank, key_rank, plain, turned, value = layer.latent
        yield layer.hidden, query_rank
        yield query_rank, layer.heads * (plain + turned)
        yield layer.hidden, key_rank + turned
        yield key_rank, layer.heads * (plain + value)
        yield layer.heads * value, layer.hidden
    else:
        yield layer.hidden, layer.heads * layer.head_dim
        yield layer.hidden, layer.key_heads * layer.head_dim
        yield layer.heads * layer.head_dim, layer.hidden
    for width in layer.inner:
        yield layer.hidden, width
        yield width, layer.hidden
    if layer.vocabulary and not layer.encoder:
        yield layer.hidden, layer.vocabulary


def _linear(layer: Layer, dtype):
    operator = linear.SINGLE if dtype is torch.float32 else linear.NARROW
    for inputs, outputs in _linear_sizes(layer):
        for case in _in_all_steps(operator, {"inputs": inputs, "outputs": outputs}, layer, dtype, "rows"):
            naive = dtype is not torch.float32 and math.prod(case.parameters.values()) > linear.MOST_NAIVE
            quick = case.quick and not naive and inputs * outputs <= MOST_QUICK_WEIGHTS
            yield dataclasses.replace(case, quick=quick)


def _attention(layer: Layer, dtype):
    quick = dtype is not torch.float16
    # Without bfloat16 units, PyTorch's backward takes many seconds a call.
    quick_training = dtype is torch.float32
    if layer.relative_bias:
        shape = {"batch": 1, "heads": layer.heads, "length": layer.prefill, "head_dim": layer.head_dim, "term": "bias"}
        yield Case(attention_terms.attention_terms, shape, dtype, quick=quick)
        yield Case(attention_terms.attention_bias, shape, dtype, "training", quick=quick_training)
        return
    operator, decode = attention.attention, attention.attention_decode
    heads = {"heads": layer.heads, "key_heads": layer.key_heads, "head_dim": layer.head_dim}
    in_decode = heads
    if layer.latent:
        # Decoding keeps the latent, of which keys and values are made, and attends to it: one head for all.
        _, rank, plain, turned, value = layer.latent
        operator = decode = attention.attention_latent
        heads = {**heads, "head_dim": plain + turned, "value_dim": value}
        in_decode = {"heads": layer.heads, "key_heads": 1, "head_dim": rank + turned, "value_dim": rank}
    prefill = {**heads, "queries": layer.prefill, "keys": layer.prefill, "mask": "full" if layer.encoder else "causal"}
    yield Case(operator, prefill, dtype, quick=quick)
    yield Case(operator, prefill, dtype, "training", quick=quick_training)
    if layer.window and layer.window < layer.prefill:
        yield Case(attention.attention_window, {**prefill, "mask": layer.window}, dtype, quick=quick)
    if not layer.encoder:
        keys = min(CONTEXT, layer.positions)
        yield Case(decode, {**in_decode, "queries": 1, "keys": keys, "mask": "full"}, dtype, quick=quick)
