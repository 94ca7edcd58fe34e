"""A published checkpoint is complete or absent, and the newest that verifies is the truth.

Run: python -m pytest tests/unit/test_checkpoint_folder.py
"""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import (
    atomic,
    clean_temporaries,
    link_best,
    list_checkpoints,
    newest_valid,
    prune,
    verify,
)
from core.errors import PippinError
from tests.checkpoint_helpers import OPEN, SUFFIXES, WRITE, tiny_meta, tiny_tensors, write_tiny

ROOT = Path(__file__).resolve().parents[2]


def open_any(path: Path):
    return OPEN[path.suffix](path)


def test_list_is_by_step_and_ignores_everything_else(tmp_path: Path) -> None:
    for name in ("step_000500.npz", "step_1000000.npz", "step_000900.pt", "step_000100.pt"):
        (tmp_path / name).touch()
    for name in ("best.npz", ".tmp-1-step_000999.npz", "step_000999.npz.part", "step_9.npz"):
        (tmp_path / name).touch()
    (tmp_path / "step_000998.npz").mkdir()
    os.utime(tmp_path / "step_000100.pt", (2e9, 2e9))
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["step_1000000.npz", "step_000900.pt", "step_000500.npz", "step_000100.pt"]
    assert list_checkpoints(tmp_path / "nowhere") == ()


def test_newest_valid_skips_damage_and_says_so(tmp_path: Path) -> None:
    assert newest_valid(tmp_path, open_any) is None
    for step, suffix in ((100, ".npz"), (200, ".pt"), (300, ".npz"), (400, ".npz")):
        write_tiny(tmp_path / f"step_{step:06d}{suffix}", step=step)
    damaged = tmp_path / "step_000300.npz"
    values = tiny_tensors()["ema/layers.0.input_layernorm.weight"].tobytes()
    whole = damaged.read_bytes()
    damaged.write_bytes(whole.replace(values, bytes(len(values))))
    cut = tmp_path / "step_000400.npz"
    cut.write_bytes(cut.read_bytes()[:1000])
    found = newest_valid(tmp_path, open_any)
    assert found is not None
    path, problems = found
    assert path.name == "step_000200.pt"
    assert len(problems) == 2
    assert "step_000400.npz" in problems[0] and "1,000 bytes" in problems[0]
    assert "step_000300.npz" in problems[1] and "ema/layers.0.input_layernorm.weight" in problems[1]
    for file in list_checkpoints(tmp_path):
        file.write_bytes(b"PK")
    with pytest.raises(PippinError) as caught:
        newest_valid(tmp_path, open_any)
    assert len(caught.value.found.splitlines()) == 4


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    paths = [write_tiny(tmp_path / f"step_{s:06d}.npz", step=s) for s in (1, 2, 3, 4, 5)]
    best = link_best(paths[0], tmp_path / "best.npz")
    gone = prune(tmp_path, 2, protect=[paths[1]])
    assert sorted(p.name for p in gone) == ["step_000001.npz", "step_000003.npz"]
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step_000005.npz",
        "step_000004.npz",
        "step_000002.npz",
    ]
    verify(open_any(best))
    assert prune(tmp_path, 0) and len(list_checkpoints(tmp_path)) == 1, "one is always kept"


@pytest.mark.parametrize("links", [True, False])
def test_link_best_replaces_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "no hard links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    first = write_tiny(tmp_path / "step_000001.npz", seed=1)
    second = write_tiny(tmp_path / "step_000002.npz", seed=2)
    best = tmp_path / "best.npz"
    for source in (first, first, second):
        assert link_best(source, best) == best
        assert best.read_bytes() == source.read_bytes()
        assert best.samefile(source) == links
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(PippinError) as caught:
        link_best(tmp_path / "gone.npz", best)
    assert caught.value.code == "P307"
    assert best.read_bytes() == second.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_leaves_the_old_file(
    tmp_path: Path, suffix: str, error: BaseException
) -> None:
    path = write_tiny(tmp_path / f"a{suffix}")
    before = path.read_bytes()

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield "a.weight", np.zeros((300, 300), np.float32)
        raise error

    expected = PippinError if isinstance(error, Exception) else type(error)
    with pytest.raises(expected) as caught:
        WRITE[suffix](path, tiny_meta(), tensors())
    if isinstance(caught.value, PippinError):
        assert caught.value.code == "P307"
        assert "device lost" in caught.value.what
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


DISK_FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.checkpoint_helpers import WRITE, tiny_meta
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
path = Path(sys.argv[1])
tensors = [(f"layers.{i}.weight", np.ones((256, 256), np.float32)) for i in range(8)]
try:
    WRITE[path.suffix](path, tiny_meta(), tensors)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("limit", [0, 100_000, 1_000_001])
def test_a_full_disk_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, suffix: str, limit: int
) -> None:
    path = write_tiny(tmp_path / f"step_000500{suffix}")
    before = path.read_bytes()
    out = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(path), str(limit)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.startswith("PippinError P307"), out
    assert os.strerror(errno.EFBIG) in out
    assert "bytes free" in out
    assert "as it was before" in out
    assert path.read_bytes() == before
    verify(open_any(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PippinError) as caught:
        write_tiny(tmp_path / "no" / "a.npz")
    assert caught.value.code == "P307"
    assert os.strerror(errno.ENOENT) in caught.value.what


def test_clean_temporaries_spares_the_living(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    try:
        living = tmp_path / f".tmp-{child.pid}-step_000001.npz"
        orphan = tmp_path / f".tmp-{dead.pid}-step_000001.npz"
        reused = tmp_path / f".tmp-{os.getpid()}-step_000002.npz"
        others = [tmp_path / ".tmp-x-a", tmp_path / "step_000001.npz", tmp_path / ".tmp-1"]
        for path in (living, orphan, reused, *others):
            path.touch()
        with atomic.atomic_file(tmp_path / "step_000003.npz"):
            assert set(clean_temporaries(tmp_path)) == {orphan, reused}
    finally:
        child.kill()
        child.wait()
    assert (tmp_path / "step_000003.npz").exists()
    assert living.exists() and all(p.exists() for p in others)


def test_a_left_over_hard_link_is_never_truncated(tmp_path: Path) -> None:
    good = write_tiny(tmp_path / "step_000001.npz")
    before = good.read_bytes()
    left = atomic.temporary_path(tmp_path / "best.npz")
    left.hardlink_to(good)
    with atomic.atomic_file(tmp_path / "best.npz") as fd:
        os.write(fd, b"new")
    assert good.read_bytes() == before


def test_the_file_is_flushed_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        events.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        real_fsync(fd)

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    write_tiny(tmp_path / "a.npz")
    assert events == ["fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize("supported", [True, False])
def test_macos_asks_the_drive_itself(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    calls: list[object] = []

    def fake_fcntl(fd: int, command: int) -> int:
        calls.append(command)
        if not supported:
            raise OSError(errno.ENOTSUP, "network volume")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fake_fcntl)
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    atomic.flush_to_disk(7)
    assert calls == ([51] if supported else [51, "fsync"])
