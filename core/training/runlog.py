"""What a run writes for people and views: metrics.jsonl, state, summary, TensorBoard.

`metrics.jsonl` is strict JSON, one complete line a row, appended and flushed; a figure that was not
measured or is not finite is absent, never 0. It is the only interface to views.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from core.backend import Lazy, MemoryStats
from core.durable import flush_to_disk, replace_file
from core.errors import PippinError
from core.inference.evaluate import Evaluation
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


def metrics_row(
    metrics: Mapping[str, Lazy],
    *,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    tokens_seen: int,
    speed: float | None,
    step_time_s: float | None,
    memory: MemoryStats,
    process_bytes: int,
    mfu: float | None,
    skipped_total: int,
    val: Evaluation | None,
) -> dict[str, Any]:
    """One row of metrics.jsonl (docs/data-format.md).

    Args:
        metrics: Of the step; what only some models and precisions have is taken from it.
        loss: Mean cross-entropy of the step, in nats a token.
        grad_norm: Norm of the gradient before it is clipped.
        learning_rate: Rate of the matrices.
        tokens_seen: Tokens trained on so far.
        speed: Tokens per second since the last row, None where no step was timed.
        step_time_s: Seconds a step took in them.
        memory: The device's own figures.
        process_bytes: Memory of the process.
        mfu: Share of the device's peak FLOP/s.
        skipped_total: Steps that were not finite so far.
        val: The validation of this step, if there was one.
    """
    row: dict[str, Any] = {
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens_processed": tokens_seen,
        "throughput_tokens_per_sec": speed,
        "step_time_sec": step_time_s if speed is not None else None,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "memory_active_bytes": memory.active_bytes,
        "memory_peak_bytes": memory.peak_bytes,
        "memory_process_bytes": process_bytes,
        "mfu": mfu,
        "skipped_total": skipped_total,
    }
    if "aux_loss" in metrics:
        row["aux_loss"] = float(metrics["aux_loss"])
    if "loss_scale" in metrics:
        row["loss_scale"] = float(metrics["loss_scale"])
        row["overflows_total"] = float(metrics["overflows_total"])
    if val is not None:
        row["val_loss"] = val.loss
        row["val_bits_per_byte"] = val.bits_per_byte
    return row


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file in one piece: a reader sees the old or the new one.

    Raises:
        PippinError: P312 if the disk refuses.
    """
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with writing(path):
        replace_file(path, text.encode())


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

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except PippinError:
            if error is None:
                raise

    def close(self) -> None:
        """Flush to disk and close; nothing where that is done."""
        if self._file.closed:
            return
        with writing(self.path):
            try:
                self._file.flush()
                flush_to_disk(self._file.fileno())
            finally:
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


def losses_until(path: Path, step: int) -> list[tuple[int, float]]:
    """Step and loss of the rows up to a step, in their order; a loss that was not finite is NaN."""
    found = {}
    for row in read_rows(path):
        if "event" not in row and row.get("step", math.inf) <= step:
            found[int(row["step"])] = float(row.get("loss", math.nan))
    return sorted(found.items())


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
        replace_file(path, b"".join(line + b"\n" for line in kept))
    return dropped
