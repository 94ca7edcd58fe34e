"""What a run reads: one stream of tokens, or several mixed, each cut into windows.

Rows of a run are planned (`TrainParts.plan`: which window of which stream) and then read
(`read_rows`). Both are functions of the seed and of the rows' numbers.

Legend: B rows, T tokens of a row, R rows of a plan.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.backend import Batch
from core.data.sampling.order import MixtureOrder, WindowOrder
from core.data.sampling.windows import Rows, Windows
from core.data.shards.stream import TokenStream
from core.errors import PippinError

__all__ = ["PlannedRows", "RowPlan", "TrainParts", "count_weights", "read_rows"]

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class PlannedRows:
    """Which windows some rows read.

    Attributes:
        parts: int64 `[R]`, index of the stream.
        windows: int64 `[R]`, number of its window.
        epochs: int64 `[R]`, how often the stream was read before.
    """

    parts: Int64
    windows: Int64
    epochs: Int64

    def __len__(self) -> int:
        """R."""
        return len(self.windows)

    def at(self, index: slice | NDArray[np.integer] | NDArray[np.bool_]) -> "PlannedRows":
        """Some of the rows."""
        return PlannedRows(self.parts[index], self.windows[index], self.epochs[index])


@dataclass(frozen=True)
class TrainParts:
    """Streams cut into windows of one length, and how often each is read.

    Attributes:
        streams: One or more.
        windows: How each is cut.
        weights: Share of the rows that each gets; only the ratios matter.
    """

    streams: tuple[TokenStream, ...]
    windows: tuple[Windows, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where the parts do not belong together."""
        if not len(self.streams) == len(self.windows) == len(self.weights) > 0:
            raise ValueError("a stream, its windows and its weight are needed for each part")
        if len({w.seq_len for w in self.windows}) > 1:
            raise ValueError("the windows of all parts must be of one length")

    @property
    def seq_len(self) -> int:
        """T."""
        return self.windows[0].seq_len

    @property
    def fill(self) -> float:
        """Share of the positions of a row that are targets, over the mixture."""
        return self._mean([w.targets_per_epoch / w.num_windows for w in self.windows])

    @property
    def work(self) -> float:
        """Share of the positions of a row that are computed, about, over the mixture."""
        return self._mean([w.positions_per_epoch / w.num_windows for w in self.windows])

    def plan(self, seed: int) -> "RowPlan":
        """The order in which a run reads them."""
        return RowPlan(self, seed)

    def lengths(self, rows: PlannedRows) -> Int64 | None:
        """Targets of each row, int64 `[R]`, where rows of one length should share a step."""
        if any(w.lengths is None for w in self.windows):
            return None
        out = np.zeros(len(rows), np.int64)
        for k, windows in enumerate(self.windows):
            here = rows.parts == k
            if windows.lengths is not None:
                out[here] = windows.lengths[rows.windows[here]]
        return out

    def _mean(self, targets: list[float]) -> float:
        shares = [w / sum(self.weights) for w in self.weights]
        return sum(s * t for s, t in zip(shares, targets)) / self.seq_len


class RowPlan:
    """Which windows the rows of a run read, from its start on."""

    def __init__(self, parts: TrainParts, seed: int) -> None:
        """Order the parts' windows; each as a run on it alone would."""
        self.seed = seed
        self._mixture = MixtureOrder(parts.weights, seed)
        self._orders = [WindowOrder(w.num_windows, seed) for w in parts.windows]

    def rows(self, first_row: int, count: int) -> PlannedRows:
        """The `count` rows from the row `first_row` of the run on."""
        parts, own = self._mixture.rows(first_row, count)
        windows, epochs = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for k, order in enumerate(self._orders):
            here = parts == k
            windows[here], epochs[here] = order.at(own[here])
        return PlannedRows(parts, windows, epochs)


def read_rows(
    parts: TrainParts, rows: PlannedRows, *, row0: int, vocab_size: int, trim: bool = False
) -> Batch:
    """Read planned rows as one batch.

    Args:
        parts: Where to read.
        rows: Which windows, B of them.
        row0: Row of the step that the first one is.
        vocab_size: Every id must be below it.
        trim: Leave out columns that are padding in every row, as far as `Windows.width` does.

    Raises:
        PippinError: P204 for an id that is not.
    """
    present = np.unique(rows.parts).tolist()
    width = parts.seq_len
    if trim:
        width = max(parts.windows[k].width(rows.windows[rows.parts == k]) for k in present)
    if len(present) == 1:
        k = present[0]
        columns = _read(parts.streams[k], _cut_rows(parts, k, rows, width), vocab_size)
        return Batch(*columns[:3], segments=columns[3], row0=row0)
    shape = (len(rows), width)
    tokens, targets = np.empty(shape, np.int32), np.empty(shape, np.int32)
    weights = np.empty(shape, np.float32)
    segments: NDArray[np.int32] | None = None
    for k in present:
        here = np.flatnonzero(rows.parts == k)
        found = _read(parts.streams[k], _cut_rows(parts, k, rows.at(here), width), vocab_size)
        tokens[here], targets[here], weights[here] = found[:3]
        if found[3] is not None:
            segments = np.zeros(shape, np.int32) if segments is None else segments
            segments[here] = found[3]
    return Batch(tokens, targets, weights, segments=segments, row0=row0)


def count_weights(parts: TrainParts, rows: PlannedRows) -> tuple[float, int]:
    """Sum of the weights of planned rows, and how many are above 0; no ids are read."""
    total, count = 0.0, 0
    for k, (stream, windows) in enumerate(zip(parts.streams, parts.windows)):
        here = rows.parts == k
        if not here.any():
            continue
        if not stream.has_weights:
            number = windows.count(rows.windows[here])
            total, count = total + number, count + number
            continue
        cut = windows.rows(rows.windows[here], rows.epochs[here])
        weights = stream.gather_weights(cut.targets) * cut.weights
        total += float(weights.sum(dtype=np.float64))
        count += int(np.count_nonzero(weights))
    return total, count


def _cut_rows(parts: TrainParts, part: int, rows: PlannedRows, width: int) -> Rows:
    found = parts.windows[part].rows(rows.windows, rows.epochs)
    return found if width == parts.seq_len else found.cut(width)


def _read(
    stream: TokenStream, rows: Rows, vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32] | None]:
    """Tokens, targets, weights and segments, `[B, T]` each."""
    targets = stream.gather(rows.targets)
    # The stream is a ring: the first token follows the last.
    tokens = stream.gather((rows.targets - 1) % stream.num_tokens)
    for ids in (tokens, targets):
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
            raise PippinError(
                "P204",
                f"the data holds token id {bad}",
                found=f"model.vocab_size={vocab_size:,}; "
                f"the tokenizer has {stream.vocab_size:,} ids",
                remedy=f"model.vocab_size={stream.vocab_size}",
            )
    weights = rows.weights
    if stream.has_weights:
        weights = weights * stream.gather_weights(rows.targets)
    return tokens, targets, weights, rows.segments
