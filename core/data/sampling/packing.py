"""Fitting documents into rows: which piece of the stream lies in which window.

Best-fit decreasing, on counts of lengths instead of single documents, so that millions of them take
about a second: the longest first, each into the fullest row that still has room for it (Ding et al.,
2024, "Fewer Truncations Improve Language Modeling"). Where more than a hundredth would be padding,
the emptiest rows are dissolved and their documents cut to fill the gaps of the others.
"""

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.data.sampling.order import mix64

__all__ = ["MAX_PADDING", "Pieces", "document_pieces", "packed_pieces"]

Int64 = NDArray[np.int64]

MAX_PADDING = 0.01
"""Share of all positions that may be padding in packed rows, but for the last row."""


@dataclass(frozen=True)
class Pieces:
    """Pieces of the stream, ordered by window.

    Attributes:
        starts: int64 `[P]`, position in the stream.
        lengths: int64 `[P]`, tokens, at least 1.
        first: int64 `[W + 1]`, first piece of each window; the last is P.
    """

    starts: Int64
    lengths: Int64
    first: Int64


def document_pieces(offsets: Int64, seq_len: int) -> Pieces:
    """One document a window; a longer one goes on in the next.

    Args:
        offsets: int64 `[documents + 1]`, where documents begin; the last is the end.
        seq_len: T.
    """
    starts, lengths = _split(offsets, seq_len)
    return Pieces(starts, lengths, np.arange(len(starts) + 1, dtype=np.int64))


def packed_pieces(offsets: Int64, seq_len: int) -> Pieces:
    """Whole documents, as many as fit, in each window.

    A document is cut only where it is longer than a window, or where at most `MAX_PADDING` could not
    be kept otherwise.

    Args:
        offsets: int64 `[documents + 1]`, where documents begin; the last is the end.
        seq_len: T.
    """
    starts, lengths = _split(offsets, seq_len)
    # Documents of one length are taken in a mixed order: neighbours should not share a row.
    key = mix64(starts.astype(np.uint64))
    order = np.lexsort((key, -lengths))
    starts, lengths = starts[order], lengths[order]
    sizes, bins = _best_fit(np.bincount(lengths, minlength=seq_len + 1), seq_len)
    # Both are ordered by length now: the i-th piece goes where the i-th place of its size is.
    place = np.argsort(-sizes, kind="stable")
    window = bins[place]
    return _fill_gaps(starts, lengths, window, seq_len)


def _split(offsets: Int64, seq_len: int) -> tuple[Int64, Int64]:
    """Starts and lengths of documents, those longer than T cut into pieces of T and a rest."""
    document_lengths = np.diff(offsets)
    counts = -(-document_lengths // seq_len)
    ends = np.cumsum(counts)
    number = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
    starts = np.repeat(offsets[:-1], counts) + number * seq_len
    return starts, np.minimum(np.repeat(offsets[1:], counts) - starts, seq_len)


def _best_fit(histogram: Int64, seq_len: int) -> tuple[Int64, Int64]:
    """Best-fit decreasing of counted lengths.

    Args:
        histogram: int64 `[T + 1]`, how many pieces have each length.
        seq_len: T, room of a window.

    Returns:
        Length of every piece and its window, int64 `[P]` each.
    """
    room: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # by tokens left: (lengths, how many)
    left: list[int] = []  # keys of `room`, ascending

    def put(pattern: tuple[int, ...], count: int, rest: int) -> None:
        if rest not in room:
            room[rest] = []
            bisect.insort(left, rest)
        room[rest].append((pattern, count))

    for size in range(seq_len, 0, -1):
        count = int(histogram[size])
        while count:
            at = bisect.bisect_left(left, size)
            if at == len(left):
                fit = seq_len // size
                if count >= fit:
                    put((size,) * fit, count // fit, seq_len - fit * size)
                if count % fit:
                    put((size,) * (count % fit), 1, seq_len - (count % fit) * size)
                break
            rest = left[at]
            pattern, found = room[rest].pop()
            used = min(count, found)
            if found > used:
                room[rest].append((pattern, found - used))
            elif not room[rest]:
                del room[rest], left[at]
            put((*pattern, size), used, rest - size)
            count -= used
    sizes, bins, made = [], [], 0
    for rest in left:
        for pattern, count in room[rest]:
            sizes.append(np.tile(np.array(pattern, np.int64), count))
            bins.append(np.repeat(np.arange(made, made + count), len(pattern)))
            made += count
    return np.concatenate(sizes), np.concatenate(bins)


def _fill_gaps(starts: Int64, lengths: Int64, window: Int64, seq_len: int) -> Pieces:
    """Dissolve the emptiest windows into the gaps of the others until padding is rare enough."""
    filled = np.bincount(window, weights=lengths).astype(np.int64)  # [W]
    total = int(lengths.sum())
    fewest = -(-total // seq_len)
    keep = min(len(filled), max(fewest, int(total / ((1 - MAX_PADDING) * seq_len))))
    rank = np.argsort(-filled, kind="stable")  # fullest first
    number = np.empty(len(rank), np.int64)
    number[rank] = np.arange(len(rank))
    window, gaps = number[window], seq_len - filled[rank]
    loose = window >= keep
    loose_starts, loose_lengths = starts[loose], lengths[loose]
    # Cut the loose pieces, laid end to end, wherever a piece or a gap ends; widest gaps first.
    piece_ends = np.cumsum(loose_lengths)
    gap_ends = np.cumsum(gaps[:keep][::-1])
    spent = int(piece_ends[-1]) if len(piece_ends) else 0
    cuts = np.unique(np.concatenate([[0], piece_ends, gap_ends[gap_ends < spent]]))
    at, length = cuts[:-1], np.diff(cuts)
    piece = np.searchsorted(piece_ends, at, side="right")
    gap = np.searchsorted(gap_ends, at, side="right")
    moved = loose_starts[piece] + at - (piece_ends - loose_lengths)[piece]
    starts = np.concatenate([starts[~loose], moved])
    lengths = np.concatenate([lengths[~loose], length])
    window = np.concatenate([window[~loose], keep - 1 - gap])
    order = np.lexsort((starts, window))
    first = np.searchsorted(window[order], np.arange(keep + 1))
    return Pieces(starts[order], lengths[order], first.astype(np.int64))
