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
    """How a run ended, for the summary; `error` is the code of what ended a failed one."""

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
