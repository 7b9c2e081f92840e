"""`patch`, `unpatch` and `patched`: what is done to a whole model, and how it is undone."""

import contextlib
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from . import embeddings, feedforward, linears, multihead, norms, rotary
from .classes import original_class, why_not_swappable
from .report import Entry, PatchReport

# Where a patched model keeps what `unpatch` needs: with the model, so that copies of the model can be unpatched too.
RECORD = "_nearpeak_patch"

SERVED = "served by nearpeak already"
PACKAGE = __name__.partition(".")[0]


@dataclass
class _Record:
    report: PatchReport | None = None
    swapped: list[torch.nn.Module] = field(default_factory=list)
    configs: list = field(default_factory=list)


class _Findings:
    """Counts modules by what happens to them, in the order in which they are met."""

    def __init__(self):
        self.replaced = Counter()
        self.left_alone = Counter()

    def report(self) -> PatchReport:
        return PatchReport(
            *(
                tuple(Entry(kind, layer, count, detail) for (kind, layer, detail), count in counts.items())
                for counts in (self.replaced, self.left_alone)
            )
        )


def patch(model: torch.nn.Module) -> PatchReport:
    """Let nearpeak's kernels serve what they can of a model, in place, and say what that was.

    Served are torch.nn.Linear, torch.nn.Embedding, torch.nn.MultiheadAttention, RMSNorm and LayerNorm modules, scaled
    and BERT's embeddings, activations and gated feed-forward layers (from the norms on of any class that computes one
    of them), and in transformers models the rotary embedding and attention. Weights are shared, not copied; names,
    hooks, state dict and isinstance checks stay; no other model changes, even one that shares the configuration. A
    model that is patched already is left as it is.

    Args:
        model: any torch.nn.Module; of a transformers model the whole that is called (LlamaForCausalLM, not the
            LlamaModel in it), since that may make the masks for its parts.

    Returns:
        what was replaced, and what was left alone and why; print it.

    >>> print(nearpeak.patch(model))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if RECORD in vars(model):
        return vars(model)[RECORD].report
    record, findings = _Record(), _Findings()
    try:
        _serve_attention(model, record, findings)
        for module in model.modules():
            _serve_module(module, record, findings)
    except BaseException:
        _undo(model, record)
        raise
    record.report = findings.report()
    if record.swapped or record.configs:
        vars(model)[RECORD] = record
    return record.report


def unpatch(model: torch.nn.Module) -> None:
    """Undo `patch`: the model is again exactly what it was.

    Raises ValueError for a model that is not patched, RuntimeError where something else (such as FSDP or a
    parametrization) changed a served module's class after `patch` and must be undone first.

    >>> report = nearpeak.patch(model)
    >>> nearpeak.unpatch(model)
    """
    record = vars(model).get(RECORD) if isinstance(model, torch.nn.Module) else None
    if record is None:
        raise ValueError(f"this {type(model).__name__} is not patched: unpatch takes the model that was given to patch")
    for module in record.swapped:
        if original_class(module) is None:
            raise RuntimeError(f"a module's class was changed to {type(module).__name__} after patch: undo that first")
    _undo(model, record)
    del vars(model)[RECORD]


@contextlib.contextmanager
def patched(model: torch.nn.Module) -> Iterator[PatchReport]:
    """Patch the model inside the `with` block; a model that was patched before stays so afterwards.

    >>> with nearpeak.patched(model):
    ...     model.generate(**inputs)
    """
    before = RECORD in vars(model)
    report = patch(model)
    try:
        yield report
    finally:
        if not before and RECORD in vars(model):
            unpatch(model)


def register() -> None:
    """Let `from_pretrained(..., attn_implementation="nearpeak")` find nearpeak's attention; imports transformers.

    `patch` does this by itself. The norms and the rotary embedding are patch's alone.
    """
    from . import attention

    attention.register()


def _undo(model, record) -> None:
    for module in record.swapped:
        module.__class__ = original_class(module)
    if record.configs:
        from . import configs

        configs.give_back(model, record.configs)


def _serve_module(module, record, findings) -> None:
    layer = type(module).__name__
    # A part of this model was patched before, or is a module of ours.
    if original_class(module) is not None or type(module).__module__.startswith(f"{PACKAGE}."):
        findings.left_alone["other", layer, SERVED] += 1
        return
    if rotary.calls_rotary(module):
        serving, detail = _rotary_class(module)
        _swap("rotary", module, serving, detail, record, findings)
        return
    if multihead.is_multihead(module):
        _swap("attention", module, multihead.serving_class(type(module)), multihead.DETAIL, record, findings)
        return
    if multihead.is_read_by_multihead(module):
        findings.left_alone["linear", layer, multihead.READ] += 1
        return
    if linears.is_linear(module):
        _swap("linear", module, *linears.served(module), record, findings)
        return
    if (activation := feedforward.activation_of(module)) is not None:
        serving = feedforward.serving_activation(type(module), activation)
        _swap("feedforward", module, serving, f'nearpeak.activation, "{activation}"', record, findings)
        return
    if (gated := feedforward.gated_of(module)) is not None:
        _swap("feedforward", module, feedforward.serving_gated(type(module), gated), gated.detail, record, findings)
        return
    if (found := embeddings.served(module)) is not None:
        _swap("embedding", module, *found, record, findings)
        return
    formula = norms.formula_of(module)
    if formula is not None:
        _swap("norm", module, norms.serving_class(type(module), formula), formula.detail, record, findings)
    elif "RMSNorm" in layer:
        findings.left_alone["norm", layer, "computes something else than RMSNorm over its last dimension"] += 1
    elif any(True for _ in module.parameters(recurse=False)):
        findings.left_alone["norm" if "Norm" in layer else "other", layer, "not served yet"] += 1


def _rotary_class(module):
    """The class that serves the module's rotary embedding, and what serves it; or None and why not."""
    original = rotary.original_of(module)
    if original is None:
        return None, "its forward is wrapped by a decorator that cannot be rebuilt"
    form = rotary.form_of(original)
    if form is None:
        return None, f"its {rotary.NAME} computes another embedding"
    return rotary.serving_class(type(module), original, form), form.detail


