"""The order of the windows: a permutation that is a formula, so that nothing needs to be saved.

Row number r of a run, counted from its start over all steps, reads window `permute(r mod n)` of
epoch `r // n`. Each epoch visits every window once, in its own order. The order depends on the seed
and on n alone: not on micro-batches, the number of processes, or restarts.
"""

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: UInt64) -> UInt64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), elementwise, wrapping."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64 = x ^ (x >> np.uint64(31))
    return mixed


def permute(index: UInt64, n: int, seed: int, epoch: UInt64) -> UInt64:
    """A bijection of 0..n-1, chosen by seed and epoch.

    A Feistel network on the smallest power of two that holds n; what falls outside goes through it
    again until it is inside (cycle walking; Black and Rogaway, 2002), at most twice on average.

    Args:
        index: uint64 `[k]`, each below n.
        n: Size of the domain, 1 to 2**62.
        seed: Any integer below 2**63.
        epoch: uint64 `[k]`, the epoch of each index.

    Returns:
        uint64 `[k]`, each below n.

    Raises:
        ValueError: For n or an index out of range.
    """
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"n={n} must be 1 to 2**62")
    if index.size and int(index.max()) >= n:
        raise ValueError(f"index {int(index.max())} must be below n={n}")
    if n == 1:
        return np.zeros_like(index)
    key = mix64(mix64(np.full_like(epoch, seed & 0xFFFFFFFFFFFFFFFF)) + epoch * _GOLDEN)
    bits = max(2, (n - 1).bit_length())
    out = _feistel(index, key, bits)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], key[outside], bits)
        outside = outside[out[outside] >= n]
    return out


def _feistel(x: UInt64, key: UInt64, bits: int) -> UInt64:
    """One pass on `bits` bits. The halves may differ by a bit; they swap widths each round."""
    width_left, width_right = bits // 2, bits - bits // 2
    rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN
    left, right = x >> np.uint64(width_right), x & np.uint64((1 << width_right) - 1)
    for constant in rounds:
        mask = np.uint64((1 << width_left) - 1)
        left, right = right, left ^ (mix64(right + key + constant) & mask)
        width_left, width_right = width_right, width_left
    joined: UInt64 = (left << np.uint64(width_right)) | right
    return joined


class WindowOrder:
    """Which window each row of a run reads."""

    def __init__(self, num_windows: int, seed: int) -> None:
        """Order of `num_windows` windows, at least 1."""
        if num_windows < 1:
            raise ValueError(f"num_windows={num_windows} must be at least 1")
        self.num_windows = num_windows
        self.seed = seed

    def windows(self, first_row: int, count: int) -> NDArray[np.int64]:
        """Windows of `count` rows from the row `first_row` of the run on, int64 `[count]`."""
        rows = np.arange(first_row, first_row + count, dtype=np.uint64)
        n = np.uint64(self.num_windows)
        return permute(rows % n, self.num_windows, self.seed, rows // n).astype(np.int64)

    def epochs(self, first_row: int, count: int) -> NDArray[np.int64]:
        """Epochs of `count` rows from the row `first_row` of the run on, int64 `[count]`."""
        return np.arange(first_row, first_row + count, dtype=np.int64) // self.num_windows
