"""Mixtures, weights and preferences: exact shares, every token once an epoch, the same after a restart.

Run: pytest tests/unit/test_data_mixture.py
"""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.loader import EvalBatches, StepBatches, TrainLoader
from core.data.mixture import MixtureItem, open_mixture, parse_mixture
from core.data.order import MIXTURE_BLOCK, MixtureOrder, WindowOrder
from core.data.parts import TrainParts
from core.data.shard_builder import SplitBuilder
from core.data.shards import (
    FORMAT,
    VERSION,
    Manifest,
    SourceInfo,
    TokenizerInfo,
    is_current,
    load_manifest,
    open_shards,
)
from core.data.stream import TokenStream
from core.data.tokenizer import ByteTokenizer
from core.data.windows import SAMPLINGS, make_windows
from core.errors import PippinError

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
def test_every_block_has_its_shares(weights: list[float], block: int) -> None:
    order = MixtureOrder(weights, seed=1)
    before, after = order.rows_before(block), order.rows_before(block + 1)
    assert sum(before) == block * MIXTURE_BLOCK
    counts = [b - a for a, b in zip(before, after)]
    assert min(counts) >= 0 and sum(counts) == MIXTURE_BLOCK
    # Rounding is made up for, however many blocks have passed: 0.5 + 0.5 (1 + 1/2 + ...) at most.
    bound = 0.5 + 0.5 * sum(1 / k for k in range(1, len(weights) + 1))
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
        assert (step.normalizer, step.tokens) == (total or 1.0, count)
    first = 0 if sampling in ("document", "packed") else 1
    firsts = {10_000 * k + i for k in range(3) for i in range(first)}
    assert seen == {t for t, w in weight_of.items() if w > 0} - firsts


def test_a_step_without_any_weight_can_be_divided_by() -> None:
    stream = part(0, [40], np.zeros(40))
    windows = make_windows(stream, "contiguous", 7, seed=1)
    found = steps(TrainParts((stream,), (windows,), (1.0,)), 3)
    assert [(s.normalizer, s.tokens) for s in found] == [(1.0, 0)] * 3


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


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    shard_tokens=st.integers(6, 60),
    pieces=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_weights_come_back_from_the_disk(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_tokens: int,
    pieces: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    draw = np.random.default_rng(seed)
    ids = [draw.integers(0, 257, n).astype(np.uint32) for n in lengths]
    weights = [draw.integers(0, 3, n).astype(np.uint8) for n in lengths]
    weights[0] = np.ones(lengths[0], np.uint8)
    folder = publish_shards(folder, ids, [None, *weights[1:]], shard_tokens, pieces=pieces)
    info = load_manifest(folder).splits["train"]
    assert info.trained_tokens == sum(int((w > 0).sum()) for w in weights)
    assert [f.items for f in info.weights] == [f.items for f in info.files]
    stream = open_shards(folder, "train")
    every = np.arange(stream.num_tokens)
    found = stream.gather_weights(every.reshape(-1, 1))
    assert found.dtype == np.float32 and stream.has_weights
    assert np.array_equal(found.ravel(), np.concatenate(weights))
    assert np.array_equal(stream.gather(every), np.concatenate(ids))
    assert stream.trained_tokens == info.trained_tokens


def publish_shards(
    folder: Path,
    ids: list[np.ndarray],
    weights: list[np.ndarray | None] | None,
    shard_tokens: int = 1000,
    *,
    content: str = "text",
    pieces: int = 1,
    tokenizer: Any = None,
) -> Path:
    """A folder of shards with one training split, and the same for validation."""
    tokenizer = tokenizer or ByteTokenizer()
    splits = {}
    for split in ("train", "val"):
        writer = SplitBuilder(
            folder, split, "uint16", shard_tokens=shard_tokens, weighted=weights is not None
        )
        for i, document in enumerate(ids):
            given = None if weights is None else weights[i]
            cuts = np.linspace(0, len(document), pieces + 1).astype(int)
            for a, b in itertools.pairwise(cuts.tolist()):
                ends = np.array([b - a] if b == len(document) else [], np.int64)
                part_of = None if given is None else given[a:b]
                if b > a:
                    writer.add(
                        document[a:b], ends, text_bytes=1, entropy_bits=None, weights=part_of
                    )
        splits[split] = writer.finish()
    file = tokenizer.save(folder)
    info = SourceInfo(
        name="x",
        fingerprint="0",
        seed=1,
        val_fraction=0.1,
        test_fraction=0.1,
        documents=len(ids),
        whole_documents=True,
        notes=(),
    )
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        content=content,
        dtype="uint16",
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind,
            file=file.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            requested="byte",
        ),
        source=info,
        splits=splits,
        max_id=max(int(d.max()) for d in ids),
    )
    (folder / "manifest.json").write_text(manifest.text())
    return folder


def documents(count: int, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 257, draw.integers(3, 9)).astype(np.uint32) for _ in range(count)]