def _swap(kind, module, serving, detail, record, findings) -> None:
    """Give the module its serving class, unless there is none or it would have no effect."""
    layer = type(module).__name__
    if serving is not None and (why := why_not_swappable(module)):
        serving, detail = None, why
    if serving is None:
        findings.left_alone[kind, layer, detail] += 1
        return
    module.__class__ = serving
    record.swapped.append(module)
    findings.replaced[kind, layer, detail] += 1


def _serve_attention(model, record, findings) -> None:
    """Switch every transformers model inside `model` to nearpeak's attention function."""
    if "transformers.modeling_utils" not in sys.modules:  # then no part of the model can come from there
        return
    from transformers import PreTrainedModel

    from . import attention, configs

    attention.register()
    for part in _outermost(model, PreTrainedModel):
        layers = [m for m in part.modules() if _asks_interface(m)]
        served = [layer for layer in layers if _implementation(layer) == attention.NAME]
        why = _why_attention_stays(part, layers)
        if why is None:
            own = configs.take_own(part)
            record.configs += own
            try:
                part.set_attn_implementation(attention.NAME)
            finally:
                configs.remember(own)
        for layer in layers:
            reason = SERVED if layer in served else why
            counts = findings.replaced if reason is None else findings.left_alone
            counts["attention", type(layer).__name__, reason or "nearpeak.attention"] += 1


def _implementation(module) -> str | None:
    """The attention function that the module's configuration names."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _outermost(module, kind) -> Iterator[torch.nn.Module]:
    """Modules of a class that lie in no other of that class."""
    if isinstance(module, kind):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kind)


def _asks_interface(module) -> bool:
    """Whether the module takes its attention function from transformers' AttentionInterface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _why_attention_stays(part, layers) -> str | None:
    """Why a transformers model keeps its attention, or None if it takes another as nearpeak means it."""
    if not layers or not part._can_set_attn_implementation():
        return "does not use transformers' AttentionInterface"
    if _implementation(part) == "nearpeak":
        return SERVED
    # Masked calls go to SDPA, or with a softcap, for which alone some models refuse SDPA, to eager attention.
    if not part._supports_sdpa and getattr(part.config, "attn_logit_softcapping", None) is None:
        return "transformers does not let torch's SDPA serve it, to which masked calls would go"
    if part.config.output_attentions:
        return "its configuration asks for attention weights, which only its eager attention returns"
    if any(map(_hides_window, layers)):
        return "it does not pass its sliding window to the attention function"
    return None


def _hides_window(layer) -> bool:
    """Whether a causal layer of a model with a sliding window leaves the window to the mask alone."""
    if getattr(getattr(layer, "config", None), "sliding_window", None) is None:
        return False
    code = inspect.unwrap(type(layer).forward).__code__
    names = {name for const in code.co_consts if isinstance(const, tuple) for name in const}
    return getattr(layer, "is_causal", True) and "sliding_window" not in names
