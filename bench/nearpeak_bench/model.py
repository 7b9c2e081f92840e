"""Real models, unpatched and patched: `nearpeak bench model`. It runs on the CPU.

    Gemma 3 270M        prefill of a prompt, and greedy decoding behind one
    its GGUF file       the same, in the file's own blocks, against the same numbers as floats
    all-MiniLM-L6-v2    embedding of sentences of mixed lengths, padded into one batch

Both models of a pair share their weights, and are timed in interleaved rounds. Exactness is that of the harness: the
patched model's results may err, against the model in float64, no more than the unpatched model's do.
"""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import nearpeak
import rich.console
import rich.progress
import torch

from . import models, peaks, table
from .cases import Work
from .exactness import errors, why_inexact
from .timing import best_seconds, cpu_clock, time_interleaved
from .verdicts import Ratio, Spread, ratio, spread

PROMPT_TOKENS = 512
DECODE_PROMPT_TOKENS = 32
DECODE_TOKENS = 32
COMPARED_TOKENS = 64
# Exactness is judged over several texts, since the error of one text is much of one piece. The logits of all their
# tokens over 262144 words would take 1 GiB in float64: a quarter will do.
COMPARED_TEXTS = 4
COMPARED_LOGITS = 32
SENTENCES = 32

# Of float32's rate. Where PyTorch's products in bfloat16 are slower, an unpatched forward pass takes long: 512 tokens
# of Gemma 3 270M took 10 s at 0.15 (Zen 3), which makes five minutes of all that a run compares.
BFLOAT16_WORTHWHILE, QUICK_BFLOAT16_WORTHWHILE = 0.05, 0.5

TEXT = (
    "The steam engine was the first machine that turned heat into motion at a scale that changed how people lived. "
    "Water was boiled in a closed vessel, and the pressure of its vapour moved a piston to and fro in a cylinder. A "
    "rod and a crank made a turning motion of that, and belts carried it through the halls of a factory. Early engines "
    "wasted almost all of their fuel, because the cylinder was heated and cooled again at every stroke. A separate "
    "condenser, which stayed cold while the cylinder stayed hot, made them three times as good. Within a lifetime they "
    "pumped mines dry, spun cotton, drove ships against the wind and drew trains across whole continents."
)

EXPLANATION = (
    "unpatched, patched: median rate and quartiles; prefill counts its prompt's tokens, decode those that it makes. "
    "faster: how many times, interleaved, and the 95 % interval. limit: the share that the patched model reaches of "
    "what this machine's arithmetic and memory, measured in this run, allow. memory: peak resident bytes of a call "
    "beside the weights, patched (unpatched). difference: the largest between both models' logits or embeddings. "
    "error: mean error against float64, patched (unpatched). tokens: greedy tokens that are the same."
)


@dataclasses.dataclass
class Measurement:
    """One task of one model in one dtype: seconds per call, unpatched and patched, and what they did."""

    model: str
    task: str
    dtype: str
    unit: str  # what a second is filled with: "tok/s"
    items: int  # how many of them one call makes
    unpatched_seconds: list[float]
    patched_seconds: list[float]
    ratio: Ratio
    limit_seconds: float
    unpatched_peak_bytes: int | None
    patched_peak_bytes: int | None
    largest_difference: float | None = None
    unpatched_error: tuple[float, float] | None = None  # mean and maximum, against float64
    patched_error: tuple[float, float] | None = None
    verdict: str | None = None  # why the patched model is less exact than the rule allows
    same_tokens: int | None = None  # how many greedy tokens agree before the first that does not


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every measurement needs: the machine's limits, how long to measure, and whom to tell."""

    peaks: peaks.Peaks
    budget: float
    say: Callable[[str], None]


