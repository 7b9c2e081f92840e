"""The instructions of score programs.

An instruction is five numbers: an operation, its operands (numbers of the values before it) or constants. Values 0 to 4
are the function's arguments; every instruction makes the next.
"""

import struct
from typing import NamedTuple

import torch

# The C++ kernels (csrc/attention/cpu/score_program.h) know the operations by these numbers.
OPERATIONS = (
    "constant", "integer", "load", "load_integer", "index",
    "add", "subtract", "multiply", "divide", "minimum", "maximum", "negative", "absolute", "exp", "log", "sqrt", "tanh",
    "sigmoid", "sin", "cos", "power", "floor", "select", "less", "less_equal", "equal",
    "add_integers", "subtract_integers", "multiply_integers", "floor_divide", "remainder", "minimum_integers",
    "maximum_integers", "negative_integer", "absolute_integer", "less_integers", "less_equal_integers",
    "equal_integers", "select_integers", "and", "or", "xor", "not", "to_float", "truth_to_float", "truth_to_integer",
    "to_integer",
)  # fmt: skip
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
ARGUMENTS = ("score", "batch", "head", "query", "key")
MOST_VALUES = 96  # of a program, so that the kernels keep all of them in the first-level cache
WIDTH = 5  # numbers of an instruction


class Value(NamedTuple):
    """A value of a program: its number, and "float", "integer" or "truth"."""

    number: int
    kind: str


class Program:
    """A list of instructions that grows."""

    def __init__(self):
        self.instructions: list[tuple] = []
        self.kinds = ["float", *["integer"] * 4]
        self.tensors: list[torch.Tensor] = []
        self._known: dict[tuple, Value] = {}

    def emit(self, name: str, kind: str, *operands) -> Value:
        """Append an instruction, unless the program has it already."""
        instruction = (name, *(each.number if isinstance(each, Value) else each for each in operands))
        if instruction not in self._known:
            self.instructions.append(instruction)
            self.kinds.append(kind)
            self._known[instruction] = Value(len(self.kinds) - 1, kind)
        return self._known[instruction]

    def argument(self, name: str) -> Value:
        number = ARGUMENTS.index(name)
        return Value(number, self.kinds[number])

    def constant(self, value: float) -> Value:
        return self.emit("constant", "float", float(value))

    def integer(self, value: int) -> Value:
        return self.emit("integer", "integer", int(value))

    def instruction_of(self, value: Value) -> tuple | None:
        """The instruction that makes a value; None for an argument."""
        place = value.number - len(ARGUMENTS)
        return None if place < 0 else self.instructions[place]

    def value(self, number: int) -> Value:
        return Value(number, self.kinds[number])

    def as_float(self, value: Value) -> Value:
        if value.kind == "float":
            return value
        return self.emit("to_float" if value.kind == "integer" else "truth_to_float", "float", value)

    def as_integer(self, value: Value) -> Value:
        if value.kind == "integer":
            return value
        return self.emit("to_integer" if value.kind == "float" else "truth_to_integer", "integer", value)

    def as_truth(self, value: Value) -> Value:
        if value.kind == "truth":
            return value
        if value.kind == "float":
            return self.emit("not", "truth", self.emit("equal", "truth", value, self.constant(0.0)))
        return self.emit("not", "truth", self.emit("equal_integers", "truth", value, self.integer(0)))


def encoded(instruction: tuple) -> tuple[int, ...]:
    """An instruction's five numbers."""
    name, *operands = instruction
    if name == "constant":
        operands = struct.unpack("<q", struct.pack("<d", *operands))
    return (NUMBER[name], *operands, *[0] * (WIDTH - 1 - len(operands)))


def decoded(row: tuple[int, ...]) -> tuple:
    """(name, operands) of an instruction's five numbers."""
    name = OPERATIONS[row[0]]
    return name, struct.unpack("<d", struct.pack("<q", row[1])) if name == "constant" else tuple(row[1:])
