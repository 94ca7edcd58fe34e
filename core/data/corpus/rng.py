"""Exact integer randomness for the story corpus, with honest entropy bookkeeping.

A story's stream is one 384-bit integer made by SplitMix64 (Steele, Lea and Flood 2014,
https://doi.org/10.1145/2714064.2660195) and read as a fraction of 2**384. Each draw
multiplies it by the number of choices and takes the integer part (arithmetic decoding), so
every draw is uniform up to 2**-150 and costs three integer operations. No floats, no
``random``, no hash order: the same seed gives the same draws on every machine.

Every draw adds its -log2 p to a counter in millionths of a bit.
"""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["MICRO_BITS", "WIDTH", "mix64", "rank_weights", "stream_integer"]

WIDTH = 384
"""Width of a story's stream integer in bits."""

MAX_CHOICES = 4096
"""Largest number of choices of one draw."""

MICRO_BITS: tuple[int, ...] = (
    0,
    *(round(math.log2(n) * 1_000_000) for n in range(1, MAX_CHOICES + 1)),
)
"""``MICRO_BITS[n]``: log2(n) in millionths of a bit (entry 0 is unused)."""

_COMMONEST = 240


@lru_cache(maxsize=1024)
def rank_weights(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Weigh a list's entries by 1 / rank, as words of a language are (Zipf 1935), in integers.

    A few common names teach a model to look back for names, long before the rare ones could
    (docs/LOG.md 2026-11-21).

    Args:
        count: number of entries, at most 1,000.

    Returns:
        Each entry's weight, and the running sums from 0 to the total, which is at most 4,096.
    """
    weights = tuple(max(1, _COMMONEST // rank) for rank in range(1, count + 1))
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    return weights, tuple(sums)


_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """Scramble a 64-bit integer (the SplitMix64 output function).

    Args:
        value: any integer; only its low 64 bits count.

    Returns:
        An integer in [0, 2**64).
    """
    z = value & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def stream_integer(seed: int, index: int, salt: int = 0) -> int:
    """Make the stream integer of one story.

    Args:
        seed: corpus seed, any integer.
        index: story index, >= 0.
        salt: separates streams with different uses.

    Returns:
        A uniform integer in [0, 2**WIDTH).
    """
    state = mix64(mix64(seed + _GAMMA) + (salt << 48) + index * _GAMMA)
    result = 0
    for _ in range(WIDTH // 64):
        state += _GAMMA
        result = (result << 64) | mix64(state)
    return result
