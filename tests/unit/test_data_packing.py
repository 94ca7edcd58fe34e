"""Packing: nothing lost, nothing twice, no row too full, little padding, few documents cut.

Run: pytest tests/unit/test_data_packing.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.data.sampling.packing import MAX_PADDING, Pieces, document_pieces, packed_pieces

Int64 = NDArray[np.int64]


def offsets_of(lengths: "list[int] | Int64") -> Int64:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def filled(pieces: Pieces) -> Int64:
    """Tokens of each window."""
    ends = np.concatenate([[0], np.cumsum(pieces.lengths)])
    return np.diff(ends[pieces.first])


def covered(pieces: Pieces, num_tokens: int) -> Int64:
    """How often each token lies in a piece."""
    edges = np.zeros(num_tokens + 1, np.int64)
    np.add.at(edges, pieces.starts, 1)
    np.add.at(edges, pieces.starts + pieces.lengths, -1)
    return np.cumsum(edges)[:-1]


def best_fit_windows(lengths: list[int], seq_len: int) -> int:
    """Best-fit decreasing, one item at a time, straight from its definition."""
    room: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [i for i, left in enumerate(room) if left >= size]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= size
        else:
            room.append(seq_len - size)
    return len(room)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    seq_len=st.integers(2, 24),
    packed=st.booleans(),
)
def test_every_token_lies_in_one_piece_of_one_document(
    lengths: list[int], seq_len: int, packed: bool
) -> None:
    pieces = (packed_pieces if packed else document_pieces)(offsets_of(lengths), seq_len)
    assert (covered(pieces, sum(lengths)) == 1).all()
    assert pieces.lengths.min() >= 1 and filled(pieces).max() <= seq_len
    assert filled(pieces).min() >= 1
    document = np.repeat(np.arange(len(lengths)), lengths)
    assert (document[pieces.starts] == document[pieces.starts + pieces.lengths - 1]).all()
    if packed:
        num_windows, total = len(pieces.first) - 1, sum(lengths)
        fewest = -(-total // seq_len)
        assert num_windows <= max(fewest, total / ((1 - MAX_PADDING) * seq_len))
    else:
        assert len(pieces.first) - 1 == sum(-(-n // seq_len) for n in lengths)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=80))
def test_without_cuts_it_is_best_fit_decreasing(lengths: list[int]) -> None:
    """Where that leaves little padding, no document is cut; rows are never more than its."""
    pieces = packed_pieces(offsets_of(lengths), 32)
    expected = best_fit_windows(lengths, 32)
    assert len(pieces.first) - 1 <= expected
    if len(pieces.first) - 1 == expected:
        assert len(pieces.starts) == len(lengths)


@pytest.mark.parametrize(
    ("low", "high", "seq_len", "most_cut"),
    [(105, 199, 512, 0.08), (10, 500, 1024, 0.001), (1, 4000, 2048, 0.001)],
)
def test_padding_and_cuts_on_many_documents(
    low: int, high: int, seq_len: int, most_cut: float
) -> None:
    lengths = np.random.default_rng(0).integers(low, high, 20_000)
    pieces = packed_pieces(offsets_of(lengths), seq_len)
    assert 1 - filled(pieces).sum() / (seq_len * (len(pieces.first) - 1)) <= MAX_PADDING
    unavoidable = int((-(-lengths // seq_len)).sum())
    assert len(pieces.starts) <= unavoidable * (1 + most_cut)


def test_neighbours_of_one_length_do_not_share_rows() -> None:
    """Documents that follow each other are often about one thing."""
    pieces = packed_pieces(offsets_of([8] * 4000), 32)
    document = (pieces.starts // 8).reshape(-1, 4)
    assert (np.abs(np.diff(document, axis=1)) == 1).mean() < 0.01
