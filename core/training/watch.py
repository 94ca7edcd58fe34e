"""What a view of a run reads, from outside: its process and its figures. Never writes anything.

The run's lock names its process; `logs/metrics.jsonl` is read from where the last look ended. A
figure that was not logged is absent.
"""

import glob
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.config.schema import RunConfig
from core.machine.memory import predict_training_memory
from core.machine.neighbours import OtherProcess, large_processes
from core.machine.pressure import PRESSURE_NAMES, memory_pressure, shares_memory
from core.machine.system import (
    GpuMemory,
    ProcessMemory,
    SystemMemory,
    gpu_memory,
    process_memory,
    system_memory,
)
from core.params import param_specs
from core.training.runfolder import LOCK_NAME
from core.training.runlog import METRICS_NAME

CONFIG_NAME = "config.json"
# Figures of which the largest is kept.
PEAKED = ("memory_process_bytes", "memory_active_bytes", "memory_peak_bytes")
METRICS_PATH = Path("logs") / METRICS_NAME
# A process that began this much later than the lock was written has only inherited its number.
_CLOCK_SLACK_S = 5.0
_READ_BYTES = 4 << 20
OTHERS_EVERY_S = 10.0


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
        peaks: The largest value of its memory figures.
        pressure: macOS's level of memory pressure, None elsewhere.
        plan: What its configuration predicts, None where it cannot be read.
        others: Other programs that hold much memory, the largest first.
        after: An earlier run of the same process, as in a sweep: what it left is counted too.
    """

    system: SystemMemory
    gpu: GpuMemory | None
    run: Path | None
    status: RunStatus
    metrics: dict[str, Any]
    peaks: dict[str, float] = field(default_factory=dict)
    pressure: int | None = None
    plan: "MemoryPlan | None" = None
    others: tuple[OtherProcess, ...] = ()
    after: str | None = None

    @property
    def run_bytes(self) -> int | None:
        """Memory of the run now, of the kind that its plan is about."""
        process = self.status.process
        device = self.metrics.get("memory_active_bytes")
        own = None if process is None else process.memory_bytes
        shared = self.plan is None or self.plan.is_shared
        known = [int(v) for v in ((own, device) if shared else (device,)) if v is not None]
        return max(known, default=None)

    @property
    def run_peak_bytes(self) -> int | None:
        """The most it had, as far as its log and this moment know."""
        names = ["memory_active_bytes", "memory_peak_bytes"]
        if self.plan is None or self.plan.is_shared:
            names.append("memory_process_bytes")
        known = [int(self.peaks[name]) for name in names if name in self.peaks]
        return max([*known, *([] if self.run_bytes is None else [self.run_bytes])], default=None)


@dataclass(frozen=True)
class MemoryPlan:
    """What a run's configuration says of its memory.

    Attributes:
        predicted_bytes: Forecast of the peak of a step.
        memory_fraction: Share of the device's memory that it may use.
        micro_batch_size: Rows at once.
        grad_accum_steps: Micro-batches of a step.
        is_shared: Whether the process's memory is what was predicted, not a card's.
    """

    predicted_bytes: int
    memory_fraction: float
    micro_batch_size: int
    grad_accum_steps: int
    is_shared: bool


def read_plan(run: Path) -> MemoryPlan | None:
    """The plan of a run, from its `config.json`; None where there is none that can be read."""
    try:
        config = RunConfig.model_validate_json((run / CONFIG_NAME).read_bytes())
        predicted = predict_training_memory(config, param_specs(config.model)).total
    except (OSError, ValueError):
        return None
    t = config.train
    return MemoryPlan(
        predicted,
        t.memory_fraction,
        t.micro_batch_size,
        t.grad_accum_steps,
        shares_memory(t.backend),
    )


class MetricsTail:
    """Reads rows as they are appended; notices when the file is cut or replaced (a resume)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._identity: tuple[int, int] | None = None
        self.latest: dict[str, Any] = {}
        self.peaks: dict[str, float] = {}

    def poll(self) -> list[dict[str, Any]]:
        """New complete rows. `latest` keeps the newest value of every key, `peaks` the largest."""
        try:
            with self._path.open("rb") as handle:
                rows = self._read(handle)
        except OSError:
            return []
        for row in rows:
            self.latest.update(row)
            for name in PEAKED:
                if name in row:
                    self.peaks[name] = max(row[name], self.peaks.get(name, 0))
        return rows

    def _read(self, handle: IO[bytes]) -> list[dict[str, Any]]:
        stat = os.fstat(handle.fileno())
        identity = (stat.st_dev, stat.st_ino)
        if identity != self._identity or stat.st_size < self._offset:
            self._identity, self._offset = identity, 0
            self.latest, self.peaks = {}, {}
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
    if (lock := _read_lock(run)) is None:
        return RunStatus("unknown")
    pid, started, where = lock
    if where != (platform.node() if host is None else host):
        return RunStatus("elsewhere", pid, where)
    process = read_process(pid)
    if process is None or process.started > started + _CLOCK_SLACK_S:
        return RunStatus("ended", pid, where)
    return RunStatus("running", pid, where, process)


