"""The package as a user meets it: version, public names, and documentation whose examples run."""

import doctest
import importlib.metadata
import inspect
import pathlib
import re

import nearpeak
import pytest
import torch

FUNCTIONS = [name for name in nearpeak.__all__ if inspect.isroutine(getattr(nearpeak, name))]
DOCUMENTED = {
    **{name: getattr(nearpeak, name) for name in nearpeak.__all__ if callable(getattr(nearpeak, name))},
    **{f"nn.{name}": getattr(nearpeak.nn, name) for name in nearpeak.nn.__all__},
    **{name: getattr(nearpeak.compat.flash_attn, name) for name in nearpeak.compat.flash_attn.__all__},
}


def test_version_is_the_installed_packages():
    assert re.fullmatch(r"\d+\.\d+\.\d+", nearpeak.__version__)
    try:
        installed = importlib.metadata.version("nearpeak")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nearpeak is imported from its sources and not installed")
    assert nearpeak.__version__ == installed


def test_the_public_names_are_all_there_is():
    modules = {path.stem for path in pathlib.Path(nearpeak.__file__).parent.iterdir()}
    names = {name for name in dir(nearpeak) if not name.startswith("_")} - modules
    assert names | {"__version__", "nn"} == set(nearpeak.__all__) - (set(nearpeak.__all__) & (modules - {"nn"}) - names)
    assert nearpeak.__all__ == sorted(nearpeak.__all__)


def test_star_import_gives_the_public_names():
    names = {}
    exec("from nearpeak import *", names)
    assert set(nearpeak.__all__) <= set(names)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_is_documented_with_an_example(name):
    documentation = inspect.getdoc(DOCUMENTED[name])
    assert documentation
    assert ">>>" in documentation
    assert len(documentation.splitlines()[0]) <= 120


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What examples may use without making it."""
    monkeypatch.chdir(tmp_path)
    available = {"torch": torch, "nearpeak": nearpeak}
    try:
        import test_load_gguf
    except pytest.skip.Exception:
        return available
    model = test_load_gguf.MODELS["llama"](tied=True).eval()
    test_load_gguf.write(pathlib.Path("model.gguf"), "llama", model, tied=True)
    inputs = {"input_ids": torch.tensor([[2, 17, 42]]), "max_new_tokens": 2}
    transformers = test_load_gguf.transformers
    return {**available, "transformers": transformers, "config": model.config, "model": model, "inputs": inputs}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_run(name, names):
    """Whatever they print depends on the machine; that they run does not."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(DOCUMENTED[name]))
    if "model" not in names and any("model" in example.source for example in examples):
        pytest.skip("transformers is not installed")
    if any("use_isa" in example.source for example in examples) and nearpeak.backends.native.missing:
        pytest.skip(nearpeak.backends.native.missing)
    for example in examples:
        exec(compile(example.source, f"example of {name}", "exec"), names)
