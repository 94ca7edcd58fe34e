"""Windows: how a stream of tokens is cut into rows, in four modes.

- contiguous: the stream cut into windows of T tokens, wherever a document begins or ends.
- random_chunk: the same, with new cuts in every epoch.
- document: one document a row, filled up with padding.
- packed: whole documents fitted into rows; attention stays inside each document.

In every mode each token is a target once an epoch (contiguous: each but the very first), and the
windows of an epoch are the same for every process. A document's first token is predicted from the
token before it in the stream, the `</s>` of the document before; the stream is closed to a ring for
that. A document longer than T goes on in another row.

Legend: B rows, T tokens of a row, N tokens of the stream, W windows, P pieces.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.config.schema import RunConfig
from core.data.sampling.order import mix64
from core.data.sampling.packing import Pieces, document_pieces, packed_pieces
from core.data.shards.stream import TokenStream
from core.errors import PippinError

__all__ = ["SAMPLINGS", "Rows", "Windows", "cut", "make_windows"]

Int64 = NDArray[np.int64]

# Widths that rows of one document may have. Few, since a new shape may cost a compilation.
WIDTHS = 16

SAMPLINGS = ("contiguous", "random_chunk", "document", "packed")


@dataclass(frozen=True)
class Rows:
    """Where the tokens of some windows lie.

    Attributes:
        targets: int64 `[B, T]`, position in the stream of each target; of its input, one less on
            the ring. 0 where the weight is 0.
        weights: float32 `[B, T]`, 1 or 0.
        segments: int32 `[B, T]`, number of the document in its row, or None where a row holds one
            document or is one text.
    """

    targets: Int64
    weights: NDArray[np.float32]
    segments: NDArray[np.int32] | None

    def cut(self, width: int) -> "Rows":
        """The first columns, which must hold everything of weight 1."""
        segments = None if self.segments is None else self.segments[:, :width].copy()
        return Rows(self.targets[:, :width].copy(), self.weights[:, :width].copy(), segments)


class Windows(Protocol):
    """A way to cut a stream into windows of `seq_len` targets.

    Attributes:
        num_windows: W, the same in every epoch.
        seq_len: T.
        targets_per_epoch: Targets with weight 1 in all windows together.
        positions_per_epoch: Positions that are computed for them, about: what `width` leaves.
        lengths: int64 `[W]`, targets of each window, where windows of one length should share a
            step; None where all are alike.
    """

    num_windows: int
    seq_len: int
    targets_per_epoch: int
    positions_per_epoch: int
    lengths: Int64 | None

    def count(self, windows: Int64) -> int:
        """Targets with weight 1 in these windows `[B]` together, in any epoch."""
        ...

    def width(self, windows: Int64) -> int:
        """Columns that hold all targets of these windows `[B]`, at most T; one of a few values."""
        ...

    def rows(self, windows: Int64, epochs: Int64) -> Rows:
        """Rows of windows `[B]` in their epochs `[B]`, T wide."""
        ...


def make_windows(stream: TokenStream, sampling: str, seq_len: int, seed: int) -> Windows:
    """Cut a stream into windows.

    Args:
        stream: Tokens, and where its documents begin.
        sampling: One of `SAMPLINGS`.
        seq_len: T.
        seed: Of the cuts of random_chunk.

    Raises:
        PippinError: P201 where the stream is shorter than one window.
        ValueError: For an unknown sampling.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r} is not one of {', '.join(SAMPLINGS)}")
    if sampling in ("contiguous", "random_chunk"):
        return _Tiles(stream.num_tokens, seq_len, seed if sampling == "random_chunk" else None)
    if stream.num_tokens < 2:
        raise _too_short(stream.num_tokens, 2, seq_len)
    pieces = (packed_pieces if sampling == "packed" else document_pieces)(stream.offsets, seq_len)
    return _Pieces(pieces, seq_len, segments=sampling == "packed")


def cut(stream: TokenStream, config: RunConfig) -> Windows:
    """Cut a stream as a run's configuration says."""
    data = config.data
    return make_windows(stream, data.sampling, data.seq_len, config.train.seed)