def _read_lock(run: Path) -> tuple[int, float, str] | None:
    """Process, its seconds since 1970 when it took the lock, and host."""
    try:
        lock = json.loads((run / LOCK_NAME).read_text(encoding="utf-8"))
        return int(lock["pid"]), float(lock["started"]), str(lock["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def earlier_run(run: Path) -> str | None:
    """The run of a sweep that the same process trained before this one, the nearest; else None."""
    base, is_sweep, _ = run.name.rpartition("-lr-")
    lock = _read_lock(run)
    if not is_sweep or lock is None:
        return None
    pid, started, host = lock
    found = []
    for other in run.parent.glob(f"{glob.escape(base)}-lr-*"):
        seen = _read_lock(other)
        if seen is not None and (seen[0], seen[2]) == (pid, host) and seen[1] < started:
            found.append((seen[1], other.name))
    return max(found)[1] if found else None


class Watch:
    """Looks again and again at the machine and a run."""

    def __init__(
        self, run: Path | None, *, clock: Callable[[], float] = time.monotonic, others: bool = True
    ) -> None:
        self.run = run
        self._tail = None if run is None else MetricsTail(run / METRICS_PATH)
        self._clock = clock
        self._others: tuple[OtherProcess, ...] = ()
        self._next_others = clock() if others else math.inf
        self._plan: MemoryPlan | None = None
        self._plan_time = -1

    def look(self) -> Snapshot:
        """Everything as it is now."""
        system = system_memory()
        metrics: dict[str, Any] = {}
        peaks: dict[str, float] = {}
        status = RunStatus("unknown")
        if self.run is not None and self._tail is not None:
            self._tail.poll()
            metrics, peaks = dict(self._tail.latest), dict(self._tail.peaks)
            status = run_status(self.run)
            self._look_at_plan(self.run)
        if self._clock() >= self._next_others:  # it reads every process, which takes a moment
            self._next_others = self._clock() + OTHERS_EVERY_S
            self._others = large_processes(without={os.getpid(), status.pid})
        return Snapshot(
            system,
            gpu_memory(system),
            self.run,
            status,
            metrics,
            peaks,
            memory_pressure(),
            self._plan,
            self._others,
            None if self.run is None else earlier_run(self.run),
        )

    def _look_at_plan(self, run: Path) -> None:
        """Read the plan again where it was written again, as after memory ran out."""
        try:
            changed = (run / CONFIG_NAME).stat().st_mtime_ns
        except OSError:
            return
        if changed != self._plan_time:
            self._plan, self._plan_time = read_plan(run), changed


def as_object(snapshot: Snapshot, now: float) -> dict[str, Any]:
    """A JSON object; what is not known is absent."""
    system, gpu, status = snapshot.system, snapshot.gpu, snapshot.status
    out: dict[str, Any] = {"timestamp": now, "system": _present(vars(system))}
    if gpu is not None:
        out["gpu"] = _present(vars(gpu))
    if snapshot.pressure is not None:
        out["memory_pressure"] = PRESSURE_NAMES[snapshot.pressure]
    if snapshot.others:
        out["other_processes"] = [vars(other) for other in snapshot.others]
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
                "memory_bytes": snapshot.run_bytes,
                "peak_bytes": snapshot.run_peak_bytes,
                "after_in_same_process": snapshot.after,
                **({} if snapshot.plan is None else vars(snapshot.plan)),
            }
        )
    return out


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}
