"""Batches: every token once an epoch, the same after a restart, for any split and any world size.

Run: pytest tests/unit/test_data_loader.py
"""

import itertools
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.data.sampling.loader import EvalBatches, StepBatches, TrainLoader
from core.data.sampling.windows import SAMPLINGS, make_windows
from core.data.shards.stream import TokenStream
from core.errors import PippinError

VOCAB = 60_000


def stream_of(
    num_tokens: int, cuts: tuple[int, ...] = (), lengths: tuple[int, ...] = ()
) -> TokenStream:
    """Token i has id i, in several files; documents of given lengths, or one."""
    ids = np.arange(num_tokens, dtype="<u2")
    offsets = np.cumsum([0, *lengths], dtype=np.int64) if lengths else None
    return TokenStream(
        np.split(ids, list(cuts)),
        vocab_size=VOCAB,
        text_bytes=3 * num_tokens,
        offsets=offsets,
    )


def steps(
    stream: TokenStream, count: int, seq_len: int = 7, sampling: str = "contiguous", **changes: Any
) -> list[StepBatches]:
    options: dict[str, Any] = {
        "micro_batch_size": 2,
        "grad_accum_steps": 4,
        "seed": 3,
        "vocab_size": VOCAB,
        "prefetch": 2,
    }
    windows = make_windows(stream, sampling, seq_len, seed=11)
    with TrainLoader(stream, windows, **{**options, **changes}) as loader:
        return list(itertools.islice(loader, count))


