"""Damage is found before it is used, and no file can run code or ask for absurd memory.

Run: python -m pytest tests/unit/test_checkpoint_damage.py
"""

import io
import json
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from backends.torch_common.checkpoint import PtEnvelope
from core.checkpoint import Meta, verify, write_archive
from core.checkpoint.npz import NpzEnvelope, npy_header
from core.errors import PippinError
from tests.checkpoint_helpers import OPEN, SUFFIXES, WRITE, tiny_meta, tiny_tensors, write_tiny

REFUSED = {"P303", "P305", "P306"}


def read_all(path: Path) -> None:
    ckpt = OPEN[path.suffix](path)
    try:
        verify(ckpt)
    finally:
        ckpt.close()


def refusal(path: Path) -> PippinError:
    with pytest.raises(PippinError) as caught:
        read_all(path)
    return caught.value


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_found(tmp_path: Path, suffix: str) -> None:
    whole = write_tiny(tmp_path / f"a{suffix}").read_bytes()
    cut = tmp_path / f"cut{suffix}"
    sizes = {len(whole) * i // 16 for i in range(16)} | {len(whole) - n for n in (1, 22, 98)}
    for size in sorted(sizes):
        cut.write_bytes(whole[:size])
        error = refusal(cut)
        assert error.code == "P303", f"cut to {size} bytes"
        assert f"{size:,} bytes" in error.found
    cut.write_bytes(whole + b"\0")
    assert refusal(cut).code == "P303"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_flipped_bit_is_found(tmp_path: Path, suffix: str) -> None:
    path = write_tiny(tmp_path / f"a{suffix}")
    whole = path.read_bytes()
    read_all(path)
    flipped = tmp_path / f"flipped{suffix}"
    missed = []
    # Every byte of the file, headers and padding included, each at one of its bits.
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << (offset * 5 % 8)
        flipped.write_bytes(damaged)
        try:
            read_all(flipped)
            missed.append(offset)
        except PippinError as error:
            assert error.code in REFUSED
    assert missed == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_tensor_is_named(tmp_path: Path, suffix: str) -> None:
    path = write_tiny(tmp_path / f"a{suffix}")
    name = "optim/exp_avg_sq/embed_tokens.weight"
    values = tiny_tensors()[name].tobytes()
    whole = path.read_bytes()
    start = whole.index(values)
    path.write_bytes(whole[: start + 9] + bytes([whole[start + 9] ^ 4]) + whole[start + 10 :])
    error = refusal(path)
    assert error.code == "P303"
    assert name in error.found
    assert f"{len(whole):,} bytes" in error.found


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_swapped_tensors_are_found(tmp_path: Path, suffix: str) -> None:
    tensors = tiny_tensors()
    names = ("embed_tokens.weight", "optim/exp_avg_sq/embed_tokens.weight")
    path = write_tiny(tmp_path / f"a{suffix}")
    one, two = (tensors[n].tobytes() for n in names)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(one, b"?" * len(one)).replace(two, one))
    assert refusal(path).code == "P303"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_newer_format_is_refused(tmp_path: Path, suffix: str) -> None:
    assert refusal(write_tiny(tmp_path / f"a{suffix}", version=2)).code == "P305"


