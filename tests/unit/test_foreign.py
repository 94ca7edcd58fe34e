"""Token files of other programs come in exactly, and what is damaged or dangerous is refused.

Every file is made by hand here with numpy and struct.
Run: pytest tests/unit/test_foreign.py
"""

import itertools
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.foreign import importing as foreign
from core.data.foreign.formats import FORMATS, detect, read_foreign
from core.data.foreign.importing import import_foreign
from core.data.sampling.mixture import MixtureItem, open_mixture
from core.data.shards.manifest import Manifest, load_manifest, open_shards
from core.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer
from core.errors import PippinError

BYTE = ByteTokenizer()
EOS = BYTE.eos_id


def text_ids(count: int, seed: int = 0) -> list[list[int]]:
    """Different documents of bytes, without an end."""
    draw = np.random.default_rng(seed)
    return [draw.integers(32, 127, draw.integers(5, 40)).tolist() for _ in range(count)]


def joined(documents: list[list[int]], eos: int = EOS) -> np.ndarray:
    return np.array([t for d in documents for t in [*d, eos]])


def bring(path: Path, out: Path, **options: Any) -> Manifest:
    return import_foreign(path, **{"tokenizer": BYTE, "out": out, **options})


def refused(path: Path, code: str, format: str | None = None) -> PippinError:
    with pytest.raises(PippinError) as error:
        read_foreign(path, format)
    assert error.value.code == code
    return error.value


def ids_of(folder: Path, split: str) -> list[int]:
    stream = open_shards(folder, split)  # type: ignore[arg-type]
    return stream.tokens(0, stream.num_tokens).tolist()


def documents_of(folder: Path, split: str) -> list[list[int]]:
    stream = open_shards(folder, split)  # type: ignore[arg-type]
    edges = stream.offsets.tolist()
    return [stream.tokens(a, b).tolist() for a, b in itertools.pairwise(edges)]


def llmc_file(path: Path, ids: Any, *, magic: int = 20240520, version: int = 1) -> Path:
    dtype = "<u2" if version == 1 else "<u4"
    header = struct.pack("<3i", magic, version, len(ids)) + bytes(253 * 4)
    path.write_bytes(header + np.asarray(ids).astype(dtype).tobytes())
    return path


