"""Weights and preferences in folders of shards, and the folders of a mixture.

Run: pytest tests/unit/test_data_mixture_folders.py
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.preparing.shard_builder import SplitBuilder
from core.data.sampling.mixture import MixtureItem, open_mixture, parse_mixture
from core.data.shards.manifest import (
    FORMAT,
    VERSION,
    Manifest,
    SourceInfo,
    TokenizerInfo,
    is_current,
    load_manifest,
    open_shards,
)
from core.data.shards.stream import TokenStream
from core.data.tokenizers.tokenizer import ByteTokenizer
from core.errors import PippinError


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
        # Shards of a newer version are nothing to remove.
        assert ("git pull" in error.value.remedy) == (word == "newer")
        assert (f"rm -r {folder}" in error.value.remedy) == (word == "older")
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
    with pytest.raises(PippinError, match="too short") as error:
        mixture.train_parts("packed", 5000, seed=1)
    fits = int(error.value.remedy.removeprefix("data.seq_len=").partition(",")[0])
    assert mixture.train_parts("packed", fits, seed=1) and mixture.eval_parts("packed", fits, 1)
    with pytest.raises(PippinError) as error:
        open_mixture([MixtureItem(str(folders[0])), MixtureItem("0", 1)], tmp_path)
    assert error.value.code == "P010" and "twice" in error.value.what
    with pytest.raises(PippinError) as error:
        open_mixture([MixtureItem("nowhere", 1)], tmp_path)
    assert error.value.code == "P201" and str(folders[0]) in error.value.choices


def test_tokenizers_of_a_mixture_must_be_one(tmp_path: Path) -> None:
    from core.data.tokenizers.tokenizer import CharTokenizer

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
