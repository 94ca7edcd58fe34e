"""Mixtures, weights and preferences: exact shares, every token once an epoch, the same after a restart.

Run: pytest tests/unit/test_data_mixture.py
"""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.data.sampling.loader import EvalBatches, StepBatches, TrainLoader
from core.data.sampling.order import MIXTURE_BLOCK, MixtureOrder, WindowOrder
from core.data.sampling.parts import TrainParts
from core.data.sampling.windows import SAMPLINGS, make_windows
from core.data.shards.stream import TokenStream

VOCAB = 60_000
WEIGHTS = st.lists(st.sampled_from([0.001, 0.1, 0.2, 0.5, 1.0, 3.0, 7.5]), min_size=1, max_size=6)


def part(first_id: int, lengths: list[int], weights: np.ndarray | None = None) -> TokenStream:
    """Token i has id first_id + i; documents of given lengths, in two files."""
    total = sum(lengths)
    ids = np.arange(first_id, first_id + total, dtype="<u2")
    cut = [total // 3]
    return TokenStream(
        np.split(ids, cut),
        vocab_size=VOCAB,
        text_bytes=3 * total,
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        weights=[] if weights is None else np.split(weights.astype(np.uint8), cut),
    )


def mixed(
    sampling: str = "contiguous",
    shares: tuple[float, ...] = (0.5, 0.3, 0.2),
    *,
    seq_len: int = 7,
    weighted: bool = False,
) -> TrainParts:
    draw = np.random.default_rng(5)
    streams = []
    for k in range(len(shares)):
        lengths = draw.integers(2, 12, 12 + 9 * k).tolist()
        total = sum(lengths)
        weights = draw.choice([0, 1, 1, 3], total) if weighted and k != 1 else None
        streams.append(part(10_000 * k, lengths, weights))
    windows = tuple(make_windows(s, sampling, seq_len, seed=11) for s in streams)
    return TrainParts(tuple(streams), windows, shares)


def steps(parts: TrainParts, count: int, **changes: Any) -> list[StepBatches]:
    options = {"micro_batch_size": 2, "grad_accum_steps": 4, "seed": 3, "vocab_size": VOCAB}
    with TrainLoader(parts, **{**options, **changes}) as loader:
        return list(itertools.islice(loader, count))


Row = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[float, ...]]


def rows(found: list[StepBatches]) -> list[Row]:
    """(step, row, tokens, targets, weights), the last three where the weight is above 0."""
    out = []
    for step in found:
        for batch in step.micro:
            for i in range(len(batch.tokens)):
                used = batch.weights[i] > 0
                kept = (a[i][used].tolist() for a in (batch.tokens, batch.targets, batch.weights))
                out.append((step.step, batch.row0 + i, *(tuple(k) for k in kept)))
    return out


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, block=st.integers(0, 10**7))
@example(weights=[0.001, 0.2, 0.001, 0.001, 0.001, 0.2], block=1)
def test_every_block_has_its_shares(weights: list[float], block: int) -> None:
    order = MixtureOrder(weights, seed=1)
    before, after = order.rows_before(block), order.rows_before(block + 1)
    assert sum(before) == block * MIXTURE_BLOCK
    counts = [b - a for a, b in zip(before, after)]
    assert min(counts) >= 0 and sum(counts) == MIXTURE_BLOCK
    # Rounding is made up for, however many blocks have passed: each text adds half a row at most.
    bound = 0.5 * len(weights)
    for weight, rows_so_far in zip(weights, before):
        assert abs(rows_so_far - block * MIXTURE_BLOCK * weight / sum(weights)) <= bound
    texts, _ = order.rows(block * MIXTURE_BLOCK, MIXTURE_BLOCK)
    assert np.bincount(texts, minlength=len(weights)).tolist() == counts


