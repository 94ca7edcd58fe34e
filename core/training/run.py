"""A run as its parts see it: what it is made of, how far it is, how it ended."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.backend import Backend, DeviceInfo, OutOfMemory
from core.checkpoint import Meta
from core.config.schema import RunConfig
from core.data.sampling.loader import EvalBatches, StepBatches
from core.inference.evaluate import Evaluation
from core.params import ParamSpec
from core.training.console import Console
from core.training.guard import MemoryWatch
from core.training.runlog import RunLog
from core.training.signals import StopSignals

Reason = Literal["done", "stopped", "interrupted", "terminated", "not finite", "failed"]


@dataclass
class Progressed:
    """What a run carries from step to step besides the backend's tensors.

    Attributes:
        step: Optimizer steps done.
        tokens_seen: Tokens trained on.
        best_val_loss: Lowest validation loss so far, always finite.
        best_step: The step it was measured at.
        saved_best_val_loss: Validation loss of the weights in `best.*`.
        saved_best_step: Their step.
    """

    step: int = 0
    tokens_seen: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    saved_best_val_loss: float | None = None
    saved_best_step: int | None = None


def is_better(loss: float, than: float | None) -> bool:
    """Whether a loss is a new best; one that is not finite never is."""
    return math.isfinite(loss) and (than is None or loss < than)


@dataclass(frozen=True)
class Outcome:
    """How a run ended, for the summary.

    Attributes:
        reason: What ended it.
        state: How far it is.
        first_step: The step that this start went on from; 0 for a fresh start.
        train_loss: Running average of the training loss, nats a token; None where there is none.
        final: The validation of its last step; None where there was none.
        seconds: Wall clock of this start.
        tokens: Trained on in this start.
        skipped_steps: Steps without an update, since step 1.
        checkpoint: The newest one that this start wrote; None where it wrote none.
        seconds_by_phase: Seconds by kind of work, such as "steps" and "validation".
        error: Code of what ended a failed run.
    """

    reason: Reason
    state: Progressed
    first_step: int
    train_loss: float | None
    final: Evaluation | None
    seconds: float
    tokens: int
    skipped_steps: int
    checkpoint: Path | None
    seconds_by_phase: Mapping[str, float]
    error: str | None = None


@dataclass
class Run:
    """Everything the loop needs; made by `core.training.execute`.

    `recover` is called where memory ran out: it replaces `config`, `backend`, both kinds of batches and
    `sample`, and may set `state` back to the last saved step. `events` is what it did; `provisional`
    is whether the newest checkpoint was written for it, without the validation of its step.

    Attributes:
        config: The resolved experiment.
        specs: Its parameter table.
        backend: The model and optimizer, in mode "train".
        batches: Micro-batches of each step that is left, in order.
        eval_batches: The validation windows.
        token_bytes: int64 `[V]`: bytes of text that each token stands for.
        folder: The run folder.
        log: Its `metrics.jsonl`.
        console: The terminal.
        signals: Whether somebody asked it to stop.
        meta: Of the newest checkpoint, or of where it started.
        state: How far it is.
        stop_step: The step it stops at, at most `config.train.total_steps`.
        device: What the backend runs on.
        floor_nats: Lowest loss that the text allows, nats a token; None where it is not known.
        sample: Writes the samples of a step; None where none are wanted.
        phases: Seconds by kind of work, such as "steps" and "validation".
        checkpoint: The newest one that this start wrote; None where it wrote none yet.
        first_step: The step that this start went on from; 0 for a fresh start.
        recover: See above; None where it is not possible.
        provisional: See above.
        watch: Memory by the clock; None where nobody looks.
        events: See above, as rows of the log.
    """

    config: RunConfig
    specs: Sequence[ParamSpec]
    backend: Backend
    batches: Iterator[StepBatches]
    eval_batches: EvalBatches
    token_bytes: NDArray[np.int64]
    folder: Path
    log: RunLog
    console: Console
    signals: StopSignals
    meta: Meta
    state: Progressed
    stop_step: int
    device: DeviceInfo
    floor_nats: float | None = None
    sample: Callable[[int], None] | None = None
    phases: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    first_step: int = 0
    recover: "Callable[[Run, OutOfMemory], None] | None" = None
    provisional: bool = False
    watch: MemoryWatch | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
