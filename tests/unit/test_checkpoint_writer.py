"""Tensors large enough for threads and early flushes: every byte, every error, little memory.

Run: python -m pytest tests/unit/test_checkpoint_writer.py
"""

import errno
import gc
import hashlib
import os
import time
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import writer
from core.errors import PippinError
from tests.checkpoint_helpers import OPEN, SUFFIXES, WRITE, tiny_meta

# Around the size from which sha256 has a thread, in float32 elements, and around a chunk.
SIZES = {"a": 3, "b": (1 << 16) - 1, "c": 1 << 16, "d": (1 << 18) + 1, "e": 5}


def tensors() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    for name, size in SIZES.items():
        yield f"{name}.weight", rng.standard_normal(size, np.float32)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_large_tensors_by_independent_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """zipfile compares the CRCs, hashlib the meta's checksums."""
    flushed: list[int] = []
    real = writer.early_flush

    def watched(fd: int, num_bytes: int) -> None:
        flushed.append(os.fstat(fd).st_size)
        real(fd, num_bytes)

    monkeypatch.setattr(writer, "_FLUSH_BYTES", 1 << 16)
    monkeypatch.setattr(writer, "early_flush", watched)
    path = WRITE[suffix](tmp_path / f"x{suffix}", tiny_meta(), tensors())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        stored = {i.filename: archive.read(i) for i in archive.infolist()}
    ckpt = OPEN[suffix](path)
    for (name, value), member in zip(tensors(), stored.values()):
        assert member.endswith(value.tobytes())
        assert ckpt.meta.checksums[name] == hashlib.sha256(value.tobytes()).hexdigest()
        np.testing.assert_array_equal(ckpt.read(name), value)
    assert list(ckpt.meta.checksums) == list(ckpt.names) == [n for n, _ in tensors()]
    assert flushed and flushed[0] < path.stat().st_size, "flushed while it is written"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_how_it_is_written_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Threads, flushes and short writes change no byte."""
    plain = WRITE[suffix](tmp_path / f"a{suffix}", tiny_meta(), tensors()).read_bytes()
    real = os.write
    monkeypatch.setattr(writer, "_THREAD_BYTES", 1 << 40)
    monkeypatch.setattr(writer, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 10_007)
    monkeypatch.setattr(writer.os, "write", lambda fd, data: real(fd, data[:4999]))
    other = WRITE[suffix](tmp_path / f"b{suffix}", tiny_meta(), tensors()).read_bytes()
    assert other == plain


@pytest.mark.parametrize("first_tensors", [1, 4])
def test_a_failed_early_flush_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_tensors: int
) -> None:
    """The system reports lost data to one flush alone; a later one would succeed."""

    def fail(fd: int, num_bytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    some = list(tensors())[-first_tensors - 1 :]
    monkeypatch.setattr(writer, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(writer, "early_flush", fail)
    with pytest.raises(PippinError, match=r"P307.*errno 5") as error:
        WRITE[".npz"](tmp_path / "x.npz", tiny_meta(), some)
    assert error.value.code == "P307" and not list(tmp_path.iterdir())


def test_two_tensors_are_held_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the hashing is."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    real = hashlib.sha256

    def slow(data: bytes) -> object:
        if len(data) > 1 << 18:
            time.sleep(0.03)
        return real(data)

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for i in range(6):
            value = np.full((1 << 16) + 1, i, np.float32)
            alive.append(weakref.ref(value))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"w{i}.weight", value
            del value

    monkeypatch.setattr(writer.hashlib, "sha256", slow)
    WRITE[".npz"](tmp_path / "x.npz", tiny_meta(), stream())
    assert most <= 2