def test_shares_that_are_whole_rows_are_exact_in_each_block() -> None:
    order = MixtureOrder([5, 2, 1], seed=4)
    texts, _ = order.rows(0, 3 * MIXTURE_BLOCK)
    for block in texts.reshape(3, -1):
        assert np.bincount(block).tolist() == [640, 256, 128]
    assert len({tuple(block) for block in texts.reshape(3, -1).tolist()}) == 3  # shuffled anew
    # Shuffled, not one text after the other: 128 rows have about their share.
    assert abs(np.count_nonzero(texts[:128] == 0) - 80) < 20


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 5000), count=st.integers(1, 3000))
def test_each_text_counts_its_own_rows(weights: list[float], first: int, count: int) -> None:
    """Counted one by one from row 0: independent of the formula that jumps to `first`."""
    order = MixtureOrder(weights, seed=9)
    texts, own = order.rows(0, first + count)
    seen: Counter[int] = Counter()
    for text, number in zip(texts.tolist(), own.tolist()):
        assert number == seen[text]
        seen[text] += 1
    later = order.rows(first, count)
    assert np.array_equal(later[0], texts[first:]) and np.array_equal(later[1], own[first:])


def test_weights_must_be_above_zero() -> None:
    for weights in ([], [1.0, 0.0], [-1.0], [float("inf")], [float("nan")]):
        with pytest.raises(ValueError, match="above 0"):
            MixtureOrder(weights, 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_text_alone_and_in_a_mixture_is_read_in_the_same_order(sampling: str) -> None:
    parts = mixed(sampling)
    plan = parts.plan(3).rows(0, 700)
    for k, windows in enumerate(parts.windows):
        here = plan.parts == k
        assert 3 * windows.num_windows < np.count_nonzero(here)
        expected = WindowOrder(windows.num_windows, 3).windows(0, int(here.sum()))
        assert np.array_equal(plan.windows[here], expected)
        assert np.array_equal(plan.epochs[here], np.arange(here.sum()) // windows.num_windows)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_each_text_is_a_target_once_in_each_of_its_epochs(sampling: str) -> None:
    parts = mixed(sampling)
    found = steps(parts, 80)  # of 8 steps a group
    targets = [row[3] for row in rows(found)]
    for k, (stream, windows) in enumerate(zip(parts.streams, parts.windows)):
        mine = [t for row in targets for t in row if t // 10_000 == k]
        whole = [row for row in targets if row and row[0] // 10_000 == k]
        epochs = len(whole) // windows.num_windows
        first = 0 if sampling in ("document", "packed") else 1
        expected = range(10_000 * k + first, 10_000 * k + stream.num_tokens)
        assert epochs >= 3
        counts = Counter(mine)
        # Whole epochs, and some of the next one.
        assert {counts[t] - epochs for t in expected} <= {0, 1} and set(counts) == set(expected)
        if sampling != "document":  # rows are sorted within a group of steps there
            for epoch in range(epochs):
                part_of = whole[epoch * windows.num_windows : (epoch + 1) * windows.num_windows]
                assert Counter(t for row in part_of for t in row) == Counter(expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_mixture_of_one_is_the_text_alone(sampling: str, weighted: bool) -> None:
    parts = mixed(sampling, (2.5,), weighted=weighted)
    options = {"micro_batch_size": 2, "grad_accum_steps": 4, "seed": 3, "vocab_size": VOCAB}
    with TrainLoader(parts.streams[0], parts.windows[0], **options) as loader:
        alone = list(itertools.islice(loader, 20))
    found = steps(parts, 20)
    assert rows(found) == rows(alone)
    assert [s.normalizer for s in found] == [s.normalizer for s in alone]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_restart_and_world_size_do_not_matter(sampling: str, weighted: bool) -> None:
    parts = mixed(sampling, weighted=weighted)
    alone = steps(parts, 30)
    whole = rows(alone)
    for start in (2, 9, 10, 30):
        again = rows(steps(parts, 31 - start, start_step=start))
        assert again == [row for row in whole if row[0] >= start]
    for world_size in (2, 4):
        shared = [steps(parts, 30, rank=r, world_size=world_size) for r in range(world_size)]
        assert sorted(row for found in shared for row in rows(found)) == whole
        for found in shared:
            assert [s.normalizer for s in found] == [s.normalizer for s in alone]
            assert [s.tokens for s in found] == [s.tokens for s in alone]


@settings(max_examples=12, deadline=None)
@given(
    start=st.integers(1, 400), sampling=st.sampled_from(SAMPLINGS), seed=st.integers(0, 2**31 - 1)
)
def test_start_at_any_step(start: int, sampling: str, seed: int) -> None:
    parts = mixed(sampling, (0.6, 0.4))
    before = (start - 1) // 8 * 8 + 1
    whole = rows(steps(parts, start - before + 2, start_step=before, seed=seed))
    again = rows(steps(parts, 2, start_step=start, seed=seed))
    assert again == [row for row in whole if row[0] >= start]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_weights_are_those_of_each_target(sampling: str) -> None:
    parts = mixed(sampling, weighted=True)
    weight_of = {}  # naive: one token at a time
    for k, stream in enumerate(parts.streams):
        for i in range(stream.num_tokens):
            weight_of[10_000 * k + i] = float(stream.gather_weights(np.array([i]))[0])
    assert set(weight_of.values()) == {0.0, 1.0, 3.0}
    seen = set()
    for step in steps(parts, 40):
        total = count = 0.0
        for batch in step.micro:
            for target, weight in zip(
                batch.targets.ravel().tolist(), batch.weights.ravel().tolist()
            ):
                assert weight in (0.0, weight_of[target])
                total, count = total + weight, count + (weight > 0)
                if weight:
                    seen.add(target)
        assert (step.normalizer, step.tokens) == (total, count)
    first = 0 if sampling in ("document", "packed") else 1
    firsts = {10_000 * k + i for k in range(3) for i in range(first)}
    assert seen == {t for t, w in weight_of.items() if w > 0} - firsts


def test_a_step_without_any_weight_says_so() -> None:
    stream = part(0, [40], np.zeros(40))
    windows = make_windows(stream, "contiguous", 7, seed=1)
    found = steps(TrainParts((stream,), (windows,), (1.0,)), 3)
    assert [(s.normalizer, s.tokens) for s in found] == [(0.0, 0)] * 3


def test_documents_of_a_mixed_step_are_about_equally_long() -> None:
    draw = np.random.default_rng(0)
    streams = [part(30_000 * k, draw.integers(6, 31, 1000).tolist()) for k in range(2)]
    windows = tuple(make_windows(s, "document", 32, seed=1) for s in streams)
    parts = TrainParts(tuple(streams), windows, (0.7, 0.3))
    found = steps(parts, 64, micro_batch_size=5, grad_accum_steps=2)
    batches = [batch for step in found for batch in step.micro]
    trained = sum(float(batch.weights.sum()) for batch in batches)
    assert trained / sum(batch.tokens.size for batch in batches) > 0.8 > parts.fill
    assert parts.fill / parts.work == pytest.approx(0.9, abs=0.1)
    shares = np.mean([float(b.targets[b.weights > 0].mean() >= 30_000) for b in batches])
    assert 0 < shares < 1


def test_evaluation_shares_its_tokens() -> None:
    parts = mixed(shares=(3.0, 1.0))
    options = {"batch_size": 3, "vocab_size": VOCAB}
    batches = EvalBatches(parts, max_tokens=56, **options)
    found = list(batches)
    assert len(found) == len(batches)
    texts = [set((b.targets[b.weights > 0] // 10_000).tolist()) for b in found]
    assert texts == [{0}, {0}, {1}]  # 6 windows of 7, and 2
    everything = EvalBatches(parts, max_tokens=10**6, **options)
    targets = [t for b in everything for t in b.targets[b.weights > 0].tolist()]
    expected = [10_000 * k + i for k, s in enumerate(parts.streams) for i in range(1, s.num_tokens)]
    assert sorted(targets) == expected


def test_evaluation_counts_trained_tokens() -> None:
    weights = np.random.default_rng(1).random(7001) < 0.1
    stream = part(0, [7001], weights)
    windows = make_windows(stream, "contiguous", 7, seed=1)
    batches = EvalBatches(stream, windows, batch_size=4, max_tokens=140, vocab_size=VOCAB)
    scored = sum(float(b.weights.sum()) for b in batches)
    assert scored == pytest.approx(140, rel=0.3)
