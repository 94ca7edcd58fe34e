"""Ids of the short strings that a text is made of, each encoded once.

Text repeats its words: a row of ids for each distinct one turns encoding into looking up, which is
20 times as fast. Rows lie one after another in one array, so that the ids of a whole text are
one gather. A unit that is new is often made of known words: `foo(bar)` of four. So units that are
not known yet may be encoded through a second cache, of words.
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from core.data.tokenizers.base import Ids, joined

MAX_UNITS = 250_000
MAX_UNIT_CHARS = 64
MIN_CHOICE_CHARS = 20_000
# Stands between units where many are taken apart at once.
END = "\0"

Number = TypeVar("Number", np.uint32, np.int64)
# Ids of several strings one after the other, and how many each has.
EncodeUnits = Callable[[Sequence[str]], tuple[Ids, NDArray[np.int64]]]


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
    """Encodes sequences of units; a unit's ids must not depend on its neighbours."""

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
        self._forget()

    def __len__(self) -> int:
        return len(self._numbers)

    def encode(self, units: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of all units, uint32 `[n]`, and where each unit's begin, int64 `[units + 1]`."""
        if len(self._numbers) > self._max_units:
            self._forget()
        known, rows = self._numbers, self._rows
        numbers = np.fromiter(map(known.get, units, repeat(-1)), np.int64, len(units))
        missing = np.flatnonzero(numbers < 0)
        if not len(missing):
            return rows.gather(numbers)
        kept = rows.count
        try:
            unknown = [units[i] for i in missing.tolist()]
            new = list(dict.fromkeys(unknown))
            size = self._max_unit_chars
            long = []
            if max(map(len, new)) > size:
                long = [unit for unit in new if len(unit) > size]
                new = [unit for unit in new if len(unit) <= size]
            if new:
                known.update(zip(new, range(kept, kept + len(new))))
                rows.append(*self._encode(new))
                kept = rows.count
            found = np.fromiter(map(known.get, unknown, repeat(-1)), np.int64, len(unknown))
            if long:
                rows.append(*self._encode(long))
                places = dict(zip(long, range(kept, rows.count)))
                others = np.flatnonzero(found < 0)
                found[others] = [places[unknown[i]] for i in others.tolist()]
            numbers[missing] = found
        except BaseException:
            # Numbers without rows would be another unit's ids.
            self._forget()
            raise
        result = rows.gather(numbers)
        rows.truncate(kept)
        return result

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        self._rows = _Rows()


def _grown(array: NDArray[Number], needed: int) -> NDArray[Number]:
    if needed <= len(array):
        return array
    larger = np.zeros(max(needed, 2 * len(array)), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


def encode_apart(
    units: Sequence[str],
    apart: Sequence[bool],
    encode: EncodeUnits,
    encode_one: Callable[[str], Ids],
) -> tuple[Ids, NDArray[np.int64]]:
    """Ids of units of which some are not encoded with the others, and how many each has.

    Args:
        units: The units.
        apart: Which of them are encoded one by one.
        encode: For the others, all at once.
        encode_one: For those.
    """
    if not any(apart):
        return encode(units)
    ids, lengths = encode([unit for unit, own in zip(units, apart) if not own])
    found = [encode_one(unit) for unit, own in zip(units, apart) if own]
    mask = np.array(apart, dtype=bool)
    counts = np.zeros(len(units), np.int64)
    counts[~mask], counts[mask] = lengths, [len(row) for row in found]
    place = np.repeat(mask, counts)
    out = np.empty(len(place), np.uint32)
    out[~place], out[place] = ids, joined(found)
    return out, counts


def encode_in_words(
    units: Sequence[str], find: Callable[[str], list[str]], cache: UnitCache
) -> tuple[Ids, NDArray[np.int64]]:
    """Ids of units through the words they are made of, and how many each has.

    Args:
        units: None of them holds `END`.
        find: Takes a text apart; `END` is a word of its own, on which no other depends.
        cache: Of words.
    """
    words = find(END.join([*units, ""]))
    ends = np.flatnonzero(np.fromiter(map(END.__eq__, words), bool, len(words)))
    if len(ends) != len(units):
        raise RuntimeError("the ends of units were not found again")
    ids, starts = cache.encode(list(filter(END.__ne__, words)))
    return ids, np.diff(starts[ends - np.arange(len(ends))], prepend=0)


class Choice:
    """Which of several ways to the same result is the fastest, as measured while they are used."""

    def __init__(self, ways: int, again: int = 32) -> None:
        """Begin with each way in turn, twice, since the first time fills caches.

        Args:
            ways: How many there are.
            again: After so many uses another way is tried once more.
        """
        self._costs = [0.0] * ways
        self._uses = 0
        self._again = again

    def next(self, chars: int) -> int:
        """The way to go now with so many characters; the first way for too few to be measured."""
        if chars < MIN_CHOICE_CHARS:
            return 0
        ways, uses = len(self._costs), self._uses
        self._uses += 1
        if uses < 2 * ways:
            return uses // 2
        if uses % self._again == 0:
            return uses // self._again % ways
        return min(range(ways), key=self._costs.__getitem__)

    def took(self, way: int, chars: int, seconds: float) -> None:
        """Say what the use of a way has cost."""
        if chars < MIN_CHOICE_CHARS:
            return
        cost = seconds / chars
        held = self._costs[way]
        first = self._uses <= 2 * len(self._costs)
        # Half of the last, as another program may have disturbed one of them.
        self._costs[way] = cost if first or not held else (held + cost) / 2
