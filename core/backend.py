"""The cut between core and a backend: one whole optimizer step, in numpy.

Core owns the loop, data, schedule, checkpoints' schedule, logs and sampling. A backend owns the model,
the gradient, the update, and its device. What crosses is numpy; device tensors never do, but for
lazy scalars of metrics, which core turns into numbers only when it logs.

Legend: B rows, T tokens of a row, V vocab_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import Checkpoint, Meta
from core.config.schema import RunConfig
from core.errors import EXIT_FAULT, PippinError
from core.params import ParamSpec

Mode = Literal["train", "infer"]
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Lazy(Protocol):
    """A number on the device: read by `float()`, which may wait for it."""

    def __float__(self) -> float: ...


class OutOfMemory(PippinError):
    """The device's memory ran out; a smaller micro-batch gives the same result in less. P101.

    Attributes:
        intact: Whether weights and optimizer state are still those of the last finished step. An
            update in place that was cut short leaves neither the old state nor the new one.
    """

    def __init__(
        self, what: str, *, found: str = "", remedy: str = "", intact: bool = True
    ) -> None:
        halve = "halve train.micro_batch_size and double train.grad_accum_steps"
        super().__init__("P101", what, found=found, remedy=remedy or halve, exit_code=EXIT_FAULT)
        self.intact = intact

    def bare(self) -> "OutOfMemory":
        """The same without traceback and cause, whose frames hold the tensors of the failed step."""
        return OutOfMemory(self.what, found=self.found, remedy=self.remedy, intact=self.intact)


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: int32 `[B, T]`.
        targets: int32 `[B, T]`, the next tokens; any valid id where the weight is 0.
        weights: float32 `[B, T]`; 0 where a target is not trained on.
        segments: int32 `[B, T]` document of each token; attention stays inside one. None is one.
        ref_logps: float32 `[B]`, for preference objectives.
        row0: Index of the first row within the rows of the whole step, over all micro-batches and
            ranks; seeds are made from it, so that the split does not matter.
    """

    tokens: Int32
    targets: Int32
    weights: Float32
    segments: Int32 | None = None
    ref_logps: Float32 | None = None
    row0: int = 0


@dataclass(frozen=True)
class StepHyper:
    """Everything that varies from step to step. A pure function of the step, made by core.

    Attributes:
        step: Optimizer step, from 1: bias correction and seeds.
        lr: Learning rate of each group.
        weight_decay: Weight decay of each group.
        momentum: Muon's momentum.
        normalizer: Sum of the weights over the whole step, all micro-batches and ranks.
        max_grad_norm: Clip of the global norm; 0 is off.
    """

    step: int
    lr: Mapping[str, float]
    weight_decay: Mapping[str, float]
    momentum: float
    normalizer: float
    max_grad_norm: float


@dataclass(frozen=True)
class Scores:
    """nll float32 `[B, T]` in nats, without weights; hit bool `[B, T]`: argmax equals the target."""

    nll: Float32
    hit: NDArray[np.bool_]


@dataclass(frozen=True)
class DeviceInfo:
    """What a backend runs on.

    Attributes:
        backend: "mlx", "mps", "cuda" or "cpu".
        framework: "torch 2.13.0", "mlx 0.32.4".
        device: Name of the chip.
        budget_bytes: Memory that the device may use, None where it has no limit of its own.
        native_bf16: Whether bfloat16 is a native type.
    """

    backend: str
    framework: str
    device: str
    budget_bytes: int | None
    native_bf16: bool


@dataclass(frozen=True)
class MemoryStats:
    """Bytes on the device; None where the framework has no counter for it."""

    active_bytes: int | None
    peak_bytes: int | None
    cached_bytes: int | None


class Pending(Protocol):
    """A save under way."""

    def result(self) -> Path:
        """Wait, and return the path of the complete file, or raise what went wrong."""
        ...


@dataclass(frozen=True)
class Saved:
    """A save that is done; a `Pending`."""

    path: Path

    def result(self) -> Path:
        return self.path


class Cache(Protocol):
    """Keys and values of a batch of sequences, each row with a length of its own."""

    @property
    def lengths(self) -> Int32:
        """int32 `[B]`: tokens that each row holds."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named twice (a fork)."""
        ...

    def trim(self, row: int, n: int) -> None:
        """Forget the last `n` tokens of a row."""
        ...


class Backend(Protocol):
    """One device with a model, and an optimizer in mode "train".

    Metrics that `train_step` returns, all lazy and all means over the step: `loss` (nats a token),
    `grad_norm` (before the clip), `skipped_total`, `skipped_in_a_row`, with experts also `aux_loss` (how
    evenly they are used; 1 is even, and it is not part of `loss`), and with float16 `loss_scale` and
    `overflows_total`.

    `profile_step` is a real step, waited for after each part: seconds of "transfer", "forward",
    "backward" and "optimizer", over all micro-batches.
    """

    name: str
    suffix: str
    rank: int
    world_size: int

    def device_info(self) -> DeviceInfo: ...
    def load(self, ckpt: Checkpoint, *, optimizer: bool = True) -> None: ...
    def save(self, path: Path, meta: Meta, *, optimizer: bool = True) -> Pending: ...
    def tensors(self, *, optimizer: bool = True) -> Iterator[tuple[str, NDArray[Any]]]: ...
    def backend_state(self) -> dict[str, float]: ...
    def train_step(self, micro: Sequence[Batch], hyper: StepHyper) -> Mapping[str, Lazy]: ...
    def profile_step(self, micro: Sequence[Batch], hyper: StepHyper) -> Mapping[str, float]: ...
    def score(self, batch: Batch) -> Scores: ...
    def logits(self, tokens: Int32, segments: Int32 | None = None) -> Float32: ...
    def start(self, batch_size: int, max_len: int) -> Cache: ...
    def decode(self, tokens: Int32, lengths: Int32, cache: Cache) -> Float32: ...
    def memory(self, *, reset_peak: bool = False) -> MemoryStats: ...
    def sum_across(self, values: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class CreateBackend(Protocol):
    """What each backend package exports as `create`."""

    def __call__(self, config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> Backend: ...


# On Linux MLX is a package of Python code; what it computes with is one of these beside it.
MLX_CUDA_BUILDS = ("mlx-cuda-12", "mlx-cuda-13")
MLX_LINUX_BUILDS = ("mlx-cpu", *MLX_CUDA_BUILDS)


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, and if not, why and what to do.

    Attributes:
        name: The backend.
        ok: Whether it can run.
        reason: Why it cannot.
        remedy: What to do then.
        versions: Of its packages, by name. MLX's include the build that it computes with on Linux.
        code: Code of the error where it cannot: P501, something is absent, or P502, something that is
            here has a version known to be wrong.
    """

    name: str
    ok: bool
    reason: str = ""
    remedy: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    code: Literal["P501", "P502"] = "P501"
