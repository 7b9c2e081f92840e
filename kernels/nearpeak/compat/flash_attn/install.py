"""Lets `import flash_attn` find nearpeak's functions, in this process and until it is undone."""

import importlib.machinery
import sys
import types

from . import functions, kvcache, padding

# What `flash_attn.__version__` says: the release whose interface this is, and whose hands it is in.
VERSION = "2.8.3+nearpeak"

MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")


def install() -> None:
    """Let `import flash_attn` and `from flash_attn.flash_attn_interface import ...` find nearpeak's functions.

    Installed again it stays as it is. Submodules that nearpeak has not (flash_attn.layers, ...) are not found.

    Raises RuntimeError where the real flash_attn has been imported already.

    >>> nearpeak.compat.flash_attn.install()
    >>> from flash_attn import flash_attn_func
    >>> nearpeak.compat.flash_attn.uninstall()
    """
    others = [name for name in sys.modules if name.split(".")[0] == "flash_attn" and not _is_ours(name)]
    if others:
        raise RuntimeError(
            f"the real flash_attn was imported already ({', '.join(sorted(others))}): call "
            f"nearpeak.compat.flash_attn.install() before anything imports it"
        )
    if not _is_ours("flash_attn"):
        sys.modules.update(_modules())


def uninstall() -> None:
    """Undo `install`: `import flash_attn` finds what is installed, or nothing. What was imported stays usable.

    Raises RuntimeError where nearpeak is not installed as flash_attn.

    >>> nearpeak.compat.flash_attn.install()
    >>> nearpeak.compat.flash_attn.uninstall()
    """
    if not _is_ours("flash_attn"):
        raise RuntimeError("nearpeak is not installed as flash_attn: call install() first")
    for name in MODULES:
        sys.modules.pop(name, None)


def _is_ours(name) -> bool:
    return getattr(sys.modules.get(name), "__version__", None) == VERSION


def _modules() -> dict[str, types.ModuleType]:
    """flash_attn and its submodules, new ones: attributes that a program sets on them touch nothing of nearpeak's."""
    attention = {
        name: getattr(module, name)
        for module in (functions, kvcache)
        for name in dir(module)
        if name.startswith("flash_attn_")
    }
    paddings = {name: getattr(padding, name) for name in padding.__all__}
    package, interface, bert_padding = (
        _module(name, names) for name, names in zip(MODULES, (attention, attention, paddings), strict=True)
    )
    package.flash_attn_interface, package.bert_padding = interface, bert_padding
    return dict(zip(MODULES, (package, interface, bert_padding), strict=True))


def _module(name, names):
    module = types.ModuleType(name, f"nearpeak's functions under the name {name}.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "flash_attn")
    if name == "flash_attn":
        module.__path__ = []
    vars(module).update(names, __version__=VERSION)
    return module
