"""Peak extra memory of one call, beside its inputs and outputs.

On a GPU: what PyTorch's allocator held at most during the call, above what it held before and beside the outputs.

On the CPU: resident memory, since kernels keep scratch memory that PyTorch's allocator never sees. The call runs
twice in a fresh process (forked from one that has imported everything and run nothing), the peak of the second run
is read from the kernel (VmHWM, reset through /proc/self/clear_refs), and

    extra = (peak - pages of files) - (anonymous pages before the first run) - outputs

so scratch that the first run left allocated counts, and code that it loaded does not. The resolution is about
RESOLUTION bytes: threads and allocators take memory of their own.
"""

import contextlib
import ctypes
import multiprocessing
import pathlib
import signal

import torch

from . import suites
from .cases import Case, Implementation, as_tuple

RESOLUTION = 2**18
CHILD_SECONDS = 120

# Imported once, before the forks; what is not installed is passed over.
PRELOADED = [__name__, "transformers.models.llama.modeling_llama"]


def extra_memory(case: Case, implementation: Implementation, device: torch.device) -> int | None:
    """Peak extra bytes of one call, or None where it cannot be measured.

    Not measured for torch.compile's code on the CPU, which would be compiled again in the fresh process.
    """
    if device.type == "cuda":
        return _on_gpu(case, implementation, device)
    if implementation.compiled or device.type != "cpu" or not pathlib.Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, case.name, implementation.name, suites.state()), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(CHILD_SECONDS) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()


def _on_gpu(case: Case, implementation: Implementation, device: torch.device) -> int:
    call = case.bind(implementation.prepare, case.inputs(device))
    call()
    torch.cuda.reset_peak_memory_stats(device)
    outputs = call()
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del outputs
    return extra


def _child(sender, case_name: str, implementation_name: str, state: suites.State) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    suites.restore(state)
    case = suites.find(case_name)
    with case.in_its_threads(), contextlib.suppress(BrokenPipeError):  # whoever asked may have ended
        sender.send(resident_peak(case, case.operator.implementations[implementation_name]))


def resident_peak(case: Case, implementation: Implementation) -> int | None:
    """Peak extra bytes of one call in this process, which must not have run the implementation before."""
    call = case.bind(implementation.prepare, case.inputs(torch.device("cpu")))
    _start_threads()
    before = _status_bytes("RssAnon")
    call()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    outputs = as_tuple(call())
    peak = _status_bytes("VmHWM") - _status_bytes("RssFile") - _status_bytes("RssShmem")
    fresh = 0 if case.operator.inplace else sum(tensor.numel() * tensor.element_size() for tensor in outputs)
    return max(0, peak - before - fresh)


def _start_threads() -> None:
    """Let PyTorch's threads and its matrix library take what they take once, and return what is free already."""
    square = torch.ones(512, 512)
    (square @ square).sum()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
