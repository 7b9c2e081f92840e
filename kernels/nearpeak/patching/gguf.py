"""`load_gguf`: gives a transformers model the weights of a GGUF file, quantised matrices in the file's own blocks.

Which tensor of the file belongs to which parameter, and what llama.cpp did to it, is transformers' own knowledge. Its
processors work on float arrays; of a matrix in blocks they are asked about its rows' numbers, which tells how they
reorder the rows. What they do beyond that is done to the dequantised matrix.
"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..linear import GgufEmbedding, GgufLinear, GgufWeight
from ..linear.gguf_file import open_gguf
from ..linear.input_rounding import check_input_bits
from . import embeddings, linears
from .quantization import put

TITLE = "nearpeak.load_gguf"


class LoadedTensor(NamedTuple):
    """A parameter of the model, and what it got."""

    name: str
    kind: str  # of blocks, "Q8_0"; or a dtype, where it is floats
    bytes: int


@dataclass(frozen=True)
class GgufReport:
    """What `load_gguf` did to a model; prints as a table.

    >>> report = nearpeak.load_gguf(model, "model.gguf")
    >>> print(report)
    >>> sum(tensor.bytes for tensor in report.in_blocks)
    """

    in_blocks: tuple[LoadedTensor, ...]  # read where the file lies
    as_floats: tuple[LoadedTensor, ...]  # norms and biases, and matrices that no layer multiplies with in blocks
    not_used: tuple[str, ...]  # tensors of the file that the model has no place for

    def __str__(self) -> str:
        lines = [TITLE]
        for heading, tensors in (("in the file's blocks", self.in_blocks), ("as floats", self.as_floats)):
            for kind, count in Counter(tensor.kind for tensor in tensors).items():
                size = sum(tensor.bytes for tensor in tensors if tensor.kind == kind)
                lines.append(f"{heading:<22}{kind:<10}{count:>4} tensors  {size / 1e6:>9.2f} MB")
        lines += [f"not used: {name}" for name in self.not_used]
        return "\n".join(lines)


class _Place(NamedTuple):
    """Where a parameter is."""

    module: torch.nn.Module
    attribute: str
    parameter: torch.nn.Parameter


@torch.no_grad()
def load_gguf(model: torch.nn.Module, path: str | os.PathLike, input_bits: int | None = None) -> GgufReport:
    """Give a transformers model the weights of a GGUF file, in place, without widening its quantised matrices.

    torch.nn.Linear modules and embeddings whose matrix the file holds in blocks become `nearpeak.nn.GgufLinear` and
    `nearpeak.nn.GgufEmbedding`, which read the mapped file; a matrix that both share stays shared. Every other
    parameter becomes what the file holds, in the dtype that it had. The model then runs in that dtype; with input_bits
    its linear layers round their inputs, as llama.cpp's do. `nearpeak.patch` serves the rest. Not undone by anything.

    Args:
        model: a transformers model of the file's architecture and sizes, with any weights.
        path: the file; see `nearpeak.read_gguf`. It must not change while the model is in use.
        input_bits: 8, or None to take inputs as they are; as `nearpeak.quantized_linear` takes it.

    Returns:
        what was loaded and how; print it.

    Raises:
        TypeError: not a transformers model. ValueError: a file that cannot be read, is of an architecture that
        transformers does not know from GGUF, or does not fit the model; the model is unchanged then. ImportError:
        transformers or gguf is not installed.

    >>> model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    >>> print(nearpeak.load_gguf(model, "model.gguf"))
    >>> nearpeak.patch(model)
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model, not {type(model).__name__}: for others there are nearpeak.read_gguf "
            "and nearpeak.nn.GgufLinear"
        )
    check_input_bits(input_bits)
    header, tensors = open_gguf(path)
    processor, names = _knowledge_of(model, header.architecture)
    layers, values, in_blocks, as_floats, used = {}, {}, [], [], set()
    for name, places in _places(model).items():
        source = _source(name, places, names, tensors, header)
        used.add(source)
        tensor = tensors[source]
        if isinstance(tensor, GgufWeight) and (found := _layers(places, tensor, processor, source, input_bits)):
            layers.update(found)
            in_blocks.append(LoadedTensor(name, tensor.kind, tensor.nbytes))
            continue
        parameter = places[name].parameter
        value = _floats(tensor, processor, source).to(parameter.dtype)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{os.fspath(path)} does not fit the model: {source} has shape {tuple(value.shape)}, "
                f"where {name} has {tuple(parameter.shape)}"
            )
        values[parameter] = value.to(parameter.device if not parameter.is_meta else "cpu")
        as_floats.append(LoadedTensor(name, str(value.dtype).removeprefix("torch."), value.nbytes))
    _set(model, layers, values)
    not_used = tuple(name for name in (each.name for each in header.descriptions) if name not in used)
    return GgufReport(tuple(in_blocks), tuple(as_floats), not_used)


