"""The order of the windows: a permutation that is a formula, so that nothing needs to be saved.

Row number r of a run, counted from its start over all steps, reads window `permute(r mod n)` of
epoch `r // n`. Each epoch visits every window once, in its own order. The order depends on the seed
and on n alone: not on micro-batches, the number of processes, or restarts.

A run on several texts is a mixture: each row of the run is a row of one of them, and that text is read
in its own order as if it were alone.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

MIXTURE_BLOCK = 1024
"""Rows in which every text of a mixture has its share, to a row."""

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Another permutation for each use of a run's one seed.
_MIXTURE_SALT = 0x6D697874757265


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

    def windows(self, first_row: int, count: int) -> Int64:
        """Windows of `count` rows from the row `first_row` of the run on, int64 `[count]`."""
        return self.at(np.arange(first_row, first_row + count, dtype=np.int64))[0]

    def at(self, rows: Int64) -> tuple[Int64, Int64]:
        """Window and epoch of each row of the run, int64 `[k]` each."""
        n = np.uint64(self.num_windows)
        index, epoch = np.divmod(rows.astype(np.uint64), n)[::-1]
        windows = permute(index, self.num_windows, self.seed, epoch)
        return windows.astype(np.int64), epoch.astype(np.int64)


class MixtureOrder:
    """Which text each row of a run on several texts is of, and which of the text's own rows.

    A block of `MIXTURE_BLOCK` rows has each text's share of them, rounded so that what was rounded off
    is made up for in a later block: the rows of a text in the first b blocks are its share of all
    of them, to half a row for each text there is, for any b. Within a block the texts are shuffled.
    Everything is a formula of the row's number, so nothing is counted from the start of the run.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Mix texts.

        Args:
            weights: Each above 0; only their ratios matter.
            seed: Of the order within the blocks.

        Raises:
            ValueError: For no weights, or one that is not above 0 and finite.
        """
        if not weights or not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"weights={weights} must each be above 0")
        self.seed = seed ^ _MIXTURE_SALT
        # Share of each text in what the texts before it leave: exact, since floats are fractions.
        exact = [Fraction(w) for w in weights]
        self._shares = [w / sum(exact[i:]) for i, w in enumerate(exact)]

    def rows_before(self, block: int) -> tuple[int, ...]:
        """Rows of each text before a block; together `block * MIXTURE_BLOCK`.

        Each text takes its share, rounded, of what those before it leave: so no number ever falls as
        `block` grows, and they always add up, which rounding each on its own would not give.
        """
        rest, counts = block * MIXTURE_BLOCK, []
        for share in self._shares:
            n, d = share.numerator, share.denominator
            counts.append((2 * rest * n + d) // (2 * d))
            rest -= counts[-1]
        return tuple(counts)

    def rows(self, first_row: int, count: int) -> tuple[Int64, Int64]:
        """Texts of `count` rows from the row `first_row` of the run on, and the texts' own rows.

        Returns:
            int64 `[count]` each: index of the text, and the number of the row among all of that text.
        """
        size = MIXTURE_BLOCK
        if len(self._shares) == 1:
            return np.zeros(count, np.int64), np.arange(first_row, first_row + count)
        first, last = first_row // size, -(-(first_row + count) // size)
        before = np.array(
            [self.rows_before(b) for b in range(first, last + 1)], np.int64
        )  # [b+1, K]
        ends = np.cumsum(np.diff(before, axis=0), axis=1)  # [b, K]
        place = np.tile(np.arange(size, dtype=np.uint64), last - first)
        blocks = np.repeat(np.arange(first, last, dtype=np.uint64), size)
        place = permute(place, size, self.seed, blocks).reshape(-1, size).astype(np.int64)
        text = np.zeros(place.shape, np.int64)
        for k in range(len(self._shares) - 1):
            text += place >= ends[:, k, None]
        own = np.zeros(place.shape, np.int64)
        for k in range(len(self._shares)):
            here = text == k
            own[here] = (np.cumsum(here, axis=1) - 1 + before[:-1, k, None])[here]
        skip = first_row - first * size
        return text.reshape(-1)[skip : skip + count], own.reshape(-1)[skip : skip + count]