def windows_of(stream: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as AnarchoBot writes them: each begins with the last target of the one before."""
    rows = (len(stream) - 1) // seq_len
    x = [stream[i * seq_len : (i + 1) * seq_len] for i in range(rows)]
    y = [stream[i * seq_len + 1 : (i + 1) * seq_len + 1] for i in range(rows)]
    return np.array(x, np.uint16), np.array(y, np.uint16)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_nanogpt(tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    train, val = text_ids(70), text_ids(9, 1)
    joined(train).astype(dtype).tofile(folder / "train.bin")
    joined(val).astype(dtype).tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch pippin_was_here'\ntR.")
    (folder / ".hidden.bin").write_bytes(b"x")
    (folder / "link.bin").symlink_to(folder / "val.bin")
    expected = "nanogpt" if dtype == "<u2" else "nanogpt-uint32"
    assert detect(folder) == expected
    lines: list[str] = []
    manifest = bring(
        folder, tmp_path / "out", shard_tokens=100, report=lambda *a: lines.append(a[1])
    )
    assert documents_of(tmp_path / "out", "train") == [[*d, EOS] for d in train]
    assert documents_of(tmp_path / "out", "val") == [[*d, EOS] for d in val]
    info = manifest.splits["train"]
    assert (info.documents, info.text_bytes) == (70, sum(map(len, train)))
    assert all(f.items == 100 for f in info.files[:-1]) and len(info.files) > 2
    notes = "\n".join(manifest.source.notes)
    assert "meta.pkl was ignored" in notes and "1 symbolic links" in notes
    assert ("uint32" in notes) == (dtype == "<u4")
    assert load_manifest(tmp_path / "out").content_sha256() == manifest.content_sha256()
    assert "79 documents" in lines[0] and not list(tmp_path.glob(".tmp*"))
    assert not Path("pippin_was_here").exists()
    mixture = open_mixture([MixtureItem(str(tmp_path / "out"))])
    assert mixture.train_parts("packed", 16, seed=1).streams[0].num_tokens == info.tokens


@pytest.mark.parametrize(("magic", "version"), [(20240520, 1), (20240801, 7)])
def test_llmc(tmp_path: Path, magic: int, version: int) -> None:
    """An end-of-document id stands before each document; text goes on from file to file."""
    folder = tmp_path / "fineweb"
    folder.mkdir()
    documents = text_ids(60)
    ids = np.array([t for d in documents for t in [EOS, *d]])
    for i, part in enumerate(np.split(ids, [333, 700])):
        name = f"fineweb_train_{i + 1:06d}.bin"
        llmc_file(folder / name, part, magic=magic, version=version)
    llmc_file(folder / "fineweb_val_000000.bin", [EOS, 65, 66], magic=magic, version=version)
    assert detect(folder) == "llmc"
    manifest = bring(folder, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == [[*d, EOS] for d in documents]
    assert documents_of(tmp_path / "out", "val") == [[65, 66, EOS]]
    assert manifest.source.notes == ()


def test_llmc_header_and_size_must_agree(tmp_path: Path) -> None:
    path = llmc_file(tmp_path / "a.bin", np.arange(50))
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    assert "50 tokens" in refused(path, "P203").found
    path.write_bytes(good + b"\0\0")
    refused(path, "P203")
    path.write_bytes(good[:8] + struct.pack("<i", -5) + good[12:])
    refused(path, "P203")
    path.write_bytes(good[:500])
    refused(path, "P202", "llmc")
    path.write_bytes(struct.pack("<2i", 20240520, 9) + good[8:])
    refused(path, "P202", "llmc")


def test_a_missing_file_ends_the_text(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        llmc_file(tmp_path / f"t_train_{number:06d}.bin", [65 + number] * 4)
    found = read_foreign(tmp_path)
    assert any("1 files are missing" in note for note in found.notes)
    bring(tmp_path, tmp_path.with_name("out"), val_fraction=0.0)
    assert documents_of(tmp_path.with_name("out"), "train") == [[65] * 4 + [66] * 4, [68] * 4]


def test_mypt(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    documents = {"train": text_ids(50), "val": text_ids(5, 1)}
    for split, kept in documents.items():
        (folder / split).mkdir(parents=True)
        for i, part in enumerate(np.array_split(joined(kept).astype("<u4"), 3)):
            part.tofile(folder / split / f"shard_{i:05d}.bin")
    (folder / "train" / "shard_00000_mask.bin").write_bytes(b"\1" * 9)
    (folder / "tokenizer_state.json").write_text(json.dumps({"token_kind": "gpt2", "chars": "x"}))
    (folder / "dataset_metadata.json").write_text("{broken")
    assert detect(folder) == "mypt"
    manifest = bring(folder, tmp_path / "out")
    for split, kept in documents.items():
        assert documents_of(tmp_path / "out", split) == [[*d, EOS] for d in kept]
    notes = "\n".join(manifest.source.notes)
    assert "token_kind gpt2" in notes and "masks are not read" in notes
    assert "dataset_metadata.json was ignored" in notes


@settings(max_examples=25, deadline=None)
@given(
    seq_len=st.integers(1, 9),
    sizes=st.lists(st.integers(12, 60), min_size=1, max_size=4),
    goes_on=st.booleans(),
    seed=st.integers(0, 99),
)
def test_anarchobot_stream_is_rebuilt(
    tmp_path_factory: pytest.TempPathFactory,
    seq_len: int,
    sizes: list[int],
    goes_on: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("anarcho")
    # No id twice, so that no two files seem to go on from each other by chance.
    ids = np.random.default_rng(seed).permutation(sum(sizes))
    parts, kept, at = [], [], 0
    for i, size in enumerate(sizes):
        x, y = windows_of(ids[at : at + size], seq_len)
        np.save(folder / f"shard_{i:05d}_x.npy", x)
        np.save(folder / f"shard_{i:05d}_y.npy", y)
        used = x.size + 1
        parts.append(ids[at : at + used].tolist())
        kept += ids[at : at + used].tolist() if not kept or not goes_on else parts[-1][1:]
        at += x.size if goes_on else used  # the last target is the next file's first token
    found = read_foreign(folder)
    assert found.format == "anarchobot" and set(found.splits) == {"train"}
    arrays = found.splits["train"]
    assert np.concatenate(arrays.parts).tolist() == kept
    starts = np.cumsum([0, *map(len, parts)])[:-1].tolist()
    assert arrays.breaks.tolist() == ([0] if goes_on else starts)


def anarcho(folder: Path, stream: np.ndarray, number: int = 0, seq_len: int = 8) -> Path:
    folder.mkdir(exist_ok=True)
    x, y = windows_of(stream, seq_len)
    np.save(folder / f"shard_{number:05d}_x.npy", x)
    np.save(folder / f"shard_{number:05d}_y.npy", y)
    return folder / f"shard_{number:05d}_x.npy"


def test_anarchobot_import_with_another_end(tmp_path: Path) -> None:
    """The foreign id 3 between documents becomes the tokenizer's own."""
    documents = [[t for t in d if t != 3] for d in text_ids(80)]
    stream = joined(documents, eos=3)
    anarcho(tmp_path / "d", stream)
    rows = (len(stream) - 1) // 8
    kept = stream[: rows * 8 + 1].tolist()
    notes = bring(tmp_path / "d", tmp_path / "plain", val_fraction=0.0).source.notes
    assert ids_of(tmp_path / "plain", "train") == kept
    assert any("ends no document" in n for n in notes) and any("--eos-id 3" in n for n in notes)
    manifest = bring(tmp_path / "d", tmp_path / "mapped", eos_id=3, val_fraction=0.0)
    assert ids_of(tmp_path / "mapped", "train") == [EOS if t == 3 else t for t in kept]
    assert manifest.splits["train"].text_bytes == sum(t != 3 for t in kept)
    assert manifest.splits["train"].documents == kept.count(3) + (kept[-1] != 3)


def test_anarchobot_pairs_that_contradict_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    x_path = anarcho(folder, np.arange(101))
    y_path = folder / "shard_00000_y.npy"
    x, y = np.load(x_path), np.load(y_path)
    wrong = y.copy()
    wrong[7, 3] += 1
    np.save(y_path, wrong)
    assert "row 7" in refused(folder, "P203").found
    np.save(y_path, y[:-1])
    refused(folder, "P203")
    y_path.unlink()
    assert "_y.npy is missing" in refused(folder, "P203").found
    assert "_y.npy is missing" in refused(x_path, "P203").found
    x_path.rename(y_path)
    refused(folder, "P203", "anarchobot")
    # Rows in another order: each run of rows is a text of its own.
    np.save(x_path, x[[0, 1, 5, 6]])
    np.save(y_path, y[[0, 1, 5, 6]])
    found = read_foreign(folder)
    assert np.concatenate(found.splits["train"].parts).tolist() == [*range(17), *range(40, 57)]
    assert found.splits["train"].breaks.tolist() == [0, 17]
    assert any("1 rows" in note for note in found.notes)


def test_gaps_in_the_numbers_are_told(tmp_path: Path) -> None:
    for number in (2, 3, 7):
        anarcho(tmp_path / "d", 1000 * number + np.arange(33), number)
    assert any("3 files are missing" in note for note in read_foreign(tmp_path / "d").notes)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_npz(tmp_path: Path, save: Any, dtype: Any) -> None:
    stream = joined(text_ids(60))
    x, y = windows_of(stream, 8)
    save(tmp_path / "data.npz", x=x.astype(dtype), y=y.astype(dtype), other=np.zeros(3))
    for path in (tmp_path, tmp_path / "data.npz"):
        found = read_foreign(path)
        assert found.format == "anarchobot"
        assert np.concatenate(found.splits["train"].parts).tolist() == stream[: x.size + 1].tolist()


def test_npz_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((2, 3), np.uint16))
    assert "x" in refused(path, "P203").choices
    np.savez(path, x=np.array([{}], object), y=np.zeros(3))
    refused(path, "P202")
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, "P203")
    # A header that promises a terabyte.
    head = b"{'descr': '<u2', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    head = head.ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(20)
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("x.npy", content)
            archive.writestr("y.npy", content)
        assert "2,000,000,000,000 bytes" in refused(path, "P203").found
    (tmp_path / "shard_00000_x.npy").write_bytes(content)
    (tmp_path / "shard_00000_y.npy").write_bytes(content)
    path.unlink()
    assert "2,000,000,000,000 bytes" in refused(tmp_path, "P203").found


