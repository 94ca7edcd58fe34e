"""Ids of the short strings that a text is made of, each encoded once.

Text repeats its words: a row of ids for each distinct one turns encoding into looking up, which is
20 times as fast. Rows lie one after another in one array, so that the ids of a whole text are
one gather.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from core.data.tokenizer_base import Ids

MAX_UNITS = 250_000
MAX_UNIT_CHARS = 64

Number = TypeVar("Number", np.uint32, np.int64)
# Ids of several strings one after the other, and how many each has.
EncodeUnits = Callable[[Sequence[str]], tuple[Ids, NDArray[np.int64]]]


class _Numbers(dict[str, int]):
    """Row number of each unit; a new one gets the next, a long one a negative number once."""

    def __init__(self, max_unit_chars: int) -> None:
        super().__init__()
        self.max_unit_chars = max_unit_chars
        self.new: list[str] = []
        self.long: list[str] = []

    def __missing__(self, unit: str) -> int:
        if len(unit) > self.max_unit_chars:
            self.long.append(unit)
            return -len(self.long)
        number = self[unit] = len(self)
        self.new.append(unit)
        return number


class _Rows:
    """Rows of ids, flat, with room to grow."""

    def __init__(self) -> None:
        self.count = 0
        self._flat = np.zeros(1024, dtype=np.uint32)
        self._starts = np.zeros(1024, dtype=np.int64)

    def append(self, flat: Ids, lengths: NDArray[np.int64]) -> None:
        used, total = int(self._starts[self.count]), len(flat)
        self._flat = _grown(self._flat, used + total)
        self._starts = _grown(self._starts, self.count + len(lengths) + 1)
        self._flat[used : used + total] = flat
        after = self.count + 1
        self._starts[after : after + len(lengths)] = used + np.cumsum(lengths)
        self.count += len(lengths)

    def truncate(self, count: int) -> None:
        self.count = count

    def gather(self, numbers: NDArray[np.int64]) -> tuple[Ids, NDArray[np.int64]]:
        """The rows in a row, uint32 `[n]`, and where each begins and the last ends."""
        first = self._starts[numbers]
        lengths = self._starts[numbers + 1] - first
        ends = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:])
        if ends[-1] == len(numbers) and (lengths == 1).all():
            return self._flat[first], ends
        index = np.repeat(first - ends[:-1], lengths)
        index += np.arange(len(index))
        return self._flat[index], ends


class UnitCache:
    """Encodes sequences of units; a unit's ids must not depend on its neighbours.

    Attributes:
        new_share: Share of the units of the last call that had to be encoded.
    """

    def __init__(
        self,
        encode: EncodeUnits,
        *,
        max_units: int = MAX_UNITS,
        max_unit_chars: int = MAX_UNIT_CHARS,
    ) -> None:
        """Make an empty cache.

        Args:
            encode: Ids of units that are not known yet.
            max_units: Where more are known after a call, all are forgotten.
            max_unit_chars: Longer units are encoded each time.
        """
        self._encode = encode
        self._max_units = max_units
        self._max_unit_chars = max_unit_chars
        self.new_share = 0.0
        self._forget()

    def __len__(self) -> int:
        return len(self._numbers)

    def encode(self, units: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of all units, uint32 `[n]`, and where each unit's begin, int64 `[units + 1]`."""
        known, rows = self._numbers, self._rows
        if len(known) > self._max_units:
            self._forget()
            known, rows = self._numbers, self._rows
        try:
            numbers = np.fromiter(map(known.__getitem__, units), np.int64, len(units))
            if known.new:
                rows.append(*self._encode(known.new))
            kept = rows.count
            self.new_share = (len(known.new) + len(known.long)) / max(1, len(units))
            if known.long:
                rows.append(*self._encode(known.long))
                numbers = np.where(numbers < 0, kept - 1 - numbers, numbers)
        except BaseException:
            # Numbers without rows would be another unit's ids.
            self._forget()
            raise
        known.new, known.long = [], []
        result = rows.gather(numbers)
        rows.truncate(kept)
        return result

    def _forget(self) -> None:
        self._numbers = _Numbers(self._max_unit_chars)
        self._rows = _Rows()


def _grown(array: NDArray[Number], needed: int) -> NDArray[Number]:
    if needed <= len(array):
        return array
    larger = np.zeros(max(needed, 2 * len(array)), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


def unit_text(unit: str) -> str:
    """The text of a unit as it is kept for speed, the way `str.split(" ")` gives it.

    "word" stands for " word"; a unit without a space before it, or with several, is written out and
    ends with one more space: "word " for "word".
    """
    return unit[:-1] if unit.endswith(" ") else f" {unit}"