def run(console: rich.console.Console, quick: bool) -> dict:
    """Measure both models and print the table; the dictionary returned goes to JSON as it is.

    Raises models.Missing (one line that says what to install) without the extra `models`.
    """
    models.require()
    dtypes = [torch.float32]
    rate = _bfloat16_rate()
    note = ""
    if rate >= (QUICK_BFLOAT16_WORTHWHILE if quick else BFLOAT16_WORTHWHILE):
        dtypes.append(torch.bfloat16)
    else:
        note = (
            f"bfloat16 was left out: PyTorch multiplies its matrices at {rate:.2g} times float32's rate here, so one "
            "forward pass of the unpatched models would take long; --full measures it from 0.05 on."
        )
    with _progress(console) as say:
        say("measuring the machine")
        bench = Bench(peaks.measure(torch.device("cpu")), 10.0 if quick else 60.0, say)
        measurements = [*_gemma(bench, dtypes), *_gemma_gguf(bench), *_minilm(bench, dtypes)]
    result = {
        "rows": [_row(each) for each in measurements],
        "measurements": [dataclasses.asdict(each) for each in measurements],
        "note": note,
    }
    console.print(table.to_rich(table.model_table(result), console))
    console.print(f"[dim]{EXPLANATION} {note}")
    return result


@contextlib.contextmanager
def _progress(console: rich.console.Console) -> Iterator[Callable[[str], None]]:
    """Show what is being done; gives the function that says it."""
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def say(what: str) -> None:
            progress.update(task, description=what)
            if not console.is_terminal:
                console.print(what, soft_wrap=True)

        yield say


def _bfloat16_rate() -> float:
    """How fast PyTorch's linear layers are in bfloat16, as a multiple of float32.

    On one thread, where busy neighbours cannot hide the difference behind the wait for a second one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {}
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.randn(256, 640).to(dtype), torch.randn(1024, 640).to(dtype)
            linear = functools.partial(torch.nn.functional.linear, x, weight)
            seconds[dtype] = best_seconds(linear, cpu_clock, samples=3)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """A patched copy of the model over the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    nearpeak.patch(twin)
    return twin


@torch.no_grad()
def _in_float64(model: torch.nn.Module, compute: Callable) -> torch.Tensor:
    """What `compute` gives for the model in float64.

    The model is patched there too, with the float64 definitions: Hugging Face's norms round to float32 always.
    """
    double = copy.deepcopy(model).double()
    with nearpeak.use_backend("reference"), nearpeak.patched(double):
        return compute(double)


def _measure(bench: Bench, names: tuple[str, str, str], unit: str, items: int, work: Work, calls: dict) -> Measurement:
    """Time two calls against each other. names: model, task and dtype; work: the least that one call must do."""
    bench.say(f"{', '.join(names)}: timing")
    limit, _ = bench.peaks.limit(work, getattr(torch, names[2]))
    samples = time_interleaved(calls, bench.budget)
    unpatched, patched = (samples[name].seconds for name in ("unpatched", "patched"))
    bench.say(f"{', '.join(names)}: memory")
    memory = [_peak_memory(calls[name]) for name in ("unpatched", "patched")]
    return Measurement(*names, unit, items, unpatched, patched, ratio(unpatched, patched), limit, *memory)


def _compare(measurement: Measurement, plain, served, exact, judge: bool = True) -> None:
    """Fill in how far two results are from each other and from float64; judge: and whether that is too far."""
    measurement.largest_difference = float((served.double() - plain.double()).abs().max())
    measurement.unpatched_error, measurement.patched_error = errors(plain, exact), errors(served, exact)
    if judge:
        measurement.verdict = why_inexact(served, plain, exact)


