"""cos and sin of every position's angles, as `apply_rotary` takes them."""

import torch

from ..checks import FLOATING


def rotary_tables(
    positions, frequencies, attention_factor=1.0, *, sections=None, interleaved_sections=False, dtype=torch.float32
):
    """cos and sin of the angles of any positions, for `apply_rotary`.

        cos[..., s, i] = attention_factor cos(positions[..., s] frequencies[i]),   sin likewise

    Args:
        positions: (sequence,) or (batch, sequence), whole numbers or floating: of a ragged batch each sequence's own,
            behind a cache the cache's length more. With `sections`, one such tensor for each, stacked in front.
        frequencies: (rotary_dim / 2,), as `rotary_frequencies` makes them.
        attention_factor: see `rotary_frequencies`, whose result may be unpacked into these two.
        sections: how many of the frequencies take each of several streams of positions, such as time, height and width
            of an image's patch (multi-section rotary embedding, M-RoPE). They add up to rotary_dim / 2.
        interleaved_sections: the streams take turns along the frequencies, as in Qwen3-VL, each as long as its section
            lasts, and the first has what is left; or else one section follows the other, as in Qwen2-VL.
        dtype: of the result; the arithmetic is float32 (float64 for float64 frequencies).

    Returns:
        (cos, sin), each (sequence, rotary_dim / 2) or (batch, sequence, rotary_dim / 2).

    Raises:
        TypeError: a dtype that is not served. ValueError: a shape, device or section that does not fit.

    Multi-section: Wang et al. 2024, https://arxiv.org/abs/2409.12191.

    >>> frequencies = nearpeak.rotary_frequencies(rotary_dim=64)
    >>> lengths = torch.tensor([40, 7])  # of two caches
    >>> cos, sin = nearpeak.rotary_tables(lengths[:, None] + torch.arange(5), *frequencies)
    >>> query, key = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 5, 64)
    >>> query, key = nearpeak.apply_rotary(query, key, cos, sin)
    """
    _check(positions, frequencies, sections, dtype)
    if sections is None:
        angles = positions.to(frequencies.dtype)[..., None] * frequencies
    else:
        stream = _streams(sections, interleaved_sections, frequencies)
        angles = positions.to(frequencies.dtype).movedim(0, -1)[..., stream] * frequencies
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def _streams(sections, interleaved, frequencies):
    """(rotary_dim / 2,): from which stream each frequency takes its positions."""
    count, half = len(sections), frequencies.shape[0]
    if interleaved:
        streams = [i % count if i < count * sections[i % count] else 0 for i in range(half)]
    else:
        streams = [stream for stream, length in enumerate(sections) for _ in range(length)]
    return torch.tensor(streams, device=frequencies.device)


def _check(positions, frequencies, sections, dtype):
    for name, tensor in (("positions", positions), ("frequencies", frequencies)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if positions.is_complex() or positions.dtype is torch.bool:
        raise TypeError(f"positions must be numbers, not {positions.dtype}")
    if frequencies.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"frequencies must be float32 or float64, not {frequencies.dtype}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype}")
    if frequencies.dim() != 1:
        raise ValueError(f"frequencies must be (rotary_dim / 2,), not of shape {tuple(frequencies.shape)}")
    if positions.device != frequencies.device:
        raise ValueError(f"positions must be on frequencies' device {frequencies.device}, not on {positions.device}")
    dims = positions.dim() - (sections is not None)
    if dims not in (1, 2):
        stacked = ", with one in front for each section" if sections is not None else ""
        raise ValueError(
            f"positions must be (sequence,) or (batch, sequence){stacked}, not of shape {tuple(positions.shape)}"
        )
    if sections is None:
        return
    if len(sections) != positions.shape[0] or sum(sections) != frequencies.shape[0] or min(sections) < 0:
        raise ValueError(
            f"sections must be {positions.shape[0]} lengths, as positions has streams, that add up to "
            f"{frequencies.shape[0]} frequencies, not {tuple(sections)}"
        )
