"""From torch's record of what a function did (a torch.fx graph of aten operators) to a score program's instructions."""

import operator

import torch

from .score_instructions import Program, Value


class Translator:
    """Appends to a program what a function did."""

    def __init__(self, graph: torch.fx.GraphModule, program: Program, wants_gradients: bool):
        self.graph, self.program, self.wants_gradients = graph, program, wants_gradients
        self.values: dict[torch.fx.Node, object] = {}

    def result(self, arguments: tuple[str, ...]) -> Value:
        arguments = iter(arguments)
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.program.argument(next(arguments))
            elif node.op == "get_attr":
                self.values[node] = self._attribute(operator.attrgetter(node.target)(self.graph))
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                return self._returned(node.args[0])
        raise AssertionError("torch's record of a function ends with what it returns")

    def _returned(self, node):
        value = self.values.get(node) if isinstance(node, torch.fx.Node) else node
        if isinstance(value, (bool, int, float)):
            value = self._of_number(value)
        if not isinstance(value, Value):
            raise TypeError(f"score_mod and mask_mod must return a tensor of one element, not {value!r}")
        return value

    def _attribute(self, tensor):
        """A tensor that the function looks at: a constant where it has one element, else to be looked up."""
        return self._of_number(tensor.item()) if tensor.numel() == 1 and not tensor.requires_grad else tensor

    def _of_number(self, number):
        if isinstance(number, bool):
            truth = self.program.emit("equal_integers", "truth", self.program.integer(0), self.program.integer(0))
            return truth if number else self.program.emit("not", "truth", truth)
        return self.program.integer(number) if isinstance(number, int) else self.program.constant(number)

    def _operand(self, argument) -> Value:
        value = self.values[argument] if isinstance(argument, torch.fx.Node) else argument
        if isinstance(value, (bool, int, float)):
            return self._of_number(value)
        if isinstance(value, torch.Tensor):
            raise NotImplementedError(
                "score_mod must look tensors up by batch, head, query and key, not take them whole"
            )
        return value

    def _call(self, node):
        packet = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
        name = str(packet).removeprefix("aten.")
        if name in SAME:
            return self.values[node.args[0]]
        if name == "index":
            return self._look_up(*node.args)
        if name in ("scalar_tensor", "full"):
            return self._operand(node.args[-1])
        if name in ("zeros_like", "ones_like", "full_like"):
            return self._of_number({"zeros_like": 0.0, "ones_like": 1.0}.get(name, node.args[-1]))
        if name in ("_to_copy", "to"):
            return self._converted(self._operand(node.args[0]), node.kwargs.get("dtype"))
        if name in FUNCTIONS:
            return FUNCTIONS[name](self.program, *map(self._operand, node.args), **node.kwargs)
        raise NotImplementedError(f"score_mod: {name} has no instruction in the kernels; pass a bias, or rewrite it")

    def _converted(self, value, dtype):
        if dtype is None:
            return value
        if dtype is torch.bool:
            return self.program.as_truth(value)
        return self.program.as_float(value) if dtype.is_floating_point else self.program.as_integer(value)

    def _look_up(self, source, indices):
        """tensor[index, ...]: the element's place is found index by index, -1 where one lies outside."""
        tensor = self.values[source]
        if not isinstance(tensor, torch.Tensor) or len(indices) != tensor.dim() or None in indices:
            raise NotImplementedError("score_mod must look a tensor up by one number for each of its dimensions")
        if self.wants_gradients and tensor.requires_grad:
            raise NotImplementedError("tensors that score_mod looks up get no gradient: detach them, or pass a bias")
        program = self.program
        tensor = tensor.detach()
        kind = torch.float64 if tensor.dtype is torch.float64 else torch.float32
        tensor = tensor.to(kind if tensor.is_floating_point() else torch.int32).contiguous()
        if tensor.numel() >= 2**31:
            raise NotImplementedError("score_mod must look up tensors of fewer than 2^31 elements")
        place = program.integer(0)
        for index, size, stride in zip(indices, tensor.shape, tensor.stride(), strict=True):
            place = program.emit("index", "integer", program.as_integer(self._operand(index)), size, stride, place)
        program.tensors.append(tensor)
        number = len(program.tensors) - 1
        if tensor.is_floating_point():
            return program.emit("load", "float", number, place)
        return program.emit("load_integer", "integer", number, place)


# Of one number these change nothing.
SAME = (
    "alias", "clone", "contiguous", "detach", "expand", "lift_fresh_copy", "reshape", "squeeze", "unsqueeze", "view",
    "_unsafe_view",
)  # fmt: skip


def _unary(name, integer_name=None):
    def translate(program, x):
        if integer_name is not None and x.kind == "integer":
            return program.emit(integer_name, "integer", x)
        return program.emit(name, "float", program.as_float(x))

    return translate


def _binary(name, integer_name=None, kind=None):
    """kind: of the result, if that is not the operands'."""

    def translate(program, x, y):
        if integer_name is None or "float" in (x.kind, y.kind):
            return program.emit(name, kind or "float", program.as_float(x), program.as_float(y))
        return program.emit(integer_name, kind or "integer", program.as_integer(x), program.as_integer(y))

    return translate


