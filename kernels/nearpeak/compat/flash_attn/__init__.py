"""flash-attn 2.8's functions with its signatures and its meaning, served by `nearpeak.attention` on any device.

    >>> from nearpeak.compat.flash_attn import flash_attn_func          # instead of: from flash_attn import ...
    >>> nearpeak.compat.flash_attn.install()                            # or: `import flash_attn` finds these functions

Tensors are (batch, sequence, heads, head_dim), or packed (tokens, heads, head_dim), and are read where they lie. What
differs from flash-attn:

- every dtype and head_dim that `nearpeak.attention` has, on every device, and pages of any size;
- float64 has an lse in float64; a query that sees no key has lse = -inf, where flash-attn's kernels write +inf;
- gradients flow through a returned lse as well; `deterministic` changes nothing, since results always are;
- what flash-attn leaves undefined, or asserts, is an exception that names the argument.

`dropout_p` must be 0. Pages are gathered before attention reads them, and so are cache entries that `cache_batch_idx`
picks.
"""

from .functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .install import install, uninstall
from .kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
