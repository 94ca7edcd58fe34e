"""Shards hold exactly what was written, and every damage is found before a token is used.

Run: pytest tests/unit/test_data_shards.py
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.preparing.prepare import Prepared, prepare
from core.data.preparing.shard_builder import SplitBuilder
from core.data.shards import manifest as shards
from core.data.shards.manifest import document_offsets, load_manifest, open_shards
from core.data.shards.stream import TokenStream
from core.errors import PippinError

TEXT = "".join(f"{i}. The fox sees {i * 7919 % 104729} hens.\n" for i in range(600))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.txt").write_text(TEXT)
    return prepare(folder / "a.txt", shards_dir=folder / "s", seq_len=16, seed=1, tokenizer="byte")


@pytest.fixture
def folder(made: Prepared, tmp_path: Path) -> Path:
    """A copy to damage; without the record of what was verified."""
    copy = tmp_path / "copy"
    shutil.copytree(made.folder, copy, ignore=shutil.ignore_patterns(".verified*"))
    return copy


def refused(folder: Path, code: str = "P203") -> PippinError:
    with pytest.raises(PippinError) as error:
        open_shards(folder, "train")
    assert error.value.code == code
    return error.value


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_writer_keeps_every_token(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    draw = np.random.default_rng(seed)
    documents = [draw.integers(0, 65_536, n).astype(np.uint32) for n in lengths]
    writer = SplitBuilder(folder, "train", "uint16", shard_tokens=shard_tokens)
    for ids in documents:
        writer.add(ids, np.array([len(ids)]), text_bytes=3, entropy_bits=0.5)
    info = writer.finish()
    assert (info.tokens, info.documents) == (sum(lengths), len(lengths))
    assert (info.text_bytes, info.entropy_bits) == (3 * len(lengths), 0.5 * len(lengths))
    assert all(f.items == shard_tokens for f in info.files[:-1])
    parts = [np.fromfile(folder / f.name, "<u2") for f in info.files]
    assert np.array_equal(np.concatenate(parts), np.concatenate(documents))
    offsets = np.fromfile(folder / info.offsets.name, "<i8")
    assert offsets.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert writer.max_id == max(int(ids.max()) for ids in documents)


def add_one(writer: SplitBuilder, token: int) -> None:
    writer.add(np.array([token], np.uint32), np.array([1]), text_bytes=1, entropy_bits=None)


def test_writer_refuses_an_id_that_would_wrap(tmp_path: Path) -> None:
    writer = SplitBuilder(tmp_path, "train", "uint16")
    with pytest.raises(PippinError) as error:
        add_one(writer, 70_000)
    assert error.value.code == "P204"
    writer = SplitBuilder(tmp_path, "val", "uint32")
    add_one(writer, 70_000)
    assert np.fromfile(tmp_path / writer.finish().files[0].name, "<u4").tolist() == [70_000]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(0, 50), max_size=4))
def test_stream_reads_any_range(data: st.DataObject, cuts: list[int]) -> None:
    ids = np.arange(50, dtype="<u2") * 7
    stream = TokenStream(np.split(ids, sorted(cuts)), vocab_size=400, text_bytes=1)
    start = data.draw(st.integers(0, 50))
    stop = data.draw(st.integers(start, 50))
    found = stream.tokens(start, stop)
    assert found.dtype == np.int32 and found.tolist() == ids[start:stop].tolist()
    places = np.array(data.draw(st.lists(st.integers(0, 49), max_size=12)), np.int64)
    for shape in ((-1,), (-1, 1), (-1, 2)) if len(places) % 2 == 0 else ((-1,), (-1, 1)):
        gathered = stream.gather(places.reshape(shape))
        assert gathered.dtype == np.int32 and gathered.shape == places.reshape(shape).shape
        assert gathered.ravel().tolist() == ids[places].tolist()


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 2000), max_size=6),
    starts=st.lists(st.integers(0, 1700), min_size=1, max_size=5),
    padding=st.integers(0, 60),
    fill=st.sampled_from([0, 1, 700, 1999]),
)
def test_stream_gathers_runs_across_files(
    cuts: list[int], starts: list[int], padding: int, fill: int
) -> None:
    ids = (np.arange(2000) * 37 % 2003).astype("<u2")
    weights = (np.arange(2000) % 5).astype(np.uint8)
    stream = TokenStream(
        np.split(ids, sorted(cuts)),
        weights=np.split(weights, sorted(cuts)),
        vocab_size=2003,
        text_bytes=1,
    )
    places = np.array(starts)[:, None] + np.arange(300)
    places[:, 300 - padding :] = fill
    places = np.append(places, np.arange(300)[None], axis=0)  # padding, then the first document
    assert np.array_equal(stream.gather(places), ids[places])
    assert np.array_equal(stream.gather_weights(places), weights[places])
    assert stream.trained_tokens == 1600


def test_stream_refuses_ranges_outside() -> None:
    for parts in ([np.arange(9)], [np.arange(4), np.arange(5)]):
        stream = TokenStream(parts, vocab_size=9, text_bytes=1)
        with pytest.raises(IndexError):
            stream.tokens(3, 10)
        with pytest.raises(IndexError):
            stream.gather(np.array([[7, 9]], np.int64))
        with pytest.raises(IndexError):
            stream.gather(np.array([-1], np.int64))


def test_text_comes_back_byte_for_byte(made: Prepared) -> None:
    text = b""
    for split in ("train", "val", "test"):
        stream = open_shards(made.folder, split)  # type: ignore[arg-type]
        text += made.tokenizer.decode_bytes(stream.tokens(0, stream.num_tokens).tolist())
    assert text == TEXT.encode()


def test_manifest_counts(made: Prepared) -> None:
    train = open_shards(made.folder, "train", tokenizer=made.tokenizer.fingerprint)
    assert train.text_bytes == train.num_tokens - 1  # one document, one `</s>`
    assert train.entropy_bits_per_byte is None
    assert document_offsets(made.folder, "train").tolist() == [0, train.num_tokens]
    assert made.manifest.text_bytes == len(TEXT)
    assert made.manifest.max_id == made.tokenizer.eos_id


@pytest.mark.parametrize("name", ["train_00000.bin", "train_offsets.bin"])
@pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
def test_a_flipped_bit_is_found(folder: Path, name: str, place: float) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    error = refused(folder)
    assert f"{name}: its sha256 differs" in error.found
    assert str(folder) in error.remedy


def test_a_bit_flipped_after_verification_is_found(folder: Path) -> None:
    open_shards(folder, "train")
    path = folder / "train_00000.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 64
    path.write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_and_missing_files_are_found(folder: Path, verify: bool) -> None:
    path = folder / "train_00000.bin"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PippinError, match="bytes instead of"):
        open_shards(folder, "train", verify=verify)
    path.unlink()
    with pytest.raises(PippinError, match="is missing"):
        open_shards(folder, "train", verify=verify)


def test_every_change_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    good = path.read_text()
    data = json.loads(good)
    changes = [
        {**data, "max_id": 1},
        {**data, "tokenizer": {**data["tokenizer"], "vocab_size": 10**6}},
        {**data, "splits": {**data["splits"], "train": data["splits"]["val"]}},
        {**data, "digest": "0" * 64},
        {**data, "version": 3},
        {**data, "new": 1},
        {k: v for k, v in data.items() if k != "splits"},
        [],
    ]
    for changed in changes:
        path.write_text(json.dumps(changed))
        refused(folder)
    for text in ("", good[: len(good) // 2], "[" * 100_000):
        path.write_text(text)
        refused(folder)
    path.unlink()
    refused(folder)


def test_names_that_leave_the_folder_are_refused(folder: Path) -> None:
    manifest = load_manifest(folder)
    train = manifest.splits["train"]
    file = train.files[0].model_copy(update={"name": "../copy/train_00000.bin"})
    splits = {**manifest.splits, "train": train.model_copy(update={"files": (file,)})}
    (folder / "manifest.json").write_text(manifest.model_copy(update={"splits": splits}).text())
    assert "../copy" in refused(folder).found


def test_another_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(PippinError) as error:
        open_shards(folder, "train", tokenizer="ab" * 32)
    assert error.value.code == "P301"
    assert "abababab" in error.value.found


def test_ids_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    manifest = load_manifest(folder).model_copy(update={"max_id": 261})
    (folder / "manifest.json").write_text(manifest.text())
    refused(folder, "P204")


def test_verified_once_and_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shards(folder, "train")
    monkeypatch.setattr(shards, "file_sha256", lambda path: "not computed")
    open_shards(folder, "train")
    os.utime(folder / "train_00000.bin", ns=(1, 1))
    refused(folder)


def test_a_broken_record_of_verification_is_ignored(folder: Path) -> None:
    (folder / ".verified.json").write_text("[" * 10)
    assert open_shards(folder, "train").num_tokens > 0


def test_the_remedy_for_damage_can_be_typed(made: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    shutil.copytree(made.folder, folder)
    (folder / "manifest.json").write_text("{")
    command = refused(folder).remedy.partition("   (")[0]
    assert shlex.split(command) == ["rm", "-r", str(folder)]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_shards_of_another_kind_of_tokenizer_say_which(folder: Path, kind: str) -> None:
    with pytest.raises(PippinError) as error:
        prepare(folder, shards_dir=folder.parent, seq_len=16, seed=1, tokenizer=kind)
    assert error.value.code == "P301"
    assert error.value.found.splitlines()[1].split() == ["given:", kind]
    assert prepare(folder, shards_dir=folder.parent, seq_len=16, seed=1, tokenizer="byte").reused


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": "pippin-tokenizer"}', None])
def test_a_damaged_tokenizer_of_given_shards_is_damage_of_the_folder(
    folder: Path, content: bytes | None
) -> None:
    """Another data.tokenizer would not help."""
    path = folder / "tokenizer.pippin.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PippinError) as error:
        prepare(folder, shards_dir=folder.parent, seq_len=16, seed=1)
    assert error.value.code == "P203" and "tokenizer.pippin.json" in error.value.found
    assert error.value.remedy.startswith(f"rm -r {folder}")
