"""The choice of backend and instruction set: by default, in a block, by environment, and where something is missing."""

import os
import pathlib
import shutil
import subprocess
import sys

import nearpeak
import pytest
import torch
from inputs import randn
from nearpeak import backends, operators

X = randn(3, 64)
PACKAGE = pathlib.Path(nearpeak.__file__).parent

native_only = pytest.mark.skipif(backends.native.missing is not None, reason=f"cpu: {backends.native.missing}")


def served_by(x=X):
    """The backend that serves a call, by the reasons and operators that explain notes."""
    return nearpeak.explain(nearpeak.rms_norm, x)


def python(code, environment=None, folder=PACKAGE.parent):
    """Run code in a fresh process that imports nearpeak from `folder`: (exit code, everything it printed)."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("NEARPEAK_", "TRITON_"))}
    settings |= {"PYTHONPATH": str(folder), **(environment or {})}
    result = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def test_use_backend_nests_and_restores():
    assert backends._forced is None
    with nearpeak.use_backend("reference"):
        with nearpeak.use_backend("reference"):
            assert backends._forced == "reference"
        assert backends._forced == "reference"
    assert backends._forced is None


def test_use_backend_restores_after_an_exception():
    with pytest.raises(KeyError), nearpeak.use_backend("reference"):
        raise KeyError
    assert backends._forced is None


@pytest.mark.parametrize("name", ["", "gpu", "CPU", None, 3], ids=repr)
def test_unknown_backends_are_refused(name):
    if name is None:
        pytest.skip("None is how a backend is released")
    with (
        pytest.raises(ValueError, match="backend must be one of cpu, triton, cuda, reference"),
        nearpeak.use_backend(name),
    ):
        pass
    assert backends._forced is None


def test_a_missing_backend_says_what_it_lacks():
    missing = [name for name in backends.NAMES if backends.missing(name)]
    for name in missing:
        with pytest.raises(RuntimeError, match="is not available"), nearpeak.use_backend(name):
            pass
    assert backends.missing("reference") is None
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.missing("opencl")


def test_reference_serves_when_forced():
    with nearpeak.use_backend("reference"):
        assert "reference" in served_by()


@native_only
def test_cpu_serves_by_default_and_when_forced():
    assert "C++" in served_by()
    with nearpeak.use_backend("cpu"):
        assert "C++" in served_by()


@pytest.fixture
def both_gpu_backends(monkeypatch):
    """As on a machine with a GPU, Triton and a CUDA build: for calls on fake tensors, which run no kernel."""
    monkeypatch.setattr(backends, "missing", lambda name: None)
    with torch.library._scoped_library("nearpeak", "IMPL") as library:
        for name in ("rms_norm_inference", "apply_rotary_inference", "attention_inference"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"nearpeak::{name}", "CUDA"):
                library.impl(name, lambda *arguments: pytest.fail("a kernel ran"), "CUDA")
        yield


def on_gpu(function):
    """A call of `function` on tensors (of a size) that it makes on the GPU."""
    return nearpeak.explain(lambda: function(lambda *size: torch.empty(*size, device="cuda")))


def norm(empty):
    return nearpeak.rms_norm(empty(3, 16))


def rotary(empty):
    return nearpeak.apply_rotary(*[empty(1, 2, 5, 16)] * 2, *[empty(5, 8)] * 2)


def attention(empty):
    return nearpeak.attention(*[empty(1, 2, 5, 16)] * 3)


@pytest.mark.parametrize("call", [norm, rotary])
def test_triton_serves_gpus_until_cuda_is_forced(both_gpu_backends, call):
    assert "on cuda:0, float32: Triton kernel" in on_gpu(call)
    with nearpeak.use_backend("cuda"):
        assert "on cuda:0, float32: CUDA C++ kernel" in on_gpu(call)
    with nearpeak.use_backend("triton"):
        assert "on cuda:0, float32: Triton kernel" in on_gpu(call)


def test_cuda_refuses_what_it_has_no_kernel_for(both_gpu_backends):
    assert "Triton kernel" in on_gpu(attention)
    with nearpeak.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="backend 'cuda' has no kernel for this operation, only cpu, triton"):
            on_gpu(attention)
        with pytest.raises(RuntimeError, match="backend 'cuda' does not serve tensors on cpu"):
            nearpeak.rms_norm(X)


def test_cuda_serves_gpus_where_triton_is_missing(both_gpu_backends, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: "not installed" if name == "triton" else None)
    assert "CUDA C++ kernel" in on_gpu(norm)
    assert "plain PyTorch reference" in on_gpu(attention)


def test_a_gpu_operator_runs_the_kernel_that_is_chosen_when_it_is_called(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: None)
    kernel = operators._gpu_kernel("for_tests(Tensor x) -> Tensor", triton=lambda x: x + 1, cuda=True)
    with torch.library._scoped_library("nearpeak_cuda", "IMPL") as library:
        library.impl("for_tests", lambda x: x + 2, "CPU")
        assert torch.equal(kernel(X), X + 1)
        with nearpeak.use_backend("cuda"):
            assert torch.equal(kernel(X), X + 2)
        assert torch.equal(kernel(X), X + 1)


def test_an_extension_without_cuda_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(backends.native, "missing", None)
    monkeypatch.setattr(backends.native, "built_for_cuda", lambda: False)
    with pytest.raises(RuntimeError, match=r"built without CUDA: install a CUDA build of torch .*\(nvcc\)"):
        backends.force("cuda")


def test_float64_goes_to_the_reference():
    assert nearpeak.rms_norm(X.double()).dtype is torch.float64
    assert "reference" in served_by(X.double())


@native_only
def test_forced_cpu_refuses_float64_and_other_devices():
    with nearpeak.use_backend("cpu"):
        with pytest.raises(TypeError, match=r"backend 'cpu' serves float32, bfloat16 and float16, not torch\.float64"):
            nearpeak.rms_norm(X.double())
        with pytest.raises(RuntimeError, match="backend 'cpu' does not serve tensors on meta"):
            nearpeak.rms_norm(X.to("meta"))


def test_meta_tensors_have_shapes_only():
    meta = torch.ones(2, 4, 5, 8, device="meta")
    assert nearpeak.rms_norm(meta).shape == meta.shape
    assert nearpeak.attention(meta, meta, meta).device.type == "meta"
    assert nearpeak.apply_rotary(meta, meta, meta[0, 0, :, :4], meta[0, 0, :, :4])[0].shape == meta.shape


@native_only
def test_instruction_sets_are_listed_and_chosen():
    assert backends.isa() == backends.isas_supported()[-1] or "NEARPEAK_ISA" in os.environ
    assert set(backends.isas_supported()) <= set(backends.isas_built())
    assert "portable" in backends.isas_supported()


@native_only
def test_use_isa_nests_and_restores():
    before = backends.isa()
    for name in backends.isas_supported():
        with nearpeak.use_isa(name):
            assert backends.isa() == name
            with pytest.raises(KeyError), nearpeak.use_isa("portable"):
                raise KeyError
            assert backends.isa() == name
    assert backends.isa() == before


@native_only
@pytest.mark.parametrize("name", ["sse", "", "AVX2"], ids=repr)
def test_unknown_instruction_sets_are_refused(name):
    before = backends.isa()
    with pytest.raises(ValueError, match="cannot run here"), nearpeak.use_isa(name):
        pass
    assert backends.isa() == before


@native_only
def test_instruction_sets_of_other_processors_are_refused():
    others = set(backends.isas_built()) - set(backends.isas_supported())
    for name in others:
        with pytest.raises(ValueError, match="this build and processor have: portable"), nearpeak.use_isa(name):
            pass


SHOW = "import nearpeak; from nearpeak import backends; print('forced', backends._forced, 'isa', backends.isa())"


def test_environment_forces_a_backend():
    assert "forced reference" in python(SHOW, {"NEARPEAK_BACKEND": "reference"})[1]


@pytest.mark.parametrize("name", ["gpu", "triton"])
def test_environment_with_a_wrong_backend_is_an_error(name):
    if name == "triton" and backends.missing("triton") is None:
        pytest.skip("Triton can serve here")
    code, text = python(SHOW, {"NEARPEAK_BACKEND": name})
    assert code != 0
    assert f"'{name}'" in text.splitlines()[-1]


def test_empty_environment_variables_mean_nothing():
    code, text = python(SHOW, {"NEARPEAK_BACKEND": "", "NEARPEAK_ISA": ""})
    assert code == 0, text
    assert "forced None" in text


@native_only
def test_environment_forces_an_instruction_set():
    assert "isa portable" in python(SHOW, {"NEARPEAK_ISA": "portable"})[1]


@native_only
def test_environment_with_a_wrong_instruction_set_is_an_error():
    code, text = python(SHOW, {"NEARPEAK_ISA": "sse"})
    assert code != 0
    assert "NEARPEAK_ISA='sse' cannot run here; this build and processor have: portable" in text.splitlines()[-1]


USE_ALL = """
import torch, nearpeak
from nearpeak import backends, operators
x = torch.randn(1, 2, 3, 8)
nearpeak.rms_norm(x), nearpeak.attention(x, x, x), nearpeak.apply_rotary(x, x, x[0, 0, :, :4], x[0, 0, :, :4])
print("missing:", backends.missing("cpu"))
try:
    nearpeak.use_backend("cpu").__enter__()
except RuntimeError as error:
    print("refused:", error)
"""


@pytest.fixture
def without_extension(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "nearpeak", ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    return tmp_path


def test_without_the_extension_the_reference_serves(without_extension):
    code, text = python(USE_ALL, folder=without_extension)
    assert code == 0, text
    assert "missing: the C++ extension was not built: install a C++17 compiler" in text
    assert "refused: backend 'cpu' is not available: the C++ extension was not built" in text


def test_an_extension_that_does_not_load_says_why(without_extension):
    (without_extension / "nearpeak" / "_native.abi3.so").write_bytes(b"not a library")
    code, text = python(USE_ALL, folder=without_extension)
    assert code == 0, text
    assert "missing: the C++ extension does not load into torch" in text


def test_triton_interpreter_takes_the_cpu():
    pytest.importorskip("triton")
    code, text = python(USE_ALL, {"TRITON_INTERPRET": "1"})
    assert code == 0, text
    assert "refused: backend 'cpu' is not available: TRITON_INTERPRET=1" in text
