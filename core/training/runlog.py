"""What a run writes for people and views: metrics.jsonl, state, summary, TensorBoard.

`metrics.jsonl` is strict JSON, one complete line a row, appended and flushed; a figure that was not
measured or is not finite is absent, never 0. It is the only interface to views.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from core.durable import flush_to_disk
from core.training.disk import writing

METRICS_NAME = "metrics.jsonl"
SUMMARY_NAME = "final_training_summary.json"


class _Writer(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...
    def close(self) -> None: ...


def strict(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without values that JSON cannot hold (None, NaN, infinities)."""
    return {
        k: v
        for k, v in row.items()
        if v is not None and not (isinstance(v, float) and not math.isfinite(v))
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file in one piece: a reader sees the old or the new one.

    Raises:
        PippinError: P312 if the disk refuses.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class RunLog:
    """Appends rows, and hands them to TensorBoard where it is there.

    Raises:
        PippinError: P312, here and in each method, if the disk refuses.
    """

    def __init__(self, logs: Path, *, tensorboard: _Writer | None = None) -> None:
        self.path = logs / METRICS_NAME
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = tensorboard

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row, with its step and a timestamp in seconds since 1970."""
        data = strict({"step": step, **values, "timestamp": time.time()})
        with writing(self.path):
            self._file.write(json.dumps(data, allow_nan=False) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                for name, value in data.items():
                    if isinstance(value, (int, float)) and name not in ("step", "timestamp"):
                        self._tensorboard.add_scalar(name, float(value), step)

    def cut_after(self, step: int) -> None:
        """Drop the rows past a step that the run goes back to."""
        with writing(self.path):
            self._file.close()
            cut_after(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Flush to disk and close."""
        with writing(self.path):
            self._file.flush()
            flush_to_disk(self._file.fileno())
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


def open_tensorboard(logs: Path) -> _Writer | None:
    """A TensorBoard writer where its package is installed, else None. Needs no framework."""
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    return _TensorBoard(EventFileWriter(str(logs / "tensorboard")))


class _TensorBoard:
    """Scalars as TensorBoard event files, through the tensorboard package alone."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Complete rows of a metrics file; a torn last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def cut_after(path: Path, step: int) -> int:
    """Drop rows past `step` and a torn last line before a resume; returns the rows dropped."""
    if not path.is_file():
        return 0
    kept = []
    lines = path.read_bytes().split(b"\n")
    for line in lines[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    dropped = len([line for line in lines if line]) - len(kept)
    if dropped:
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        temporary.replace(path)
    return dropped