def test_npy_of_other_kinds_is_refused(tmp_path: Path) -> None:
    x, y = tmp_path / "shard_00000_x.npy", tmp_path / "shard_00000_y.npy"
    good = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(y, good)
    for array in (
        good.astype(np.float32),
        good.astype(np.int64),
        np.asfortranarray(good),
        np.array([[{}]], object),
    ):
        np.save(x, array, allow_pickle=True)
        refused(tmp_path, "P202")
    for content in (
        b"",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x07\x00" + bytes(200),
        b"x" * 99,
    ):
        x.write_bytes(content)
        refused(tmp_path, "P202")
    x.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(tmp_path, "P202").remedy


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "shard_00000.mlx").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "run code" in refused(tmp_path, "P202").what
    refused(tmp_path / "shard_00000.mlx", "P202")
    refused(tmp_path, "P202", "anarchobot")


def test_dtypes_are_not_confused(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    ids = np.random.default_rng(1).integers(1, 50_000, 3000)
    ids.astype("<u4").tofile(path)
    assert "every second uint16 is 0" in refused(path, "P202", "nanogpt").found
    assert detect(path) == "nanogpt-uint32"
    ids.astype("<u2").tofile(path)
    assert detect(path) == "nanogpt"
    refused(path, "P202", "mypt")
    refused(path, "P202", "nanogpt-uint32")
    for size, format in ((5999, "nanogpt"), (5998, "mypt")):
        path.write_bytes(path.read_bytes()[:size])
        refused(path, "P203", format)
    np.zeros(100, "<u2").tofile(path)  # all of one id is no sign of uint32
    assert detect(path) == "nanogpt"


def test_a_file_alone_is_for_training(tmp_path: Path) -> None:
    path = llmc_file(tmp_path / "fineweb_val_000000.bin", joined(text_ids(80)))
    manifest = bring(path, tmp_path / "out", val_fraction=0.1)
    assert manifest.splits["train"].tokens > 5 * manifest.splits["val"].tokens > 0
    assert manifest.source.name == "fineweb_val_000000"


def test_nothing_to_read(tmp_path: Path) -> None:
    error = refused(tmp_path, "P201")
    assert all(name in error.found for name in FORMATS)
    refused(tmp_path / "none", "P201")
    refused(tmp_path, "P010", "other")
    (tmp_path / "train.bin").write_bytes(b"")
    refused(tmp_path, "P201")
    np.full(5, EOS, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(PippinError, match="holds no text"):
        bring(tmp_path, tmp_path / "out")
    (tmp_path / "manifest.json").write_text('{"format": "pippin-shards"}')
    refused(tmp_path, "P010")


def test_ids_beyond_the_tokenizer_are_refused(tmp_path: Path) -> None:
    ids = joined(text_ids(5))
    ids[37] = 9_999
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(PippinError) as error:
        bring(tmp_path, tmp_path / "out")
    assert error.value.code == "P204"
    assert "9,999" in error.value.what and "token 37 of train" in error.value.found
    assert [p.name for p in tmp_path.iterdir()] == ["train.bin"]
    with pytest.raises(PippinError) as error:
        bring(tmp_path, tmp_path / "out", eos_id=261)
    assert error.value.code == "P204"
    x = np.array([[5, -1, 6]], np.int32)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([[-1, 6, 7]], np.int32))
    with pytest.raises(PippinError) as error:
        bring(tmp_path / "a.npz", tmp_path / "out")
    assert error.value.code == "P204"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(50, 90), fraction=st.floats(0.05, 0.3))
