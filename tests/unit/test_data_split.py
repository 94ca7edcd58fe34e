"""Which document goes where: shares are met, equal documents stay together, cuts lose nothing.

Run: pytest tests/unit/test_data_split.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.split import (
    assign_documents,
    cut_document,
    document_key,
    keep_apart,
    moved_notes,
)


def keys_of(items: list[str], seed: int = 1) -> np.ndarray:
    return np.array([document_key(t.encode(), seed) for t in items], np.uint64)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=200, max_size=400),
    val=st.sampled_from([0.02, 0.1, 0.3]),
    test=st.sampled_from([0.0, 0.02, 0.2]),
    seed=st.integers(0, 50),
)
def test_shares_are_met_by_bytes(sizes: list[int], val: float, test: float, seed: int) -> None:
    items = [f"{i}" for i in range(len(sizes))]
    split = assign_documents(keys_of(items, seed), np.array(sizes, np.int64), val, test)
    assert split is not None
    shares = np.bincount(split, weights=sizes, minlength=3) / sum(sizes)
    assert 0.5 * val <= shares[1] <= 1.03 * val
    assert 0.5 * test <= shares[2] <= 1.03 * test


def test_equal_documents_are_on_one_side() -> None:
    items = [f"text {i % 150}" for i in range(600)]
    split = assign_documents(keys_of(items), np.full(600, 7, np.int64), 0.2, 0.2)
    assert split is not None and set(split.tolist()) == {0, 1, 2}
    sides = {text: {int(s) for t, s in zip(items, split) if t == text} for text in items}
    assert all(len(side) == 1 for side in sides.values())


def test_split_depends_on_the_seed_and_not_on_the_position() -> None:
    items = [f"text {i}" for i in range(300)]
    sizes = np.full(300, 10, np.int64)
    one = assign_documents(keys_of(items, 1), sizes, 0.1, 0.1)
    other = assign_documents(keys_of(items, 2), sizes, 0.1, 0.1)
    back = assign_documents(keys_of(items[::-1], 1), sizes, 0.1, 0.1)
    assert one is not None and other is not None and back is not None
    assert one.tolist() != other.tolist()
    assert one.tolist() == back.tolist()[::-1]


def test_few_or_huge_documents_must_be_cut() -> None:
    sizes = np.full(49, 10, np.int64)
    assert assign_documents(keys_of([str(i) for i in range(49)]), sizes, 0.1, 0.1) is None
    # 60 documents of which two are nearly everything: no whole document is near 2%.
    sizes = np.array([10**6, 10**6] + [1] * 58, np.int64)
    assert assign_documents(keys_of([str(i) for i in range(60)]), sizes, 0.02, 0.02) is None


def test_what_is_also_trained_on_leaves_validation() -> None:
    keys = np.array([5, 6, 7, 5, 6, 9, 7, 5], np.uint64)
    given = np.array([0, 1, 1, 2, 2, 2, 2, 1], np.int8)
    apart = keep_apart(keys, given)
    assert apart.tolist() == [0, 1, 1, 0, 1, 2, 1, 0]
    assert moved_notes(given, apart) == (
        "1 validation documents that are also in training were moved there",
        "1 test documents that are also in training were moved there",
        "2 test documents that are also in validation were moved there",
    )


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=40))
def test_no_text_is_in_two_splits(pairs: list[tuple[int, int]]) -> None:
    keys = np.array([key for key, _ in pairs], np.uint64)
    given = np.array([side for _, side in pairs], np.int8)
    apart = keep_apart(keys, given).tolist()
    for key in {key for key, _ in pairs}:
        sides = {side for (k, _), side in zip(pairs, apart) if k == key}
        assert sides == {min(side for k, side in pairs if k == key)}


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\u6f22"), max_size=600),
    val=st.floats(0.01, 0.45),
    test=st.floats(0, 0.45),
)
def test_cut_documents_join_to_the_text(text: str, val: float, test: float) -> None:
    parts = cut_document(text, val, test)
    assert "".join(parts) == text
    if test == 0:
        assert parts[2] == ""


def test_cuts_are_at_line_ends_and_near_the_shares() -> None:
    text = "".join(f"line number {i}\n" for i in range(2000))
    train, val, test = cut_document(text, 0.1, 0.05)
    assert train.endswith("\n") and val.endswith("\n")
    assert len(val) / len(text) == pytest.approx(0.1, abs=0.002)
    assert len(test) / len(text) == pytest.approx(0.05, abs=0.002)