def rows(found: list[StepBatches]) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """(step, row of the step, tokens, targets with weight) of every row."""
    out = []
    for step in found:
        for batch in step.micro:
            for i in range(len(batch.tokens)):
                kept = batch.targets[i][batch.weights[i] > 0]
                out.append((step.step, batch.row0 + i, tuple(batch.tokens[i]), tuple(kept)))
    return out


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(9, 200),
    seq_len=st.integers(2, 8),
    micro=st.integers(1, 3),
    accum=st.integers(1, 3),
    cut=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_every_token_is_a_target_once_per_epoch(
    num_tokens: int, seq_len: int, micro: int, accum: int, cut: int, seed: int
) -> None:
    num_windows = -(-(num_tokens - 1) // seq_len)
    count = 2 * micro * accum  # so many epochs end exactly at the end of a step
    found = steps(
        stream_of(num_tokens, (cut,)),
        2 * num_windows,
        seq_len=seq_len,
        micro_batch_size=micro,
        grad_accum_steps=accum,
        seed=seed,
    )
    seen = Counter(t for *_, targets in rows(found) for t in targets)
    assert seen == Counter(dict.fromkeys(range(1, num_tokens), count))
    for step in found:
        weights = sum(float(batch.weights.sum()) for batch in step.micro)
        assert step.normalizer == step.tokens == weights
        for batch in step.micro:
            assert batch.tokens.shape == batch.targets.shape == (micro, seq_len)
            assert (batch.tokens.dtype, batch.targets.dtype) == (np.int32, np.int32)
            assert batch.tokens.flags.c_contiguous and batch.targets.flags.c_contiguous
            # Ids count up, so every weighted target is its token plus one.
            used = batch.weights > 0
            assert np.array_equal(batch.targets[used], batch.tokens[used] + 1)


LENGTHS = (1, 40, 3, 3, 7, 8, 6, 1, 1, 30, 13, 14, 2, 5, 5, 5, 6, 50, 100, 200)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=40),
    seq_len=st.integers(2, 16),
    sampling=st.sampled_from(["random_chunk", "document", "packed"]),
    seed=st.integers(0, 99),
)
def test_every_mode_trains_on_every_token_once_per_epoch(
    lengths: list[int], seq_len: int, sampling: str, seed: int
) -> None:
    num_tokens = sum(lengths)
    assume(num_tokens > seq_len)
    stream = stream_of(num_tokens, (num_tokens // 2,), tuple(lengths))
    windows = make_windows(stream, sampling, seq_len, seed=11)
    found = steps(
        stream,
        3 * windows.num_windows,
        seq_len=seq_len,
        sampling=sampling,
        micro_batch_size=1,
        grad_accum_steps=1,
        seed=seed,
    )
    first = 1 if sampling == "random_chunk" else 0  # nothing comes before the text
    for epoch in range(3):
        part = found[epoch * windows.num_windows : (epoch + 1) * windows.num_windows]
        seen = Counter(t for *_, targets in rows(part) for t in targets)
        assert seen == Counter(range(first, num_tokens))
        assert sum(step.tokens for step in part) == windows.targets_per_epoch == num_tokens - first
    for step in found:
        (batch,) = step.micro
        assert step.normalizer == step.tokens == float(batch.weights.sum())
        used = batch.weights > 0
        assert np.array_equal(batch.tokens[used], (batch.targets[used] - 1) % num_tokens)
        assert (batch.segments is not None) == (sampling == "packed")


def test_random_chunks_change_with_the_epoch() -> None:
    stream = stream_of(200)
    windows = make_windows(stream, "random_chunk", 7, seed=11)
    every = np.arange(windows.num_windows)
    cuts = [windows.rows(every, np.full_like(every, e)).targets[:, 0] % 7 for e in range(20)]
    assert len({tuple(np.unique(c)) for c in cuts}) >= 5
    other = make_windows(stream, "random_chunk", 7, seed=12).rows(every, every * 0)
    assert not np.array_equal(other.targets, windows.rows(every, every * 0).targets)


@pytest.mark.parametrize("sampling", ["document", "packed"])
def test_no_row_joins_what_documents_part(sampling: str) -> None:
    """Positions of one segment are neighbours in the text, and one document's."""
    stream = stream_of(sum(LENGTHS), (100,), LENGTHS)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    windows = make_windows(stream, sampling, 16, seed=1)
    every = np.arange(windows.num_windows)
    found = windows.rows(every, every * 0)
    segments = np.zeros_like(found.targets) if found.segments is None else found.segments
    for targets, weights, parts in zip(found.targets, found.weights, segments):
        assert set(parts[weights == 0]) & set(parts[weights > 0]) == set() or sampling != "packed"
        for part in np.unique(parts[weights > 0]):
            here = targets[(parts == part) & (weights > 0)]
            assert np.array_equal(here, np.arange(here[0], here[0] + len(here)))
            assert len(np.unique(document[here])) == 1


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_restart_gives_the_remaining_stream(sampling: str) -> None:
    stream = stream_of(500, (100, 101, 333), LENGTHS)
    whole = rows(steps(stream, 30, sampling=sampling))
    for start in (1, 2, 9, 10, 30):
        again = rows(steps(stream, 31 - start, sampling=sampling, start_step=start))
        assert again == [row for row in whole if row[0] >= start]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_are_the_single_stream(world_size: int, sampling: str) -> None:
    stream = stream_of(500, (150,), LENGTHS)
    alone = steps(stream, 12, sampling=sampling)
    shared = [
        steps(stream, 12, sampling=sampling, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert sorted(row for found in shared for row in rows(found)) == rows(alone)
    for found in shared:
        assert [s.normalizer for s in found] == [s.normalizer for s in alone]
        assert all(len(s.micro) == 4 // world_size for s in found)


@pytest.mark.parametrize(("micro", "accum"), [(1, 8), (4, 2), (8, 1)])
def test_split_of_a_step_does_not_change_its_rows(micro: int, accum: int) -> None:
    stream = stream_of(300)
    found = steps(stream, 9, micro_batch_size=micro, grad_accum_steps=accum)
    assert rows(found) == rows(steps(stream, 9))


def test_seed_changes_the_order() -> None:
    stream = stream_of(300)
    assert rows(steps(stream, 3, seed=1)) != rows(steps(stream, 3, seed=2))


def test_order_blocks_are_seamless() -> None:
    """Steps larger than a block of the order, and a step that is not a divisor of one."""
    stream = stream_of(40)
    big = steps(stream, 2, micro_batch_size=3001, grad_accum_steps=3)
    small = steps(stream, 2 * 3001, micro_batch_size=1, grad_accum_steps=3)
    assert [r[2:] for r in rows(big)] == [r[2:] for r in rows(small)]


def test_accumulation_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(PippinError) as error:
        TrainLoader(
            stream_of(100),
            make_windows(stream_of(100), "contiguous", 7, seed=1),
            micro_batch_size=2,
            grad_accum_steps=3,
            seed=1,
            vocab_size=VOCAB,
            world_size=2,
        )
    assert error.value.code == "P010"
    assert "grad_accum_steps=4" in error.value.remedy


def test_short_stream_names_both_numbers() -> None:
    with pytest.raises(PippinError) as error:
        steps(stream_of(7), 1)
    assert error.value.code == "P201"
    assert "7 tokens" in error.value.what and "8" in error.value.what


def test_id_out_of_range_is_raised_in_the_consumer_each_time() -> None:
    stream = TokenStream([np.array([1, 2, 99] * 10, "<u2")], vocab_size=100, text_bytes=1)
    windows = make_windows(stream, "contiguous", 4, seed=1)
    options = {"micro_batch_size": 1, "grad_accum_steps": 1, "seed": 1}
    with TrainLoader(stream, windows, **options, vocab_size=99) as loader:
        for _ in range(2):
            with pytest.raises(PippinError) as error:
                next(loader)
            assert error.value.code == "P204" and "id 99" in error.value.what
    with TrainLoader(stream, windows, **options, vocab_size=100) as loader:
        next(loader)


def test_large_ids_are_no_negative_numbers() -> None:
    stream = TokenStream([np.full(20, 2**31 + 5, "<u4")], vocab_size=10, text_bytes=1)
    with pytest.raises(PippinError) as error:
        steps(stream, 1)
    assert error.value.code == "P204"


def test_close_joins_the_thread_and_ends_iteration() -> None:
    before = threading.active_count()
    windows = make_windows(stream_of(300), "contiguous", 7, seed=1)
    loader = TrainLoader(
        stream_of(300), windows, micro_batch_size=2, grad_accum_steps=1, seed=1, vocab_size=VOCAB
    )
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def evaluation(stream: TokenStream, sampling: str = "contiguous", **options: Any) -> EvalBatches:
    windows = make_windows(stream, sampling, 7, seed=1)
    return EvalBatches(stream, windows, vocab_size=VOCAB, **options)


def eval_targets(batches: EvalBatches) -> list[int]:
    return [int(t) for b in batches for t in b.targets[b.weights > 0].tolist()]


def test_evaluation_of_everything() -> None:
    stream = stream_of(101, (50,))
    batches = evaluation(stream, batch_size=4, max_tokens=10**6)
    found = list(batches)
    assert {b.tokens.shape for b in found} == {(4, 7)} and len(found) == len(batches) == 4
    assert sorted(eval_targets(batches)) == list(range(1, 101))
    assert found[-1].weights[3].sum() == 0  # 15 windows: one row of the last batch is padding


def test_evaluation_sample_is_fixed_and_spread() -> None:
    stream = stream_of(7001)
    first = evaluation(stream, batch_size=3, max_tokens=70)
    assert first.numbers.tolist() == [50 + 100 * i for i in range(10)]
    assert eval_targets(first) == eval_targets(first)
    assert len(eval_targets(first)) == 70


def many_documents(count: int) -> TokenStream:
    lengths = np.random.default_rng(0).integers(6, 31, count)
    return stream_of(int(lengths.sum()), (100,), tuple(lengths.tolist()))


def test_documents_of_a_step_are_about_equally_long() -> None:
    """Rows are trimmed to a few widths, and little of them is padding."""
    stream = many_documents(3000)
    found = steps(stream, 64, 32, "document", micro_batch_size=5, grad_accum_steps=2)
    batches = [batch for step in found for batch in step.micro]
    widths = {batch.tokens.shape[1] for batch in batches}
    assert widths <= set(range(0, 33, 2)) and len(widths) > 3
    for batch in batches:
        assert {a.shape for a in (batch.tokens, batch.targets, batch.weights)} == {
            batch.tokens.shape
        }
    trained = sum(float(batch.weights.sum()) for batch in batches)
    computed = sum(batch.tokens.size for batch in batches)
    windows = make_windows(stream, "document", 32, seed=1)
    assert trained / computed > 0.8 > windows.targets_per_epoch / (windows.num_windows * 32)
    share = windows.targets_per_epoch / windows.positions_per_epoch
    assert trained / computed == pytest.approx(share, abs=0.05)


def test_short_and_long_documents_are_mixed_over_the_steps() -> None:
    found = steps(many_documents(3000), 64, 32, "document", micro_batch_size=10)
    tokens = [step.tokens for step in found]
    assert abs(np.corrcoef(np.arange(64) % 8, tokens)[0, 1]) < 0.5
    assert len({tuple(np.argsort(tokens[i : i + 8])) for i in range(0, 64, 8)}) >= 7


def test_an_epoch_of_documents_keeps_its_rows() -> None:
    """Sorting by length never moves a row over the end of an epoch."""
    stream = many_documents(333)
    found = steps(stream, 333, 32, "document", micro_batch_size=1, grad_accum_steps=2)
    targets = [t for *_, kept in rows(found) for t in kept]
    for epoch in range(2):
        part = targets[epoch * stream.num_tokens : (epoch + 1) * stream.num_tokens]
        assert Counter(part) == Counter(range(stream.num_tokens))
    whole = rows(found)
    for start in (2, 16, 17, 18, 100):
        again = rows(
            steps(
                stream, 30, 32, "document", micro_batch_size=1, grad_accum_steps=2, start_step=start
            )
        )
        assert again == [row for row in whole if start <= row[0] < start + 30]