def test_validation_is_drawn_from_whole_documents(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("draw")
    documents = text_ids(count, seed)
    documents += documents[:10]  # equal ones fall on one side
    joined(documents).astype("<u2").tofile(folder / "all.bin")
    manifest = bring(folder, folder / "out", val_fraction=fraction, seed=seed)
    train, val = (documents_of(folder / "out", s) for s in ("train", "val"))
    assert sorted(train + val) == sorted([*d, EOS] for d in documents)
    if manifest.source.whole_documents:
        assert not {tuple(d) for d in train} & {tuple(d) for d in val}
    share = manifest.splits["val"].tokens / manifest.tokens
    assert share == pytest.approx(fraction, abs=0.04)


def test_a_single_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "PIECE_TOKENS", 17)
    ids = np.random.default_rng(0).integers(32, 127, 1000)
    ids.astype("<u2").tofile(tmp_path / "all.bin")
    manifest = bring(tmp_path, tmp_path / "out", val_fraction=0.1, shard_tokens=64)
    assert ids_of(tmp_path / "out", "train") == ids[:900].tolist()
    assert ids_of(tmp_path / "out", "val") == ids[900:].tolist()
    assert not manifest.source.whole_documents
    assert manifest.splits["test"].tokens == 0
    assert open_shards(tmp_path / "out", "train").offsets.tolist() == [0, 900]


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    np.array([65, EOS, EOS, 66, EOS, EOS, EOS, 67], "<u2").tofile(tmp_path / "train.bin")
    manifest = bring(tmp_path, tmp_path / "out", val_fraction=0.0)
    assert documents_of(tmp_path / "out", "train") == [[65, EOS], [66, EOS], [67]]
    assert any("3 empty documents" in note for note in manifest.source.notes)


