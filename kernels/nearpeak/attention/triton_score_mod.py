"""Score programs in attention's Triton kernels: each becomes a function of Triton's language, compiled into the kernel.

The text of the function is one line for each instruction of the program (score_mod.py), so that what is compiled is
what a user would have written by hand. Scores and places have two dimensions, and so has every value.
"""

import functools
import hashlib
import linecache

import triton
import triton.language as tl

from .score_instructions import ARGUMENTS, decoded
from .triton_shared import tanh

MOST_TABLES = 4
TABLES = tuple(f"table{number}" for number in range(MOST_TABLES))
# Of a negative number to some power no instruction of a GPU knows.
NOT_SERVED = ("power",)


@triton.jit
def index(place, size, stride, base):
    """base + place * stride; -1 where place, which may count from the end, lies outside, or one before did."""
    place = tl.where(place < 0, place + size, place)
    return tl.where((place >= 0) & (place < size) & (base >= 0), base + place * stride, -1)


@triton.jit
def floor_divide(a, b):
    """Triton's own rounds towards zero."""
    return a // b - ((a % b != 0) & ((a < 0) != (b < 0))).to(tl.int32)


@triton.jit
def remainder(a, b):
    return a - floor_divide(a, b) * b


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


# By an instruction's name, of its operands' names: what makes its value.
LINES = {
    "add": "{0} + {1}", "subtract": "{0} - {1}", "multiply": "{0} * {1}", "divide": "{0} / {1}",
    "minimum": "tl.minimum({0}, {1})", "maximum": "tl.maximum({0}, {1})", "negative": "-{0}",
    "absolute": "tl.abs({0})", "exp": "tl.exp({0})", "log": "tl.log({0})", "sqrt": "tl.sqrt({0})",
    "tanh": "tanh({0})", "sigmoid": "sigmoid({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})",
    "floor": "tl.floor({0})", "select": "tl.where({0}, {1}, {2})", "less": "{0} < {1}", "less_equal": "{0} <= {1}",
    "equal": "{0} == {1}", "add_integers": "{0} + {1}", "subtract_integers": "{0} - {1}",
    "multiply_integers": "{0} * {1}", "floor_divide": "floor_divide({0}, {1})", "remainder": "remainder({0}, {1})",
    "minimum_integers": "tl.minimum({0}, {1})", "maximum_integers": "tl.maximum({0}, {1})",
    "negative_integer": "-{0}", "absolute_integer": "tl.abs({0})", "less_integers": "{0} < {1}",
    "less_equal_integers": "{0} <= {1}", "equal_integers": "{0} == {1}", "select_integers": "tl.where({0}, {1}, {2})",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "{0} == 0", "to_float": "{0}.to(tl.float32)",
    "truth_to_float": "{0}.to(tl.float32)", "truth_to_integer": "{0}.to(tl.int32)", "to_integer": "{0}.to(tl.int32)",
}  # fmt: skip


def why_not_served(program, tensors) -> str | None:
    """Why a program has no Triton kernel, or None if it has."""
    names = {decoded(row)[0] for row in program.tolist()[:-1]}
    for name in NOT_SERVED:
        if name in names:
            return f"score_mod's {name} has no kernel for GPUs: plain PyTorch serves it"
    if len(tensors or ()) > MOST_TABLES:
        return f"score_mod looks up more than {MOST_TABLES} tensors: plain PyTorch serves it on GPUs"
    return None


def functions(program):
    """(modify, differentiate) of (score, batch, head, query, key, *tables): the new score, and with its derivative."""
    return _functions(tuple(map(tuple, program.tolist())))


@functools.lru_cache(maxsize=256)
def _functions(rows):
    *instructions, (value, derivative, count, *_) = rows
    instructions = [decoded(row) for row in instructions]
    shape = "tl.broadcast_to({}, score.shape)"
    first = shape.format(f"v{value}")
    return (
        _compiled("modify", instructions[:count], first),
        _compiled("differentiate", instructions, f"{first}, {shape.format(f'v{derivative}')}"),
    )


def _compiled(name, instructions, returned):
    names = [*ARGUMENTS, *(f"v{len(ARGUMENTS) + place}" for place in range(len(instructions)))]
    lines = [f"def {name}({', '.join((*ARGUMENTS, *TABLES))}):"]
    lines += [f"    v{number} = {argument}" for number, argument in enumerate(ARGUMENTS)]
    lines += [f"    v{len(ARGUMENTS) + place} = {_line(*each)}" for place, each in enumerate(instructions)]
    lines += [f"    return {returned}"]
    source = "\n".join(lines) + "\n"
    # Triton reads a function's text again: so Python must know where it is.
    file = f"<nearpeak score_mod {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names = {"tl": tl, "tanh": tanh, "index": index, "floor_divide": floor_divide, "remainder": remainder,
             "sigmoid": sigmoid, "__name__": __name__}  # fmt: skip
    exec(compile(source, file, "exec"), names)
    return triton.jit(names[name])


def _line(name, operands):
    if name == "constant":
        return f"tl.full([1, 1], {_literal(operands[0])}, tl.float32)"
    if name == "integer":
        return f"tl.full([1, 1], {operands[0]}, tl.int32)"
    if name == "index":
        place, size, stride, base = operands
        return f"index(v{place}, {size}, {stride}, v{base})"
    if name in ("load", "load_integer"):
        table, place = operands[:2]
        other, kind = ('float("nan")', "tl.float32") if name == "load" else ("0", "tl.int32")
        return f"tl.load({TABLES[table]} + v{place}, mask=v{place} >= 0, other={other}).to({kind})"
    return LINES[name].format(*(f"v{number}" for number in operands))


def _literal(number):
    return repr(number) if number - number == 0 else f'float("{number}")'
