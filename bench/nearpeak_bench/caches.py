"""Cold caches: before each sample, outside of what is timed, more bytes are streamed than the last cache holds.

What a call then reads comes from memory, as in a model whose weights and activations are larger than the caches.
"""

import pathlib
from collections.abc import Callable

import torch

# A cache that keeps what was used often gives way to a multiple of its size only.
TIMES_THE_CACHE = 3
# Where the system does not tell: no processor of one socket has had more in one last cache.
UNKNOWN_BYTES = 2**27
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
FOLDER = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_bytes(device: torch.device) -> int:
    """The size of the last cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in FOLDER.glob("index*/size")]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes), default=UNKNOWN_BYTES)


def evictor(device: torch.device) -> Callable[[], object]:
    """A call that leaves nothing of what was used before in any cache; all of PyTorch's threads take part in it."""
    buffer = torch.zeros(TIMES_THE_CACHE * last_level_bytes(device) // 4, device=device)
    return lambda: buffer.add_(1)