class Bomb:
    """A pickle that leaves a file behind where it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    import torch

    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb works"
    mark.unlink()
    path = tmp_path / "a.pt"
    torch.save({"meta": tiny_meta().to_json(), "tensors": {}, "x": Bomb(mark)}, path)
    assert refusal(path).code == "P306"
    torch.save(Bomb(mark), path, _use_new_zipfile_serialization=False)
    assert refusal(path).code == "P306"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    assert refusal(path).code == "P306"
    # The bomb behind the real beginning, in a zip that is right in every other way.
    path = write_archive(tmp_path / "b.pt", tiny_meta(), [], _PtBomb(mark))
    assert refusal(path).code in {"P303", "P306"}
    path = tmp_path / "a.npz"
    np.savez(path, **{"embed_tokens.weight": np.array([Bomb(mark)], dtype=object)})
    assert refusal(path).code == "P306"
    path = write_archive(path, tiny_meta(), tiny_tensors().items(), _ObjectHeaders())
    error = refusal(path)
    assert error.code == "P306"
    assert "Python objects" in error.found
    assert not mark.exists()


class _PtBomb(PtEnvelope):
    def __init__(self, mark: Path) -> None:
        self._bomb = pickle.dumps(Bomb(mark), protocol=2)[2:-1]

    def trailer(self, meta: Meta) -> list[tuple[str, bytes]]:
        *first, (name, content) = super().trailer(meta)
        return [*first, (name, content[:-2] + b"X\x01\x00\x00\x00x" + self._bomb + b"u.")]


class _ObjectHeaders(NpzEnvelope):
    def tensor_header(self, shape: tuple[int, ...], dtype: str) -> bytes:
        return npy_header("|O", shape)


class _AbsurdHeaders(NpzEnvelope):
    def tensor_header(self, shape: tuple[int, ...], dtype: str) -> bytes:
        return npy_header("<f4", (1 << 40, *shape))


def test_what_torch_saved_itself_is_foreign(tmp_path: Path) -> None:
    import torch

    torch.save({"meta": tiny_meta().to_json(), "tensors": {"a": torch.ones(3)}}, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt").code == "P306"


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **tiny_tensors())
    assert refusal(path).code == "P306"
    np.savez(path, __meta__=np.frombuffer(b'{"format": "other"}', np.uint8))
    assert refusal(path).code == "P306"
    path.write_bytes(b"not a zip at all")
    assert refusal(path).code == "P306"
    path.write_bytes(b"")
    assert refusal(path).code == "P303"
    path.unlink()
    assert refusal(path).code == "P306"
    for a, b in (SUFFIXES, SUFFIXES[::-1]):
        shutil.copy(write_tiny(tmp_path / f"own{a}"), tmp_path / f"wrong{b}")
        assert refusal(tmp_path / f"wrong{b}").code == "P306"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_compressed_members_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    source = write_tiny(tmp_path / f"a{suffix}")
    bomb = tmp_path / f"bomb{suffix}"
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for i, info in enumerate(old.infolist()):
            content = bytes(200_000_000) if i == 0 else old.read(info)
            new.writestr(info.filename, content)
    assert bomb.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        error = refusal(bomb)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert error.code == "P306"
    assert "compressed" in error.found


def test_absurd_sizes_are_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_archive(path, tiny_meta(), tiny_tensors().items(), _AbsurdHeaders())
    assert refusal(path).code == "P303"

    class AbsurdMeta(NpzEnvelope):
        def trailer(self, meta: Meta) -> list[tuple[str, bytes]]:
            values = json.loads(meta.to_json())
            del values["digest"]
            values["shapes"]["embed_tokens.weight"] = [1 << 40, 6]
            values["shapes"] = {k: tuple(v) for k, v in values["shapes"].items()}
            return list(super().trailer(Meta(**values)))

    write_archive(path, tiny_meta(), tiny_tensors().items(), AbsurdMeta())
    error = refusal(path)
    assert error.code == "P303"
    assert "embed_tokens.weight" in error.found


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a b", "optim/x", "a..b", "\u00e9", "ema/"]
)
def test_names_outside_the_allow_list_are_refused(tmp_path: Path, name: str) -> None:
    class BadName(NpzEnvelope):
        def tensor_member(self, index: int, _: str) -> str:
            return f"{name if name.isascii() else 'x'}.npy"

        def trailer(self, meta: Meta) -> list[tuple[str, bytes]]:
            values = {f: getattr(meta, f) for f in meta.__dataclass_fields__}
            for table in ("dtypes", "shapes", "checksums"):
                values[table] = dict.fromkeys([name], values[table]["a.weight"])
            return list(super().trailer(Meta(**values)))

    path = tmp_path / "a.npz"
    write_archive(path, tiny_meta(), [("a.weight", np.zeros(3, np.float32))], BadName())
    assert refusal(path).code == "P306"


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.npz")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("norm.weight.npy", b"")
        file.writestr("norm.weight.npy", b"")
    assert refusal(path).code in REFUSED


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_garbage_is_refused(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(5)
    path = tmp_path / f"a{suffix}"
    whole = write_tiny(path).read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 9)):
            at, count = rng.integers(0, len(whole)), rng.integers(1, 40)
            damaged[at : at + count] = rng.bytes(count)
        if bytes(damaged) == whole:
            continue
        path.write_bytes(damaged)
        assert refusal(path).code in REFUSED


def test_the_reader_keeps_the_file_it_opened(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.npz", seed=0)
    ckpt = OPEN[".npz"](path)
    write_tiny(path, seed=1)
    for name, array in tiny_tensors(0).items():
        assert ckpt.read(name).tobytes() == array.tobytes()
    with io.FileIO(path, "r+") as file:
        file.truncate(300)
    assert refusal(path).code == "P303"


def test_a_file_cut_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = WRITE[suffix](tmp_path / f"a{suffix}", tiny_meta(), tiny_tensors().items())
        ckpt = OPEN[suffix](path)
        with io.FileIO(path, "r+") as file:
            file.truncate(200)
        with pytest.raises(PippinError) as caught:
            verify(ckpt)
        assert caught.value.code == "P303"