def test_wide_vocabularies_are_written_as_uint32(tmp_path: Path) -> None:
    wide = CharTokenizer("".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x14000)])))
    ids = np.array([70_000, 5, 70_001, wide.eos_id] * 30)
    ids.astype("<u4").tofile(tmp_path / "train.bin")
    manifest = bring(tmp_path, tmp_path / "out", tokenizer=wide, val_fraction=0.0)
    assert manifest.dtype == "uint32" and ids_of(tmp_path / "out", "train") == ids.tolist()
    assert manifest.splits["train"].text_bytes == 30 * (4 + 1 + 4)


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(text_ids(60)).astype("<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "taken").mkdir()
    with pytest.raises(PippinError) as error:
        bring(tmp_path, tmp_path / "taken")
    assert error.value.code == "P010"

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(foreign, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        bring(tmp_path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken", "train.bin"]


def test_documents_of_training_leave_validation_and_test(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    train, val, test = text_ids(100), text_ids(20, 1), text_ids(15, 2)
    joined(train).astype("<u2").tofile(folder / "train.bin")
    # The last one is the first of training too, without its end.
    leaky = np.append(joined([*train[:10], *val]), train[0])
    leaky.astype("<u2").tofile(folder / "val.bin")
    joined([*test[:5], *val[:4], *test[5:], *train[50:53]]).astype("<u2").tofile(
        folder / "test.bin"
    )
    manifest = bring(folder, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == [[*d, EOS] for d in train]
    assert documents_of(tmp_path / "out", "val") == [[*d, EOS] for d in val]
    assert documents_of(tmp_path / "out", "test") == [[*d, EOS] for d in test]
    notes = manifest.source.notes
    assert "11 validation documents that are also in training were left out" in notes
    assert "3 test documents that are also in training were left out" in notes
    assert "4 test documents that are also in validation were left out" in notes
    assert manifest.source.documents == 135