class _Tiles:
    """Windows that tile the stream, or the ring from a place that changes with the epoch."""

    def __init__(self, num_tokens: int, seq_len: int, seed: int | None) -> None:
        """Tile N tokens; the last window may be partial. A seed moves the cuts each epoch."""
        if num_tokens < seq_len + 1:
            raise _too_short(num_tokens, seq_len + 1, seq_len)
        self.seq_len = seq_len
        self.targets_per_epoch = num_tokens - 1
        self.num_windows = -(-self.targets_per_epoch // seq_len)
        self._last = self.targets_per_epoch - (self.num_windows - 1) * seq_len
        self._seed = seed
        self.positions_per_epoch = self.num_windows * seq_len
        self.lengths: Int64 | None = None

    def width(self, windows: Int64) -> int:
        return self.seq_len

    def count(self, windows: Int64) -> int:
        last = int(np.count_nonzero(windows == self.num_windows - 1))
        return (len(windows) - last) * self.seq_len + last * self._last

    def rows(self, windows: Int64, epochs: Int64) -> Rows:
        at = windows[:, None] * self.seq_len + np.arange(self.seq_len)  # [B, T]
        weights = (at < self.targets_per_epoch).astype(np.float32)
        if self._seed is not None:
            at = at + self._shifts(epochs)[:, None]
        return Rows((at % self.targets_per_epoch + 1) * (weights > 0), weights, None)

    def _shifts(self, epochs: Int64) -> Int64:
        """Where the first window of each epoch begins, 0 to N - 2."""
        key = mix64(np.array([self._seed], dtype=np.uint64))
        mixed = mix64(key ^ mix64(epochs.astype(np.uint64) + np.uint64(1)))
        shifts: Int64 = (mixed % np.uint64(self.targets_per_epoch)).astype(np.int64)
        return shifts


class _Pieces:
    """Windows that hold pieces of the stream, each of one document."""

    def __init__(self, pieces: Pieces, seq_len: int, *, segments: bool) -> None:
        self.seq_len = seq_len
        self.num_windows = len(pieces.first) - 1
        self.targets_per_epoch = int(pieces.lengths.sum())
        self._pieces, self._segments = pieces, segments
        ends = np.concatenate([[0], np.cumsum(pieces.lengths)])
        self._filled: Int64 = np.diff(ends[pieces.first])  # [W]
        self.positions_per_epoch = self.num_windows * seq_len
        self.lengths: Int64 | None = None
        self._quantum = -(-seq_len // WIDTHS)
        if not segments:
            self.lengths = self._filled
            widths = -(-self._filled // self._quantum) * self._quantum
            self.positions_per_epoch = int(np.minimum(widths, seq_len).sum())

    def width(self, windows: Int64) -> int:
        if self.lengths is None:
            return self.seq_len
        longest = int(self.lengths[windows].max())
        return min(-(-longest // self._quantum) * self._quantum, self.seq_len)

    def count(self, windows: Int64) -> int:
        return int(self._filled[windows].sum())

    def rows(self, windows: Int64, epochs: Int64) -> Rows:
        shape = (len(windows), self.seq_len)
        first, counts = self._pieces.first[windows], np.diff(self._pieces.first)[windows]
        row = np.repeat(np.arange(len(windows)), counts)  # [P]
        number = _ramps(counts)  # of the piece in its row, [P]
        piece = np.repeat(first, counts) + number
        lengths = self._pieces.lengths[piece]
        # Where each piece begins in its row: what lies before it, less what lies before the row.
        before = np.cumsum(lengths) - lengths
        column = before - np.repeat(before[np.cumsum(counts) - counts], counts)
        offset = _ramps(lengths)  # [tokens]
        flat = np.repeat(row * self.seq_len + column, lengths) + offset
        targets, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        targets.reshape(-1)[flat] = np.repeat(self._pieces.starts[piece], lengths) + offset
        weights.reshape(-1)[flat] = 1.0
        if not self._segments:
            return Rows(targets, weights, None)
        # Padding is a document of its own: every query sees a key.
        segments = np.repeat(counts, self.seq_len).reshape(shape).astype(np.int32)
        segments.reshape(-1)[flat] = np.repeat(number, lengths)
        return Rows(targets, weights, segments)


def _ramps(lengths: Int64) -> Int64:
    """0 to n - 1 for each n of lengths, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _too_short(found: int, needed: int, seq_len: int) -> PippinError:
    return PippinError(
        "P201",
        f"the text has {found:,} tokens, one window needs {needed:,}",
        remedy=f"more text, or data.seq_len={max(2, min(found // 8, seq_len))}",
    )