def test_damaged_and_missing_weights_are_found(tmp_path: Path) -> None:
    ids = documents(9)
    weights: list[np.ndarray | None] = [(d % 2).astype(np.uint8) for d in ids]
    folder = publish_shards(tmp_path, ids, weights)
    path = folder / "train_weights_00000.bin"
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(PippinError, match=r"train_weights_00000\.bin: its sha256"):
        open_shards(folder, "train")
    path.write_bytes(good[:-1])
    with pytest.raises(PippinError, match="bytes instead of"):
        open_shards(folder, "train", verify=False)
    path.unlink()
    with pytest.raises(PippinError, match="is missing"):
        open_shards(folder, "train")


def test_identity_depends_on_weights_and_content(tmp_path: Path) -> None:
    ids = documents(8)
    ones: list[np.ndarray | None] = [np.ones(len(d), np.uint8) for d in ids]
    some = [*ones[:-1], np.zeros(len(ids[-1]), np.uint8)]
    found = []
    for i, (weights, content) in enumerate(
        [(None, "text"), (ones, "chat"), (some, "chat"), (some, "preference")]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        publish_shards(folder, ids, weights, content=content)
        found.append(load_manifest(folder).content_sha256())
    assert len(set(found)) == 4


def test_pairs_are_neighbours(tmp_path: Path) -> None:
    ids = documents(10)
    stream = open_shards(publish_shards(tmp_path, ids, None, content="preference"), "train")
    pairs = stream.pairs()
    assert pairs.shape == (5, 2, 2) and pairs.dtype == np.int64
    for i, (chosen, rejected) in enumerate(pairs.tolist()):
        assert stream.tokens(*chosen).tolist() == ids[2 * i].tolist()
        assert stream.tokens(*rejected).tolist() == ids[2 * i + 1].tolist()
    odd = TokenStream([ids[0]], vocab_size=257, text_bytes=1)
    with pytest.raises(PippinError) as error:
        odd.pairs()
    assert error.value.code == "P203"


def test_versions(tmp_path: Path) -> None:
    folder = publish_shards(tmp_path, documents(4), None)
    path = folder / "manifest.json"
    good = path.read_text()
    assert is_current(folder) and is_current(path)
    for version, word in ((1, "older"), (3, "newer")):
        path.write_text(good.replace('"version": 2', f'"version": {version}'))
        assert not is_current(path)
        with pytest.raises(PippinError) as error:
            load_manifest(folder)
        assert error.value.code == "P203" and word in error.value.found
        assert str(folder) in error.value.remedy
    path.write_text(good[:50])  # damaged: load_manifest tells of it
    assert is_current(path)
    path.unlink()
    assert not is_current(path)


def test_folders_of_a_mixture_are_checked(tmp_path: Path) -> None:
    folders = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        folders.append(publish_shards(tmp_path / str(i), documents(40, i), None))
    mixture = open_mixture([MixtureItem(str(folders[0]), 3), MixtureItem("1", 1)], tmp_path)
    assert mixture.weights == (0.75, 0.25) and mixture.folders[1] == folders[1]
    parts = mixture.train_parts("packed", 8, seed=1)
    assert mixture.train_tokens == sum(s.num_tokens for s in parts.streams)
    assert len(mixture.eval_parts("packed", 8, seed=1).streams) == 2
    other = open_mixture([MixtureItem(str(folders[0]), 1), MixtureItem(str(folders[1]), 1)])
    assert other.content_sha256 != mixture.content_sha256
    single = open_mixture([MixtureItem(str(folders[0]), 5)])
    assert single.content_sha256 == load_manifest(folders[0]).content_sha256()
    with pytest.raises(PippinError, match="too short"):
        mixture.train_parts("packed", 5000, seed=1)
    with pytest.raises(PippinError) as error:
        open_mixture([MixtureItem(str(folders[0])), MixtureItem("0", 1)], tmp_path)
    assert error.value.code == "P010" and "twice" in error.value.what
    with pytest.raises(PippinError) as error:
        open_mixture([MixtureItem("nowhere", 1)], tmp_path)
    assert error.value.code == "P201" and str(folders[0]) in error.value.choices


def test_tokenizers_of_a_mixture_must_be_one(tmp_path: Path) -> None:
    from core.data.tokenizer import CharTokenizer

    for name, tokenizer in (("a", None), ("b", CharTokenizer("".join(map(chr, range(32, 400)))))):
        (tmp_path / name).mkdir()
        publish_shards(tmp_path / name, documents(4), None, tokenizer=tokenizer)
    with pytest.raises(PippinError) as error:
        open_mixture([MixtureItem(str(tmp_path / "a")), MixtureItem(str(tmp_path / "b"))])
    assert error.value.code == "P301"
    assert str(tmp_path / "a") in error.value.found and str(tmp_path / "b") in error.value.found


def test_the_key_of_a_mixture() -> None:
    expected = (MixtureItem("a", 0.5), MixtureItem("b", 2.0))
    assert parse_mixture({"a": 0.5, "b": 2}) == expected
    assert parse_mixture([{"path": "a", "weight": 0.5}, {"path": "b", "weight": 2}]) == expected
    assert parse_mixture(["a", {"path": "b"}]) == (MixtureItem("a", 1.0), MixtureItem("b", 1.0))
    for wrong in ([], {}, "a", {"a": 0}, {"a": "x"}, {"a": True}, [{"weight": 1}], [3], {"": 1}):
        with pytest.raises(PippinError) as error:
            parse_mixture(wrong)  # type: ignore[arg-type]
        assert error.value.code == "P010"
