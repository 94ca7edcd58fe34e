"""What a view of a run reads, from outside: its process and its figures. Never writes anything.

The run's lock names its process; `logs/metrics.jsonl` is read from where the last look ended. A
figure that was not logged is absent.
"""

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from core.machine.system import (
    GpuMemory,
    ProcessMemory,
    SystemMemory,
    gpu_memory,
    process_memory,
    system_memory,
)
from core.training.runfolder import LOCK_NAME
from core.training.runlog import METRICS_NAME

METRICS_PATH = Path("logs") / METRICS_NAME
# A process that began this much later than the lock was written has only inherited its number.
_CLOCK_SLACK_S = 5.0
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class RunStatus:
    """The run's process: running, or why there is nothing to see.

    Attributes:
        state: "running", "ended", "elsewhere" (another machine trains it) or "unknown".
        pid: Its process, where the lock names one.
        host: Its machine.
        process: Its memory, where it runs here.
    """

    state: str
    pid: int | None = None
    host: str | None = None
    process: ProcessMemory | None = None


@dataclass(frozen=True)
class Snapshot:
    """One look at everything.

    Attributes:
        system: The machine's memory.
        gpu: What the GPU may use, None without one.
        run: Run folder, None where there is no run.
        status: Its process.
        metrics: The newest value of every figure the run logged, and of `step` and `timestamp`.
    """

    system: SystemMemory
    gpu: GpuMemory | None
    run: Path | None
    status: RunStatus
    metrics: dict[str, Any]


class MetricsTail:
    """Reads rows as they are appended; notices when the file is cut or replaced (a resume)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._identity: tuple[int, int] | None = None
        self.latest: dict[str, Any] = {}

    def poll(self) -> list[dict[str, Any]]:
        """New complete rows. `latest` keeps the newest value of every key."""
        try:
            with self._path.open("rb") as handle:
                rows = self._read(handle)
        except OSError:
            return []
        for row in rows:
            self.latest.update(row)
        return rows

    def _read(self, handle: IO[bytes]) -> list[dict[str, Any]]:
        stat = os.fstat(handle.fileno())
        identity = (stat.st_dev, stat.st_ino)
        if identity != self._identity or stat.st_size < self._offset:
            self._identity, self._offset, self.latest = identity, 0, {}
        handle.seek(self._offset)
        rows: list[dict[str, Any]] = []
        while data := handle.read(_READ_BYTES):
            end = data.rfind(b"\n") + 1
            if end == 0:  # a torn last line: its rest comes later
                break
            rows += _rows(data[:end])
            self._offset += end
            handle.seek(self._offset)
        return rows


def _rows(data: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append({k: v for k, v in row.items() if _is_figure(v)})
    return rows


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def newest_run(runs_dir: Path) -> Path | None:
    """The run whose figures or lock were written last, None where there is no run."""
    found = []
    for folder in runs_dir.iterdir() if runs_dir.is_dir() else ():
        times = [
            path.stat().st_mtime
            for path in (folder / METRICS_PATH, folder / LOCK_NAME)
            if path.is_file()
        ]
        if times:
            found.append((max(times), folder))
    return max(found)[1] if found else None


def run_status(
    run: Path,
    *,
    read_process: Callable[[int], ProcessMemory | None] = process_memory,
    host: str | None = None,
) -> RunStatus:
    """The process that the run's lock names, if it is still that process.

    Args:
        run: Run folder.
        read_process: Source of a process's memory.
        host: Name of this machine; by default found out.
    """
    try:
        lock = json.loads((run / LOCK_NAME).read_text(encoding="utf-8"))
        pid, started, where = int(lock["pid"]), float(lock["started"]), str(lock["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return RunStatus("unknown")
    if where != (platform.node() if host is None else host):
        return RunStatus("elsewhere", pid, where)
    process = read_process(pid)
    if process is None or process.started > started + _CLOCK_SLACK_S:
        return RunStatus("ended", pid, where)
    return RunStatus("running", pid, where, process)


class Watch:
    """Looks again and again at the machine and a run."""

    def __init__(self, run: Path | None) -> None:
        self.run = run
        self._tail = None if run is None else MetricsTail(run / METRICS_PATH)

    def look(self) -> Snapshot:
        """Everything as it is now."""
        system = system_memory()
        metrics: dict[str, Any] = {}
        status = RunStatus("unknown")
        if self.run is not None and self._tail is not None:
            self._tail.poll()
            metrics = dict(self._tail.latest)
            status = run_status(self.run)
        return Snapshot(system, gpu_memory(system), self.run, status, metrics)


def as_object(snapshot: Snapshot, now: float) -> dict[str, Any]:
    """A JSON object; what is not known is absent."""
    system, gpu, status = snapshot.system, snapshot.gpu, snapshot.status
    out: dict[str, Any] = {"timestamp": now, "system": _present(vars(system))}
    if gpu is not None:
        out["gpu"] = _present(vars(gpu))
    if snapshot.run is not None:
        process = status.process
        out["run"] = _present(
            {
                "folder": str(snapshot.run),
                "state": status.state,
                "pid": status.pid,
                "host": status.host,
                "process": None
                if process is None
                else _present({**vars(process), "memory_bytes": process.memory_bytes}),
                "metrics": snapshot.metrics,
            }
        )
    return out


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}
