"""Builds the C++ extension: the operators once, and every family's kernels (*kernels.cpp) once per instruction set.

Each instruction set's kernels live in a namespace of its name and are chosen when the library loads, so one wheel runs
on every processor of its architecture. Where there is no compiler the package is installed without the extension, and
says so when asked (`nearpeak info`). The CUDA kernels are built too where torch has CUDA and nvcc is there.

Environment variables:
    NEARPEAK_BUILD_EMULATED=1   also compile the AVX-512 and AMX sources for any AVX2 processor, to test them there
    NEARPEAK_SANITIZE=address   build with a sanitizer: address, undefined, thread (comma-separated)
    MAX_JOBS                    parallel compilations
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
FAMILIES = ("attention", "embedding", "feedforward", "linear", "norm", "peaks", "rotary")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# Every processor with AVX512_BF16 multiplies bytes too (VNNI).
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
# Simplest first: the last one that the processor can run is chosen. Emulated ones are never the last. The order is that
# of linking, too: of an inline function outside of the sets' namespaces the linker keeps the first set's code, which
# every processor runs.
INSTRUCTION_SETS = {
    "portable": [],
    "avx512_emulated": [*AVX2, "-DNEARPEAK_LANES=16"],
    "avx512_bf16_emulated": [*AVX2, "-DNEARPEAK_LANES=16", "-DNEARPEAK_EMULATE_PAIRS"],
    "amx_emulated": [*AVX2, "-DNEARPEAK_LANES=16", "-DNEARPEAK_EMULATE_PAIRS", "-DNEARPEAK_EMULATE_TILES"],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": AMX,
}
# The stable ABI of torch 2.10: what is built against any later torch runs with every one from 2.10 on.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Multiply-adds may fuse; nothing else that changes results. Python's own -fwrapv costs bfloat16 norms half their speed.
OPTIMISATION = ["-O3", "-g0", "-fno-wrapv", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CUDA_FAMILIES = ("norm", "rotary")
CUDA_TARGETS = ("80", "86", "89", "90", "100", "120")
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
# GCC 12 warns of its own AVX-512 headers, and of torch's.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unused-parameter"]


def compiler():
    return os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)


def compiles(flags):
    """Whether the compiler takes these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "empty.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [compiler(), "-std=c++17", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def instruction_sets():
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"portable": []}
    emulated = os.environ.get("NEARPEAK_BUILD_EMULATED") == "1"
    return {
        name: flags
        for name, flags in INSTRUCTION_SETS.items()
        if (emulated or not name.endswith("_emulated")) and compiles(flags)
    }


def isa_list(names):
    """The definition of NEARPEAK_ISAS, by which csrc/cpu/isa.h declares and gathers the kernels of these sets."""
    return "-DNEARPEAK_ISAS(X)=" + " ".join(f"X({name})" for name in names)


def sanitizers():
    return os.environ.get("NEARPEAK_SANITIZE", "")


def sanitizer_flags():
    """With -O1: attention's portable kernels compile in 20 s where -O3 takes 58 (GCC 12, Sapphire Rapids)."""
    names = sanitizers()
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-O1", "-g1"] if names else []


def cuda_targets():
    """The CUDA_TARGETS that nvcc knows; none, and why on stderr, where the CUDA kernels cannot be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return []
    nvcc = CUDA_HOME and pathlib.Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc or not nvcc.exists():
        print("nearpeak: no nvcc found: installing without the cuda backend", file=sys.stderr)
        return []
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in release:
        print(f"nearpeak: nvcc is not of torch's CUDA {torch.version.cuda}: installing without the cuda backend",
              file=sys.stderr)  # fmt: skip
        return []
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [target for target in CUDA_TARGETS if f"sm_{target}" in known]


def cuda_sources():
    files = [
        ROOT / "csrc" / family / "cuda" / name for family in CUDA_FAMILIES for name in ("kernels.cu", "operator.cpp")
    ]
    return [ROOT / "csrc" / "cuda" / "version.cpp", *files]


def nvcc_flags(targets):
    """Machine code for every target, and for later GPUs the newest one's code in PTX, which their driver compiles."""
    code = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    return [*NVCC_FLAGS, *code, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]


def extension_and_builder():
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    isas = instruction_sets()
    targets = cuda_targets()
    flags = [*OPTIMISATION, *WARNINGS, "-std=c++17", "-fvisibility=hidden", TORCH_TARGET, *sanitizer_flags()]
    kernels = [
        str(path) for family in FAMILIES for path in sorted((ROOT / "csrc" / family / "cpu").glob("*kernels.cpp"))
    ]

    class Builder(BuildExtension):
        """Compiles the kernels once per instruction set before the rest, each set into a folder of its own.

        The folder outlives the build, also pip's, so that the next build compiles only what changed.
        """

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / f"torch-{torch.__version__}" / (sanitizers() or "plain"))

        def build_extension(self, extension):
            include_dirs = extension.include_dirs
            for isa, isa_flags in isas.items():
                extension.extra_objects += self.compiler.compile(
                    kernels,
                    output_dir=str(pathlib.Path(self.build_temp, isa)),
                    include_dirs=include_dirs,
                    extra_postargs={"cxx": [*flags, *isa_flags, f"-DNEARPEAK_ISA={isa}", isa_list([isa])]},
                )
            super().build_extension(extension)

    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    sources += [ROOT / "csrc" / family / "cpu" / "operator.cpp" for family in FAMILIES]
    arguments = {"cxx": [*flags, isa_list(isas)]}
    if targets:
        sources += cuda_sources()
        # USE_CUDA shows the CUDA part of PyTorch's stable ABI.
        arguments = {"cxx": [*arguments["cxx"], "-DUSE_CUDA"], "nvcc": nvcc_flags(targets)}
    extension = (CUDAExtension if targets else CppExtension)(
        "nearpeak._native",
        [os.path.relpath(source, ROOT) for source in sources],
        extra_compile_args=arguments,
        extra_link_args=sanitizer_flags(),
        py_limited_api=True,
    )
    return extension, Builder


def build_arguments():
    if compiler() is None:
        print("nearpeak: no C++ compiler found (g++ or clang++): installing without the cpu backend", file=sys.stderr)
        return {}
    extension, builder = extension_and_builder()
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": builder.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**build_arguments())
