"""The run folder: its name, its lock, what may be written into it.

One process trains in a folder at a time (an advisory lock that the system releases when the process
dies). A folder that holds a checkpoint is never written without `--resume` or `--overwrite`, and only
what a run wrote is ever removed from it.
"""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import IO

from core.checkpoint import clean_temporaries, list_checkpoints
from core.config.schema import SECTIONS
from core.durable import flush_to_disk
from core.errors import PippinError
from core.paths import BEST_FILES, TOKENIZER_FILES, is_safe_name
from core.training.disk import disk_error

RUNS_DIR = Path("checkpoints")
LOCK_NAME = ".lock"
# What a run writes besides its checkpoints; a fresh start removes these and nothing else.
OWN_FOLDERS = ("logs", "samples", "plots")
OWN_FILES = (
    "config.json",
    "training_state.json",
    "training_report.md",
    "model_card.md",
    *TOKENIZER_FILES,
    "logs/metrics.jsonl",
    "logs/final_training_summary.json",
    "samples/samples.jsonl",
    "plots/loss.png",
)
TENSORBOARD = Path("logs") / "tensorboard"


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
    names = run_names()
    raise PippinError(
        "P302",
        f"no run is called {name_or_path!r}.",
        choices=names,
        remedy="ls checkpoints" if names else "python train.py   (there is no run yet)",
        kept="nothing was changed.",
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
        self._made: list[Path] = []

    @property
    def logs(self) -> Path:
        """Folder of metrics and summaries."""
        return self.path / "logs"

    def __enter__(self) -> "RunFolder":
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
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
        if error is not None:
            self._remove_if_empty()
        self._release()

    def _remove_if_empty(self) -> None:
        """Take back folders that this run made and wrote nothing into, so that no name is taken."""
        if not self._made or {p.name for p in self.path.iterdir()} != {LOCK_NAME, self.logs.name}:
            return
        with contextlib.suppress(OSError):  # the logs are not empty, or another run came in
            self.logs.rmdir()
            (self.path / LOCK_NAME).unlink()
            for folder in self._made:
                folder.rmdir()

    def _not_writable(self, error: OSError) -> PippinError:
        return disk_error(self.path, error, kept="nothing was started.")

    def _acquire(self) -> None:
        path = self.path / LOCK_NAME
        try:
            handle = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise self._not_writable(error) from error
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
                flush_to_disk(handle.fileno())
        finally:
            probe.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self, *, keep: Collection[Path] = ()) -> None:
        """Remove what an earlier run wrote here, and nothing else, for a fresh start.

        Args:
            keep: Checkpoints that stay: the one that is being read.

        Raises:
            PippinError: P311 if this is no run's folder, P312 if a file cannot be removed.
        """
        refuse_existing(self.path, overwrite=True)
        kept = {path.resolve() for path in keep}
        own = [self.path / name for name in (*BEST_FILES, *OWN_FILES)]
        try:
            for path in (*list_checkpoints(self.path), *own):
                if path.resolve() not in kept:
                    path.unlink(missing_ok=True)
            for path in (self.path / TENSORBOARD).glob("events.out.tfevents.*"):
                path.unlink(missing_ok=True)
            for name in (TENSORBOARD, *OWN_FOLDERS):
                with contextlib.suppress(OSError):  # absent, or it holds something of the user's
                    (self.path / name).rmdir()
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from error


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it holds checkpoints, or the configuration of a run."""
    if list_checkpoints(path) or any((path / name).is_file() for name in BEST_FILES):
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and set(config) == set(SECTIONS)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse a fresh start in a folder that holds a run, or files of others by a run's names.

    Args:
        path: Run folder to be; need not exist.
        overwrite: Whether an earlier run may be removed.

    Raises:
        PippinError: P311, naming what mends it.
    """
    if not is_run(path):
        foreign = [n for n in (*OWN_FILES, str(TENSORBOARD)) if (path / n).exists()]
        if foreign:
            raise PippinError(
                "P311",
                f"{path} is not a run's folder, and a run would write over {foreign[0]} in it.",
                found="--overwrite removes what a run wrote, never anything else.",
                remedy="another --save-dir, or leave it out: a free name is taken",
                kept="nothing was changed.",
            )
        return
    held = [p.name for p in list_checkpoints(path)]
    held += [name for name in BEST_FILES if (path / name).is_file()]
    if held and not overwrite:
        target = shlex.quote(str(path if list_checkpoints(path) else path / held[0]))
        raise PippinError(
            "P311",
            f"{path} already holds a run.",
            found=f"newest: {held[0]}",
            remedy=f"python train.py --resume {target}   or add --overwrite to start anew there",
            kept="nothing was changed.",
        )


def _owner(text: str) -> str:
    try:
        data = json.loads(text)
        return f" by process {data['pid']} on {data['host']}"
    except (ValueError, KeyError, TypeError):
        return " by another process"