def _knowledge_of(model, architecture):
    """transformers' processor of the architecture's tensors, and the file's names by the model's."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = model.config.get_text_config()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor, num_layers=config.num_hidden_layers)
    except NotImplementedError as error:
        raise ValueError(f"transformers knows no GGUF file of a {model.config.model_type} model") from error
    return processor, {name: source for source, name in names.items()}


def _places(model):
    """Parameters by their first name, with every place that holds them, by its name."""
    first, places = {}, {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(first.setdefault(parameter, name), {})[name] = _Place(module, attribute, parameter)
    return places


def _source(name, places, names, tensors, header):
    """The name in the file of a parameter's tensor."""
    sources = [names[each] for each in places if each in names]
    for source in sources:
        if source in tensors:
            return source
    kinds = {each.name: each.kind for each in header.descriptions}
    for source in sources:
        if source in kinds:
            raise ValueError(f"{source}, which is to be {name}, is of GGUF's type {kinds[source]}, which is not read")
    raise ValueError(f"the file holds nothing for the model's {name}" + (f": no {sources[0]}" if sources else ""))


def _layers(places, weight, processor, source, input_bits):
    """The modules that take the places of those that hold a matrix in blocks; None where one cannot."""
    weight = _reordered(weight, processor, source)
    if weight is None:
        return None
    layers = {}
    for module, attribute, parameter in places.values():
        if attribute != "weight" or parameter.shape != (weight.out_features, weight.in_features):
            return None
        if linears.is_linear(module):
            layer = GgufLinear(weight, module.bias, input_bits=input_bits)
        elif (scale := embeddings.scale_of(module)) is not None:
            layer = GgufEmbedding(weight, scale, parameter.dtype)
        else:
            return None
        layers[module] = layer.train(module.training)
    return layers


def _reordered(weight, processor, source):
    """The weight with its rows in the model's order; None if more than an order lies between both."""
    import numpy

    numbers = numpy.arange(weight.out_features, dtype=numpy.float64)[:, None]
    try:
        found = processor.process(weights=numbers, name=source, tensor_key_mapping={}, parsed_parameters={})
    except Exception:  # it may expect the whole matrix
        return None
    order = torch.from_numpy(numpy.ascontiguousarray(found.weights))
    if found.name != source or order.shape != numbers.shape or not torch.equal(order.sort(0)[0], torch.tensor(numbers)):
        return None
    order = order.flatten().long()
    in_order = torch.equal(order, torch.arange(len(order)))
    return weight if in_order else GgufWeight(weight.blocks[order], weight.kind)


def _floats(tensor, processor, source):
    tensor = tensor.dequantize() if isinstance(tensor, GgufWeight) else tensor.float()
    found = processor.process(weights=tensor.numpy(), name=source, tensor_key_mapping={}, parsed_parameters={})
    return torch.tensor(found.weights)


def _set(model, layers, values):
    """Every place gets its layer or value, once all are made: an error leaves the model whole."""
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter in values:
                value = torch.nn.Parameter(values[parameter], requires_grad=parameter.requires_grad)
                module._parameters[attribute] = value
    for module, layer in layers.items():
        if isinstance(layer, GgufLinear) and module.bias is not None:
            layer.bias = module.bias
    put(model, layers)