def _peak_memory(call: Callable) -> int | None:
    """Peak resident bytes of a call above what was resident before it; None where Linux's counters are missing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls left to the allocator would hide this one's
        before = _resident("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # takes the peak back to the present
        call()
        return max(0, _resident("VmHWM") - before)
    except (AttributeError, OSError, StopIteration):
        return None


def _resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _gemma(bench: Bench, dtypes: list[torch.dtype]) -> Iterator[Measurement]:
    bench.say("Gemma 3 270M: loading")
    model, tokenizer = models.gemma(torch.float32, bench.say)
    prompt, texts = _texts(tokenizer)
    bench.say("Gemma 3 270M: logits in float64")
    exact = _in_float64(model, lambda model: _last_logits(model, texts))
    for dtype in dtypes:
        # Loaded anew: casting the float32 model would cast its rotary frequencies too.
        model = model if dtype is torch.float32 else models.gemma(dtype, bench.say)[0]
        pair = {"unpatched": model, "patched": _twin(model)}
        yield from _prefill_and_decode(bench, "Gemma 3 270M", pair, prompt, texts, exact)


def _gemma_gguf(bench: Bench) -> Iterator[Measurement]:
    """The file's own blocks, against what transformers makes of them: the same numbers as floats. Once with inputs as
    they are, and once with those of linear layers in 8 bits."""
    name = "Gemma 3 270M, GGUF"
    bench.say(f"{name}: loading")
    plain, tokenizer = models.gemma(torch.float32, bench.say)
    served, rounding = copy.deepcopy(plain), copy.deepcopy(plain)
    nearpeak.load_gguf(served, models.gemma_gguf())
    nearpeak.load_gguf(rounding, models.gemma_gguf(), input_bits=8)
    _dequantize_into(plain, served)
    prompt, texts = _texts(tokenizer)
    bench.say(f"{name}: logits in float64")
    exact = _in_float64(served, lambda model: _last_logits(model, texts))
    for each, label in ((served, name), (rounding, f"{name}, inputs in 8 bits")):
        nearpeak.patch(each)
        yield from _prefill_and_decode(bench, label, {"unpatched": plain, "patched": each}, prompt, texts, exact)


@torch.no_grad()
def _dequantize_into(model, served) -> None:
    """Give the model, of float parameters, the numbers of its copy that a GGUF file was loaded into."""
    model.load_state_dict(served.state_dict(), strict=False)
    for name, module in served.named_modules():
        if isinstance(module, nearpeak.nn.GgufLinear | nearpeak.nn.GgufEmbedding):
            model.get_submodule(name).weight.copy_(module.weight.dequantize())


def _texts(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt, and the texts of it whose logits are compared."""
    prompt = tokenizer(" ".join([TEXT] * 8), return_tensors="pt").input_ids[:, :PROMPT_TOKENS]
    texts = prompt.reshape(COMPARED_TEXTS, -1).clone()
    texts[:, 0] = tokenizer.bos_token_id
    return prompt, texts


def _prefill_and_decode(bench: Bench, name: str, pair: dict, prompt, texts, exact) -> Iterator[Measurement]:
    measurement = _prefill(bench, name, pair, prompt)
    logits = [_last_logits(model, texts) for model in pair.values()]
    # Inputs are rounded because somebody chose to.
    _compare(measurement, *logits, exact, judge=_arithmetic(pair["patched"]) is None)
    yield measurement
    yield _decode(bench, name, pair, prompt[:, :DECODE_PROMPT_TOKENS])


def _elements_read(model) -> float:
    """Bytes of the model's weights, however they are stored, in elements of its dtype."""
    blocks = {module.blocks.data_ptr(): module.blocks for module in model.modules() if hasattr(module, "blocks")}
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *blocks.values()))
    return size / model.dtype.itemsize


def _arithmetic(model) -> str | None:
    """What most of the model's products are of, where it is not its dtype."""
    return "int8" if any(getattr(module, "input_bits", None) for module in model.modules()) else None


def _dtype_of(model: torch.nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")


@torch.no_grad()
def _last_logits(model, prompt, count: int = COMPARED_LOGITS) -> torch.Tensor:
    return model(prompt, logits_to_keep=count).logits


def _prefill(bench: Bench, name: str, pair: dict, prompt: torch.Tensor) -> Measurement:
    config, tokens = pair["unpatched"].config, prompt.shape[1]
    layers = sum(p.numel() for p in pair["unpatched"].model.layers.parameters())
    # Causal attention: two products of half of tokens x tokens x head_dim a head (the window is as long as the prompt).
    attention = 2 * tokens**2 * config.head_dim * config.num_attention_heads * config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size
    flops = 2 * layers * tokens + attention + head
    work = Work(flops, _elements_read(pair["patched"]), 0, _arithmetic(pair["patched"]))
    calls = {of: lambda model=model: _last_logits(model, prompt, 1) for of, model in pair.items()}
    names = (name, f"prefill {tokens}", _dtype_of(pair["unpatched"]))
    return _measure(bench, names, "tok/s", tokens, work, calls)


def _decode(bench: Bench, name: str, pair: dict, prompt: torch.Tensor) -> Measurement:
    parameters = sum(p.numel() for p in pair["unpatched"].parameters())
    read = _elements_read(pair["patched"]) * DECODE_TOKENS
    work = Work(2 * parameters * DECODE_TOKENS, read, 0, _arithmetic(pair["patched"]))
    calls = {}
    for of, model in pair.items():
        cache, token = _started(model, prompt)
        calls[of] = lambda model=model, cache=cache, token=token: _greedy(
            model, copy.deepcopy(cache), token, DECODE_TOKENS
        )
    names = (name, f"decode {DECODE_TOKENS}", _dtype_of(pair["unpatched"]))
    measurement = _measure(bench, names, "tok/s", DECODE_TOKENS, work, calls)
    bench.say(f"{', '.join(names)}: comparing {COMPARED_TOKENS} tokens")
    texts = [_greedy(model, *_started(model, prompt), COMPARED_TOKENS) for model in pair.values()]
    differing = (texts[0] != texts[1]).nonzero()
    measurement.same_tokens = int(differing[0]) if len(differing) else COMPARED_TOKENS
    return measurement


@torch.no_grad()
def _started(model, prompt: torch.Tensor) -> tuple:
    """The cache behind the prompt and the first token after it."""
    output = model(prompt, logits_to_keep=1, use_cache=True)
    return output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)