def _scaled_second(name, integer_name):
    """x + alpha * y, and x - alpha * y."""
    plain, product = _binary(name, integer_name), _binary("multiply", "multiply_integers")

    def translate(program, x, y, alpha=1):
        if alpha != 1:
            factor = program.integer(alpha) if isinstance(alpha, int) else program.constant(alpha)
            y = product(program, y, factor)
        return plain(program, x, y)

    return translate


def _swapped(translate):
    return lambda program, x, y: translate(program, y, x)


def _not(translate):
    return lambda *arguments: arguments[0].emit("not", "truth", translate(*arguments))


def _logical(name):
    def translate(program, x, y):
        return program.emit(name, "truth", program.as_truth(x), program.as_truth(y))

    return translate


def _where(program, condition, x, y):
    condition = program.as_truth(condition)
    if x.kind == y.kind == "integer":
        return program.emit("select_integers", "integer", condition, x, y)
    return program.emit("select", "float", condition, program.as_float(x), program.as_float(y))


def _divide(program, x, y, rounding_mode=None):
    if rounding_mode == "floor" and "float" not in (x.kind, y.kind):
        return program.emit("floor_divide", "integer", program.as_integer(x), program.as_integer(y))
    quotient = program.emit("divide", "float", program.as_float(x), program.as_float(y))
    if rounding_mode is None:
        return quotient
    if rounding_mode == "floor":
        return program.emit("floor", "float", quotient)
    raise NotImplementedError("score_mod must divide by / or //: division towards zero has no instruction")


def _remainder(program, x, y):
    if "float" not in (x.kind, y.kind):
        return program.emit("remainder", "integer", program.as_integer(x), program.as_integer(y))
    x, y = program.as_float(x), program.as_float(y)
    whole = program.emit("floor", "float", program.emit("divide", "float", x, y))
    return program.emit("subtract", "float", x, program.emit("multiply", "float", whole, y))


def _power(program, x, y):
    instruction = program.instruction_of(y)
    if instruction is not None and instruction[0] in ("integer", "constant") and instruction[1] in (2, 3, 4):
        multiply = _binary("multiply", "multiply_integers")
        square = multiply(program, x, x)
        return square if instruction[1] == 2 else multiply(program, square, x if instruction[1] == 3 else square)
    return program.emit("power", "float", program.as_float(x), program.as_float(y))


def _reciprocal(program, x):
    return program.emit("divide", "float", program.constant(1.0), program.as_float(x))


def _clamp(program, x, low=None, high=None):
    for bound, translate in ((low, FUNCTIONS["maximum"]), (high, FUNCTIONS["minimum"])):
        x = x if bound is None else translate(program, x, bound)
    return x


_LESS = _binary("less", "less_integers", "truth")
_LESS_EQUAL = _binary("less_equal", "less_equal_integers", "truth")
_EQUAL = _binary("equal", "equal_integers", "truth")
FUNCTIONS = {
    "add": _scaled_second("add", "add_integers"),
    "sub": _scaled_second("subtract", "subtract_integers"),
    "rsub": lambda program, x, y, alpha=1: FUNCTIONS["sub"](program, y, x, alpha),
    "mul": _binary("multiply", "multiply_integers"),
    "div": _divide,
    "floor_divide": lambda program, x, y: _divide(program, x, y, "floor"),
    "remainder": _remainder,
    "minimum": _binary("minimum", "minimum_integers"),
    "maximum": _binary("maximum", "maximum_integers"),
    "clamp": _clamp,
    "clamp_min": lambda program, x, low: _clamp(program, x, low),
    "clamp_max": lambda program, x, high: _clamp(program, x, None, high),
    "relu": lambda program, x: _clamp(program, x, program.constant(0.0)),
    "neg": _unary("negative", "negative_integer"),
    "abs": _unary("absolute", "absolute_integer"),
    "exp": _unary("exp"),
    "exp2": lambda program, x: _power(program, program.constant(2.0), x),
    "log": _unary("log"),
    "log2": lambda program, x: FUNCTIONS["mul"](
        program, program.emit("log", "float", program.as_float(x)), program.constant(1.4426950408889634)
    ),
    "sqrt": _unary("sqrt"),
    "rsqrt": lambda program, x: _reciprocal(program, program.emit("sqrt", "float", program.as_float(x))),
    "reciprocal": _reciprocal,
    "tanh": _unary("tanh"),
    "sigmoid": _unary("sigmoid"),
    "sin": _unary("sin"),
    "cos": _unary("cos"),
    "pow": _power,
    "floor": _unary("floor"),
    "where": _where,
    "lt": _LESS,
    "le": _LESS_EQUAL,
    "gt": _swapped(_LESS),
    "ge": _swapped(_LESS_EQUAL),
    "eq": _EQUAL,
    "ne": _not(_EQUAL),
    "bitwise_and": _logical("and"),
    "bitwise_or": _logical("or"),
    "bitwise_xor": _logical("xor"),
    "bitwise_not": lambda program, x: program.emit("not", "truth", program.as_truth(x)),
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_xor": _logical("xor"),
    "logical_not": lambda program, x: program.emit("not", "truth", program.as_truth(x)),
}
