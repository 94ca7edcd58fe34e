"""The run folder: its name, its lock, what may be written into it.

One process trains in a folder at a time (an advisory lock that the system releases when the process
dies). A folder that holds a checkpoint is never written without `--resume` or `--overwrite`.
"""

import contextlib
import json
import os
import platform
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from core.checkpoint import clean_temporaries, list_checkpoints
from core.errors import PippinError
from core.paths import is_safe_name

try:
    import fcntl
except ImportError:  # Windows has no flock; the lock file's pid is then the only guard
    fcntl = None  # type: ignore[assignment]

RUNS_DIR = Path("checkpoints")
LOCK_NAME = ".lock"
# What a run writes; `--overwrite` removes these and nothing else.
OWN_FOLDERS = ("logs", "samples", "plots")
OWN_FILES = (
    "config.json",
    "training_state.json",
    "training_report.md",
    "model_card.md",
    "tokenizer.model",
    "tokenizer.json",
)


def next_free_name(stem: str, runs_dir: Path = RUNS_DIR) -> Path:
    """`checkpoints/<stem>-N` with the lowest N from 1 that is not taken."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).strip("._-")[:48] or "run"
    if not safe.isascii():
        safe = safe.encode("ascii", "replace").decode().replace("?", "x")
    taken = {p.name.casefold() for p in runs_dir.glob("*")} if runs_dir.is_dir() else set()
    n = 1
    while f"{safe}-{n}".casefold() in taken:
        n += 1
    return runs_dir / f"{safe}-{n}"


def find_run(name_or_path: str) -> Path:
    """A run folder by name (below ./checkpoints) or by path.

    Raises:
        PippinError: P302 if there is none; lists the runs that exist.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if is_safe_name(name_or_path) and (RUNS_DIR / name_or_path).is_dir():
        return RUNS_DIR / name_or_path
    raise PippinError(
        "P302", f"no run is called {name_or_path!r}.", choices=run_names(), kept="nothing changed."
    )


def run_names(runs_dir: Path = RUNS_DIR) -> tuple[str, ...]:
    """Names of the runs that hold a checkpoint, newest first."""
    if not runs_dir.is_dir():
        return ()
    found = [p for p in runs_dir.iterdir() if p.is_dir() and list_checkpoints(p)]
    return tuple(p.name for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True))


class RunFolder:
    """A locked, writable run folder; a context manager that releases the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def logs(self) -> Path:
        """Folder of metrics and summaries."""
        return self.path / "logs"

    def __enter__(self) -> "RunFolder":
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from error
        self._acquire()
        try:
            self._probe()
        except OSError as error:
            self._release()
            raise self._not_writable(error) from error
        clean_temporaries(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _not_writable(self, error: OSError) -> PippinError:
        free = ""
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(next(p for p in self.path.absolute().parents if p.exists()))
            free = f"{usage.free / 1e9:.1f} GB are free on its disk."
        return PippinError(
            "P312",
            f"the run folder {self.path} cannot be written: {error.strerror or error}.",
            found=free,
            remedy="python train.py --save-dir FOLDER   (another place)",
            kept="nothing was started.",
        )

    def _acquire(self) -> None:
        path = self.path / LOCK_NAME
        try:
            handle = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise self._not_writable(error) from error
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.seek(0)
                owner = _owner(handle.read())
                handle.close()
                raise PippinError(
                    "P310",
                    f"the run folder {self.path} is in use{owner}.",
                    remedy="wait for it, stop it, or give another --save-dir",
                    kept="nothing was started.",
                ) from error
        handle.seek(0)
        handle.truncate()
        json.dump({"pid": os.getpid(), "started": time.time(), "host": platform.node()}, handle)
        handle.flush()
        self._lock = handle

    def _probe(self) -> None:
        probe = self.path / f".probe-{os.getpid()}"
        try:
            with probe.open("wb") as handle:
                handle.write(b"0" * 65_536)
                handle.flush()
                os.fsync(handle.fileno())
        finally:
            probe.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Remove what an earlier run wrote here (`--overwrite`), and nothing else."""
        for path in list_checkpoints(self.path):
            path.unlink()
        for pattern in ("best.npz", "best.pt", *OWN_FILES):
            (self.path / pattern).unlink(missing_ok=True)
        for name in OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.logs.mkdir(parents=True, exist_ok=True)


def refuse_existing(path: Path) -> None:
    """Refuse a folder that holds a checkpoint, naming both flags.

    Raises:
        PippinError: P311.
    """
    if path.is_dir() and list_checkpoints(path):
        raise PippinError(
            "P311",
            f"{path} already holds a run.",
            found=f"newest: {list_checkpoints(path)[0].name}",
            remedy=f"python train.py --resume {path}   or add --overwrite to start anew there",
            kept="nothing was changed.",
        )


def _owner(text: str) -> str:
    try:
        data = json.loads(text)
        return f" by process {data['pid']} on {data['host']}"
    except (ValueError, KeyError, TypeError):
        return " by another process"
