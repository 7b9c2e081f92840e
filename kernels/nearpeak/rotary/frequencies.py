"""The angles by which a position turns each pair of elements (RoPE frequencies), in every published form.

    frequency(i) = base ** (-2 i / rotary_dim),   i = 0 .. rotary_dim / 2 - 1

Su et al. 2021, https://arxiv.org/abs/2104.09864. The other forms stretch these for contexts longer than those seen in
training. Arithmetic is float32, as in the models that were trained with these numbers: they must be the same numbers.
"""

import inspect
import math
from numbers import Real
from typing import NamedTuple

import torch


class RotaryFrequencies(NamedTuple):
    frequencies: torch.Tensor  # (rotary_dim / 2,), float32: radians per position
    attention_factor: float  # what cos and sin are multiplied by


def _periods(width, count, base):
    """base ** (2 i / width) for `count` values of i."""
    return base ** (torch.arange(0, 2 * count, 2, dtype=torch.float32) / width)


def _default(rotary_dim, base):
    return 1.0 / _periods(rotary_dim, rotary_dim // 2, base), 1.0


def _linear(rotary_dim, base, *, factor):
    return _default(rotary_dim, base)[0] / factor, 1.0


def _proportional(rotary_dim, base, *, proportion=1.0, factor=1.0):
    if proportion > 1:
        raise ValueError(f"proportion must be at most 1, not {proportion}")
    turning = int(proportion * rotary_dim // 2)
    frequencies = torch.zeros(rotary_dim // 2)
    frequencies[:turning] = 1.0 / _periods(rotary_dim, turning, base)
    return frequencies / factor, 1.0


def _dynamic(rotary_dim, base, *, factor, max_position_embeddings, sequence_length=None):
    if rotary_dim == 2:
        raise ValueError("rotary_dim must be at least 4 for dynamic frequencies, not 2")
    longest = max(sequence_length or 0, max_position_embeddings)
    stretch = factor * longest / max_position_embeddings - (factor - 1)
    return _default(rotary_dim, base * stretch ** (rotary_dim / (rotary_dim - 2)))


def _yarn(
    rotary_dim, base, *, factor, original_max_position_embeddings, beta_fast=32.0, beta_slow=1.0, attention_factor=None,
    mscale=None, mscale_all_dim=None, truncate=True,
):  # fmt: skip
    def pair_of(turns):
        """Which pair turns so often within the original context: a real number."""
        longest_period = original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary_dim * math.log(longest_period) / (2 * math.log(base))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    periods = _periods(rotary_dim, rotary_dim // 2, base)
    own = 1 - stretched
    frequencies = 1.0 / (factor * periods) * (1 - own) + 1.0 / periods * own
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    elif attention_factor is None:
        attention_factor = _yarn_scale(factor, 1.0)
    return frequencies, attention_factor


def _yarn_scale(factor, weight):
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(
    rotary_dim, base, *, short_factor, long_factor, original_max_position_embeddings, factor=None,
    attention_factor=None, sequence_length=None,
):  # fmt: skip
    if attention_factor is None and factor is None:
        raise ValueError("factor must be given for longrope frequencies without an attention_factor")
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(factors) != rotary_dim // 2:
            raise ValueError(f"{name} must have rotary_dim / 2 = {rotary_dim // 2} numbers, not {len(factors)}")
    is_long = sequence_length is not None and sequence_length > original_max_position_embeddings
    factors = torch.tensor(long_factor if is_long else short_factor, dtype=torch.float32)
    if attention_factor is None:
        grown = max(math.log(factor), 0.0) / math.log(original_max_position_embeddings)
        attention_factor = math.sqrt(1 + grown)
    return 1.0 / (factors * _periods(rotary_dim, rotary_dim // 2, base)), attention_factor


def _llama3(rotary_dim, base, *, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    if low_freq_factor >= high_freq_factor:
        raise ValueError(
            f"low_freq_factor must be less than high_freq_factor {high_freq_factor}, not {low_freq_factor}"
        )
    own, _ = _default(rotary_dim, base)
    turns = original_max_position_embeddings / (2 * math.pi / own)  # within the original context
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - share) * own / factor + share * own, 1.0


KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def rotary_frequencies(kind="default", *, rotary_dim, base=10000.0, device=None, **options):
    """Radians by which each pair of elements turns from one position to the next, in one of the published forms.

    With f(i) = base ** (-2 i / rotary_dim), and `factor` how much longer contexts become:

        default       f
        linear        f / factor
        dynamic       f with base (factor L / M - (factor - 1)) ** (rotary_dim / (rotary_dim - 2)),
                      M = max_position_embeddings, L = max(sequence_length, M)
        yarn          f for pairs that turn more than beta_fast times within original_max_position_embeddings,
                      f / factor below beta_slow times, and a blend between, linear in i
        longrope      f / short_factor[i], or for a sequence_length over original_max_position_embeddings
                      f / long_factor[i]
        llama3        f above high_freq_factor turns within original_max_position_embeddings, f / factor below
                      low_freq_factor turns, and a blend between, linear in the number of turns
        proportional  f / factor for the first `proportion` of all pairs; the others do not turn

    Args:
        kind: one of these names.
        rotary_dim: how many elements of a head turn.
        base: also called theta.
        device: of the result.
        options: by keyword, with the names of Hugging Face's configurations. linear: factor. dynamic: factor,
            max_position_embeddings, and sequence_length (None: not longer). yarn: factor,
            original_max_position_embeddings, and beta_fast (32), beta_slow (1), attention_factor, mscale,
            mscale_all_dim (None: from factor), truncate (True: pairs at the bounds are whole). longrope: short_factor,
            long_factor, original_max_position_embeddings, factor or attention_factor, and sequence_length. llama3:
            factor, low_freq_factor, high_freq_factor, original_max_position_embeddings. proportional: proportion (1),
            factor (1).

    Returns:
        RotaryFrequencies: frequencies, (rotary_dim / 2,) in float32, and attention_factor, what cos and sin are
        multiplied by (1 but for yarn and longrope). Both go to `rotary_tables`.

    Raises:
        TypeError: an option that the kind does not have, or lacks. ValueError: an unknown kind, or a bad number.

    Linear: Chen et al. 2023, https://arxiv.org/abs/2306.15595. YaRN and dynamic: Peng et al. 2023,
    https://arxiv.org/abs/2309.00071. LongRoPE: Ding et al. 2024, https://arxiv.org/abs/2402.13753.

    >>> frequencies, factor = nearpeak.rotary_frequencies("yarn", rotary_dim=64, factor=4.0,
    ...                                                   original_max_position_embeddings=4096)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int):
        raise TypeError(f"rotary_dim must be an int, not {type(rotary_dim).__name__}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, not {rotary_dim}")
    _check_numbers({"base": base, **options})
    _check_names(kind, options)
    frequencies, attention_factor = KINDS[kind](rotary_dim, base, **options)
    return RotaryFrequencies(frequencies.to(device), float(attention_factor))


def _check_names(kind, options):
    parameters = list(inspect.signature(KINDS[kind]).parameters.values())[2:]
    names = [parameter.name for parameter in parameters]
    for name in options:
        if name not in names:
            raise TypeError(f"{name} is no option of {kind} frequencies, which have {', '.join(names) or 'none'}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise TypeError(f"{parameter.name} must be given for {kind} frequencies")


def _check_numbers(options):
    for name, value in options.items():
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if number is None or isinstance(number, bool):
                continue
            if not isinstance(number, Real):
                raise TypeError(f"{name} must be of numbers, not {type(number).__name__}")
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive, not {number}")