@torch.no_grad()
def _greedy(model, cache, token: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` tokens that follow `token`, each the likeliest."""
    tokens = []
    for _ in range(count):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, dim=1)[0]


def sentences() -> list[str]:
    """Sentences of 4 to 97 words."""
    words = TEXT.split()
    return [" ".join(words[: 4 + 3 * index]) for index in range(SENTENCES)]


def _minilm(bench: Bench, dtypes: list[torch.dtype]) -> Iterator[Measurement]:
    bench.say("MiniLM: loading")
    model, tokenizer = models.minilm(torch.float32)
    batch = dict(tokenizer(sentences(), padding=True, return_tensors="pt"))
    exact = _in_float64(model, lambda model: _embed(model, batch))
    layers = sum(p.numel() for p in model.encoder.parameters())
    tokens = int(batch["attention_mask"].sum())
    for dtype in dtypes:
        model = model.to(dtype)
        pair = {"unpatched": model, "patched": _twin(model)}
        calls = {name: lambda model=model: _embed(model, batch) for name, model in pair.items()}
        names = ("MiniLM", f"embed {SENTENCES} sentences, padded", _dtype_of(model))
        # Tokens alone count as work, padding does not; attention is under 2 % of it.
        measurement = _measure(bench, names, "sent/s", SENTENCES, Work(2 * layers * tokens, layers, 0), calls)
        _compare(measurement, *(_embed(model, batch) for model in pair.values()), exact)
        yield measurement


@torch.no_grad()
def _embed(model, batch: dict) -> torch.Tensor:
    """Mean of the last hidden states of a sentence's tokens, of length one, as this model is meant to be used."""
    hidden = model(**batch).last_hidden_state
    shown = batch["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1)


def _row(measurement: Measurement) -> dict:
    """The measurement as a line of the table."""
    m, rates = measurement, []
    for seconds in (m.unpatched_seconds, m.patched_seconds):
        rates.append(_rate_text(spread(seconds), m.items, m.unit))
    exact = None
    if m.patched_error is not None:
        exact = table.error_text(m.patched_error[0], m.unpatched_error[0]) + (" INEXACT" if m.verdict else "")
    tokens = None if m.same_tokens is None else f"{m.same_tokens} of {COMPARED_TOKENS}"
    return {
        "model": m.model,
        "task": m.task,
        "dtype": table.SHORT_DTYPES[m.dtype],
        "unpatched": rates[0],
        "patched": rates[1],
        "faster": table.ratio_text(m.ratio),
        "limit": f"{100 * m.limit_seconds / spread(m.patched_seconds).median:.0f}%",
        "memory": f"{table.bytes_text(m.patched_peak_bytes)} ({table.bytes_text(m.unpatched_peak_bytes)})",
        "difference": None if m.largest_difference is None else f"{m.largest_difference:.1e}",
        "error": exact,
        "tokens": tokens,
    }


def _rate_text(of: Spread, items: int, unit: str) -> str:
    low, median, high = (items / seconds for seconds in (of.upper, of.median, of.lower))
    return f"{median:.3g} {unit} ({low:.3g}-{high:.3g})"
