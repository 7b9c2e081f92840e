"""The derivative of a score program with respect to the score, in the program's own instructions.

Each rule below is of one instruction: given its value and its operands, each with the derivative that it has already or
None for zero, it appends what makes the value's own.
"""

from .score_instructions import ARGUMENTS


def differentiate(program, score):
    """Append what makes the derivative of the value `score`, and return that."""
    derivatives = {program.argument("score").number: program.constant(1.0)}
    for place, (name, *operands) in enumerate(list(program.instructions)):
        value = program.value(len(ARGUMENTS) + place)
        if name not in RULES:
            continue
        values = [program.value(number) for number in operands]
        d = [derivatives.get(number) for number in operands]
        if any(each is not None for each in d) and (made := RULES[name](program, value, values, d)) is not None:
            derivatives[value.number] = made
    return derivatives.get(score.number) or program.constant(0.0)


def _product(program, x, y):
    """x y, where None is zero."""
    if x is None or y is None:
        return None
    one = ("constant", 1.0)
    if program.instruction_of(x) == one:
        return y
    if program.instruction_of(y) == one:
        return x
    return program.emit("multiply", "float", x, y)


def _sum(program, x, y, name="add"):
    if y is None:
        return x
    if x is None:
        return y if name == "add" else program.emit("negative", "float", y)
    return program.emit(name, "float", x, y)


def _or_zero(program, x):
    return program.constant(0.0) if x is None else x


def _multiply(program, _, values, d):
    return _sum(program, _product(program, d[0], values[1]), _product(program, values[0], d[1]))


def _divide(program, value, values, d):
    """(dx - value dy) / y"""
    upper = _sum(program, d[0], _product(program, value, d[1]), "subtract")
    return program.emit("divide", "float", upper, values[1])


def _chosen(comparison):
    """Of the minimum or maximum: the derivative of the one that is chosen; of equal ones half of each."""

    def rule(program, _, values, d):
        first, second = (_or_zero(program, each) for each in d)
        ordered = values if comparison == "less" else values[::-1]
        is_first = program.emit("less", "truth", *ordered)
        same = program.emit("equal", "truth", *values)
        half = _product(program, program.constant(0.5), program.emit("add", "float", first, second))
        return program.emit("select", "float", same, half, program.emit("select", "float", is_first, first, second))

    return rule


def _absolute(program, _, values, d):
    """dx times the sign of x, which is 0 at 0."""
    (x,), zero = values, program.constant(0.0)
    negative = program.emit("less", "truth", x, zero)
    signed = program.emit("select", "float", negative, program.emit("negative", "float", d[0]), d[0])
    return program.emit("select", "float", program.emit("equal", "truth", x, zero), zero, signed)


def _sqrt(program, value, _, d):
    return program.emit("divide", "float", _product(program, program.constant(0.5), d[0]), value)


def _tanh(program, value, _, d):
    square = program.emit("multiply", "float", value, value)
    return _product(program, d[0], program.emit("subtract", "float", program.constant(1.0), square))


def _sigmoid(program, value, _, d):
    rest = program.emit("subtract", "float", program.constant(1.0), value)
    return _product(program, d[0], program.emit("multiply", "float", value, rest))


def _cos(program, _, values, d):
    return _product(program, d[0], program.emit("negative", "float", program.emit("sin", "float", values[0])))


def _power(program, value, values, d):
    """x^y: dx y x^(y - 1) + dy log(x) x^y"""
    x, y = values
    lower = program.emit("power", "float", x, program.emit("subtract", "float", y, program.constant(1.0)))
    of_x = _product(program, d[0], program.emit("multiply", "float", y, lower)) if d[0] is not None else None
    of_y = None
    if d[1] is not None:
        of_y = _product(program, d[1], program.emit("multiply", "float", program.emit("log", "float", x), value))
    return _sum(program, of_x, of_y)


def _select(program, _, values, d):
    return program.emit("select", "float", values[0], _or_zero(program, d[1]), _or_zero(program, d[2]))


RULES = {
    "add": lambda program, _, values, d: _sum(program, *d),
    "subtract": lambda program, _, values, d: _sum(program, *d, "subtract"),
    "multiply": _multiply,
    "divide": _divide,
    "minimum": _chosen("less"),
    "maximum": _chosen("greater"),
    "negative": lambda program, _, values, d: program.emit("negative", "float", d[0]),
    "absolute": _absolute,
    "exp": lambda program, value, _, d: _product(program, d[0], value),
    "log": lambda program, _, values, d: program.emit("divide", "float", d[0], values[0]),
    "sqrt": _sqrt,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "sin": lambda program, _, values, d: _product(program, d[0], program.emit("cos", "float", values[0])),
    "cos": _cos,
    "power": _power,
    "select": _select,
}
