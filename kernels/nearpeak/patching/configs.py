"""How one transformers model gets another configuration while others may share the one it had.

`LlamaModel(config)` keeps the very object it is given, and its layers keep it too; two models made from one
configuration share it. So a model's configurations are exchanged for copies of its own before anything is changed.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.configuration_utils import PreTrainedConfig


class OwnConfig(NamedTuple):
    original: PreTrainedConfig
    own: PreTrainedConfig
    before: dict  # own's attributes as patching left them


def take_own(model: torch.nn.Module) -> list[OwnConfig]:
    """Give every module of `model` copies of its configurations; those of a part that was patched before stay."""
    taken = {}

    def own(config):
        if config._attn_implementation == "nearpeak":
            return config
        if id(config) not in taken:
            taken[id(config)] = OwnConfig(config, copy.copy(config), {})
            for holder, name, nested in _nested(taken[id(config)].own):
                holder[name] = own(nested)
        return taken[id(config)].own

    for module in model.modules():
        for holder, name, config in _nested(module):
            holder[name] = own(config)
    return list(taken.values())


def remember(configs: list[OwnConfig]) -> None:
    """Take the copies as they are for patching's doing: what changes from here on is the user's."""
    for config in configs:
        config.before.update(vars(config.own))


def give_back(model: torch.nn.Module, configs: list[OwnConfig]) -> None:
    """Give the original configurations back, with whatever the user changed in the copies meanwhile."""
    originals = {id(own): original for original, own, _ in configs}
    for original, own, before in configs:
        for name, value in vars(own).items():
            if name not in before or value is not before[name]:
                vars(original)[name] = originals.get(id(value), value)
    for module in model.modules():
        for holder, name, config in _nested(module):
            holder[name] = originals.get(id(config), config)


def _nested(owner) -> Iterator[tuple[dict, str, PreTrainedConfig]]:
    """Every configuration among the attributes of a module or configuration, with the place it is held in."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, PreTrainedConfig):
            yield vars(owner), name, value
