"""Batches: every token once an epoch, the same after a restart, for any split and any world size.

Run: pytest tests/unit/test_data_loader.py
"""

import itertools
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.data.loader import EvalBatches, StepBatches, TrainLoader
from core.data.shards import TokenStream
from core.errors import PippinError

VOCAB = 60_000


def stream_of(num_tokens: int, cuts: tuple[int, ...] = ()) -> TokenStream:
    """Token i has id i, in several files."""
    ids = np.arange(num_tokens, dtype="<u2")
    return TokenStream(np.split(ids, list(cuts)), vocab_size=VOCAB, text_bytes=3 * num_tokens)


def steps(stream: TokenStream, count: int, **changes: Any) -> list[StepBatches]:
    options: dict[str, Any] = {
        "seq_len": 7,
        "micro_batch_size": 2,
        "grad_accum_steps": 4,
        "seed": 3,
        "vocab_size": VOCAB,
        "prefetch": 2,
    }
    with TrainLoader(stream, **{**options, **changes}) as loader:
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


def test_restart_gives_the_remaining_stream() -> None:
    stream = stream_of(500, (100, 101, 333))
    whole = rows(steps(stream, 30))
    for start in (1, 2, 9, 10, 30):
        again = rows(steps(stream, 31 - start, start_step=start))
        assert again == [row for row in whole if row[0] >= start]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_are_the_single_stream(world_size: int) -> None:
    stream = stream_of(300, (150,))
    alone = steps(stream, 12)
    shared = [steps(stream, 12, rank=r, world_size=world_size) for r in range(world_size)]
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
            seq_len=7,
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
    options = {"seq_len": 4, "micro_batch_size": 1, "grad_accum_steps": 1, "seed": 1}
    with TrainLoader(stream, **options, vocab_size=99) as loader:  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.raises(PippinError) as error:
                next(loader)
            assert error.value.code == "P204" and "id 99" in error.value.what
    with TrainLoader(stream, **options, vocab_size=100) as loader:  # type: ignore[arg-type]
        next(loader)


def test_large_ids_are_no_negative_numbers() -> None:
    stream = TokenStream([np.full(20, 2**31 + 5, "<u4")], vocab_size=10, text_bytes=1)
    with pytest.raises(PippinError) as error:
        steps(stream, 1)
    assert error.value.code == "P204"


def test_close_joins_the_thread_and_ends_iteration() -> None:
    before = threading.active_count()
    loader = TrainLoader(
        stream_of(300), seq_len=7, micro_batch_size=2, grad_accum_steps=1, seed=1, vocab_size=VOCAB
    )
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def eval_targets(batches: EvalBatches) -> list[int]:
    return [int(t) for b in batches for t in b.targets[b.weights > 0].tolist()]


def test_evaluation_of_everything() -> None:
    stream = stream_of(101, (50,))
    batches = EvalBatches(stream, seq_len=7, batch_size=4, max_tokens=10**6, vocab_size=VOCAB)
    found = list(batches)
    assert {b.tokens.shape for b in found} == {(4, 7)} and len(found) == len(batches) == 4
    assert sorted(eval_targets(batches)) == list(range(1, 101))
    assert batches.num_tokens == 100
    assert batches.num_bytes == pytest.approx(300)
    assert found[-1].weights[3].sum() == 0  # 15 windows: one row of the last batch is padding


def test_evaluation_sample_is_fixed_and_spread() -> None:
    stream = stream_of(7001)
    first = EvalBatches(stream, seq_len=7, batch_size=3, max_tokens=70, vocab_size=VOCAB)
    assert first.windows.tolist() == [50 + 100 * i for i in range(10)]
    assert eval_targets(first) == eval_targets(first)
    assert first.num_tokens == 70


def test_evaluation_bytes_are_counted_by_id() -> None:
    stream = stream_of(22)
    lengths: NDArray[np.int64] = np.arange(VOCAB) % 5
    batches = EvalBatches(
        stream, seq_len=7, batch_size=2, max_tokens=14, vocab_size=VOCAB, token_bytes=lengths
    )
    assert batches.num_bytes == sum(t % 5 for t in eval_targets(batches))
