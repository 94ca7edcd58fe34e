"""The figures of a look as a table of CSV: one line a look, the same columns always."""

import csv
import os
from pathlib import Path
from typing import Any

from core.errors import PippinError
from core.machine.pressure import PRESSURE_NAMES
from core.training.watch import Snapshot

COLUMNS = (
    "timestamp",
    "system_used_bytes",
    "system_available_bytes",
    "swap_used_bytes",
    "memory_pressure",
    "gpu_used_bytes",
    "gpu_budget_bytes",
    "process_bytes",
    "run_bytes",
    "run_peak_bytes",
    "predicted_bytes",
    "micro_batch_size",
    "step",
    "loss",
    "throughput_tokens_per_sec",
    "alerts",
)


def csv_row(snapshot: Snapshot, now: float, alerts: list[str]) -> dict[str, Any]:
    """One line; what is not known is empty."""
    system, gpu, plan = snapshot.system, snapshot.gpu, snapshot.plan
    process, metrics = snapshot.status.process, snapshot.metrics
    pressure = snapshot.pressure
    row = {
        "timestamp": round(now, 3),
        "system_used_bytes": system.total_bytes - system.available_bytes,
        "system_available_bytes": system.available_bytes,
        "swap_used_bytes": system.swap_used_bytes,
        "memory_pressure": None if pressure is None else PRESSURE_NAMES[pressure],
        "gpu_used_bytes": None if gpu is None else gpu.used_bytes,
        "gpu_budget_bytes": None if gpu is None else gpu.budget_bytes,
        "process_bytes": None if process is None else process.memory_bytes,
        "run_bytes": snapshot.run_bytes,
        "run_peak_bytes": snapshot.run_peak_bytes,
        "predicted_bytes": None if plan is None else plan.predicted_bytes,
        "micro_batch_size": None if plan is None else plan.micro_batch_size,
        "alerts": "; ".join(alerts) or None,
    }
    for name in ("step", "loss", "throughput_tokens_per_sec"):
        row[name] = metrics.get(name)
    return {name: "" if row[name] is None else row[name] for name in COLUMNS}


class CsvFile:
    """Appends to a file; its first line names the columns, and must be ours.

    Raises:
        PippinError: P012 where it cannot be written or holds another table.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a+", newline="", encoding="utf-8")
            self._file.seek(0)
            first = self._file.readline().strip()
            self._file.seek(0, os.SEEK_END)
        except (OSError, UnicodeDecodeError) as error:
            raise self._refused(f"{error}") from error
        if first and first != ",".join(COLUMNS):
            self._file.close()
            raise self._refused("it holds another table")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        if not first:
            self._writer.writeheader()

    def add(self, row: dict[str, Any]) -> None:
        """Append one line, complete on disk when this returns."""
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise self._refused(f"{error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _refused(self, why: str) -> PippinError:
        return PippinError(
            "P012",
            f"--csv {self._path} cannot be used: {why}.",
            remedy="name another file",
        )
