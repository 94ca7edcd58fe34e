"""A stream: the tokens of one split as one sequence, read from memory maps when asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import PippinError

__all__ = ["TokenStream"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# Tokens in a row from which copying a run is faster than looking up each.
_RUN_TOKENS = 64


class TokenStream:
    """The tokens of one split as one sequence, with the weight of each as a target.

    Attributes:
        num_tokens: Tokens in the stream, the `</s>` after each document included.
        trained_tokens: Those with a weight above 0.
        has_weights: Whether any weight may differ from 1.
        offsets: int64 `[documents + 1]`, where documents begin; the last is `num_tokens`.
        text_bytes: Bytes of text that they stand for.
        vocab_size: The tokenizer's; every id is below it.
        entropy_bits_per_byte: The least that any model can reach, about; None where not known.
    """

    def __init__(
        self,
        parts: Sequence[NDArray[np.integer]],
        *,
        vocab_size: int,
        text_bytes: int,
        entropy_bits_per_byte: float | None = None,
        offsets: Int64 | None = None,
        weights: Sequence[NDArray[np.uint8]] = (),
        trained_tokens: int | None = None,
    ) -> None:
        """Join arrays.

        Args:
            parts: Token ids, each `[n]`.
            vocab_size: The tokenizer's.
            text_bytes: Bytes of text that they stand for.
            entropy_bits_per_byte: The least that any model can reach, where known.
            offsets: Where documents begin; without them all is one document.
            weights: uint8, of the same lengths as the parts; none where each is 1.
            trained_tokens: Tokens with a weight above 0, where known already.

        Raises:
            ValueError: Where the weights are not as many as the tokens.
        """
        # Plain views: each slice of a np.memmap costs microseconds of bookkeeping.
        self._parts = tuple(np.asarray(part) for part in parts)
        self._weights = tuple(np.asarray(part) for part in weights)
        if weights and [len(part) for part in weights] != [len(part) for part in parts]:
            raise ValueError("the weights are not as many as the tokens")
        self._starts = np.cumsum([0] + [len(part) for part in self._parts])
        self.num_tokens = int(self._starts[-1])
        self.has_weights = bool(self._weights)
        if trained_tokens is None or not self._weights:
            trained_tokens = sum(int(np.count_nonzero(part)) for part in self._weights)
        self.trained_tokens = trained_tokens if self._weights else self.num_tokens
        whole = np.array([0, self.num_tokens], dtype=np.int64)
        self.offsets = whole if offsets is None else offsets
        self.vocab_size = vocab_size
        self.text_bytes = text_bytes
        self.entropy_bits_per_byte = entropy_bits_per_byte

    def gather(self, positions: Int64) -> Int32:
        """Tokens at positions of any shape, int32 of that shape.

        Raises:
            IndexError: Where a position leaves the stream.
        """
        return self._gather(self._parts, positions, np.dtype(np.int32))

    def gather_weights(self, positions: Int64) -> NDArray[np.float32]:
        """Weights of the tokens at positions of any shape, float32 of that shape.

        Raises:
            IndexError: Where a position leaves the stream.
        """
        if not self._weights:
            return np.ones(positions.shape, dtype=np.float32)
        return self._gather(self._weights, positions, np.dtype(np.float32))

    def tokens(self, start: int, stop: int) -> Int32:
        """Tokens start <= i < stop, int32 `[stop - start]`.

        Raises:
            IndexError: Where the range leaves the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.num_tokens}")
        out = np.empty(stop - start, dtype=np.int32)
        self._copy(self._parts, start, out)
        return out

    def pairs(self) -> Int64:
        """Where the documents of each preference lie.

        Returns:
            int64 `[P, 2, 2]`: of each pair the chosen and the rejected document, its start and stop.

        Raises:
            PippinError: P203 for an odd number of documents, which are no pairs.
        """
        documents = len(self.offsets) - 1
        if documents % 2:
            raise PippinError(
                "P203",
                "the documents of the preferences are no pairs",
                found=f"{documents:,} documents; needed: an even number, chosen and rejected in turn",
            )
        spans = np.stack([self.offsets[:-1], self.offsets[1:]], axis=1)
        return spans.reshape(-1, 2, 2)

    def _gather(
        self, parts: tuple[NDArray[Any], ...], positions: Int64, dtype: np.dtype[Any]
    ) -> NDArray[Any]:
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_tokens:
            raise IndexError(f"positions leave the {self.num_tokens} tokens of the stream")
        if len(parts) == 1:
            return parts[0][positions].astype(dtype)
        out = np.empty(positions.shape, dtype=dtype)
        if not positions.size:
            return out
        # A row mostly lies in one file, found by its ends; looking up each token takes 5 times as long.
        rows, done = positions.reshape(-1, positions.shape[-1]), out.reshape(-1, out.shape[-1])
        first, last = self._part_of(rows.min(axis=1)), self._part_of(rows.max(axis=1))
        for i in np.unique(first[first == last]).tolist():
            here = np.flatnonzero((first == i) & (last == i))
            done[here] = parts[i][rows[here] - self._starts[i]]
        across = np.flatnonzero(first != last)
        if across.size:
            done[across] = self._gather_across(parts, rows[across], dtype)
        return out

    def _gather_across(
        self, parts: tuple[NDArray[Any], ...], positions: Int64, dtype: np.dtype[Any]
    ) -> NDArray[Any]:
        """Rows `[B, T]` that lie in several files."""
        out = np.empty(positions.shape, dtype=dtype)
        places, done = positions.reshape(-1), out.reshape(-1)
        # A run is one place again and again, which fills up a row, or places that follow on each
        # other, or the one and then the other.
        step = np.diff(places)
        ends = (step != 0) & (step != 1)
        ends[1:] |= (step[1:] == 0) & (step[:-1] == 1)
        edges = np.flatnonzero(ends) + 1
        if len(edges) * _RUN_TOKENS < len(places):  # documents that fill a row: few and long
            firsts = [0, *edges.tolist()]
            for a, b in zip(firsts, [*firsts[1:], len(places)]):
                self._copy_run(parts, places[a:b], done[a:b])
            return out
        part = self._part_of(places)
        for i in np.unique(part).tolist():
            inside = part == i
            done[inside] = parts[i][places[inside] - self._starts[i]]
        return out

    def _copy_run(self, parts: tuple[NDArray[Any], ...], places: Int64, out: NDArray[Any]) -> None:
        """Fill `out` with a run of positions: one repeated, then others that follow on each other."""
        first, last = int(places[0]), int(places[-1])
        repeats = len(places) - 1 - (last - first)
        self._copy(parts, first, out[repeats:])
        out[:repeats] = out[repeats]

    def _copy(self, parts: tuple[NDArray[Any], ...], start: int, out: NDArray[Any]) -> None:
        """Fill `out` with what lies from a position on."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        at, stop = start, start + len(out)
        while at < stop:
            first = int(self._starts[part])
            end = min(stop, first + len(parts[part]))
            out[at - start : end - start] = parts[part][at - first : end - first]
            at, part = end, part + 1

    def _part_of(self, positions: Int64) -> Int64:
        part: Int64 = np.searchsorted(self._starts, positions, side="right") - 1
        return part
