"""Checks before the first step: nothing sees the future, and the first loss is what it must be.

One row at the run's own length, dtype and attention path. A token is changed in the middle, near the
end, and one past a block's edge; logits before it must not change. Fresh weights give a loss within
10 % of ln(vocabulary), loaded ones a finite loss below 1.5 times it. A run that fails does not start.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.backend import Backend, Batch, Float32, Int32, StepHyper
from core.checkpoint import Meta
from core.errors import PippinError
from core.params import GROUPS, ParamSpec

BLOCK = 32  # attention kernels work in blocks of this many keys, or of a multiple
# A leak moves logits by their own size; rounding of another shape or path by far less.
LEAK_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
FRESH_TOLERANCE = 0.10
LOADED_FACTOR = 1.5


@dataclass(frozen=True)
class Causality:
    """Largest relative change before the changed token, by mode, and the tokens changed."""

    scoring: float
    training: float
    positions: tuple[int, ...]


def positions(seq_len: int) -> tuple[int, ...]:
    """Tokens to change: the middle, near the end, one past a block's edge."""
    wanted = {seq_len // 2, seq_len - 2, min(BLOCK + 1, seq_len - 1)}
    return tuple(sorted(p for p in wanted if 0 < p < seq_len))


def causality(backend: Backend, row: Batch, *, vocab_size: int, precision: str) -> Causality:
    """Change one token and see that nothing before it moves, in scoring and in training mode.

    Training mode runs `train_step` with rates of 0 and weights of 0 from the changed token on, so its
    loss must not move. The optimizer's moments do: load the run's checkpoint afterwards.

    Args:
        backend: Backend whose weights are not all zero at the outputs (see `probe_checkpoint`).
        row: One row `[1, T]` of real data.
        vocab_size: Rows of the embedding.
        precision: Compute dtype, which sets the tolerance.

    Raises:
        PippinError: P402 with the figures.
    """
    tokens = row.tokens[:1]
    where = positions(tokens.shape[1])
    base = backend.logits(tokens)
    leak = {"scoring": 0.0, "training": 0.0}
    for position in where:
        changed = _changed(tokens, position, vocab_size)
        other = backend.logits(changed)
        if not np.isfinite(other).all():
            leak["scoring"] = math.inf
        for a, b in (
            (base, other),
            (_nll(backend, row, tokens), _nll(backend, row, changed)),
        ):
            leak["scoring"] = max(leak["scoring"], _relative(a[:, :position], b[:, :position]))
        losses = [_training_loss(backend, row, t, position) for t in (tokens, changed)]
        change = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-9)
        leak["training"] = max(leak["training"], change if math.isfinite(change) else math.inf)
    for mode, limit in (
        ("scoring", LEAK_TOLERANCE[precision]),
        ("training", LEAK_TOLERANCE[precision] / 100),  # a mean over positions hides most of it
    ):
        if not leak[mode] <= limit:
            raise PippinError(
                "P402",
                f"in {mode} mode a token changes what comes before it by {leak[mode]:.2g} of its "
                f"size (at most {limit:g}).",
                found=f"changed tokens {', '.join(map(str, where))} of {tokens.shape[1]}: attention "
                "sees the future on this machine, so training would look good and be wrong.",
                remedy="another backend or precision: --backend cpu, or train.precision=float32",
                kept="nothing was trained.",
            )
    return Causality(leak["scoring"], leak["training"], where)


def first_loss(backend: Backend, batch: Batch, *, vocab_size: int, fresh: bool) -> float:
    """The loss of one batch before training, in nats a token.

    Args:
        backend: Backend with the run's weights.
        batch: A batch of the run.
        vocab_size: Rows of the embedding.
        fresh: Whether the weights are initial ones.

    Raises:
        PippinError: P402: fresh weights must give ln(vocabulary) within 10 %, loaded ones a finite
            loss below 1.5 times it.
    """
    nll = backend.score(batch).nll.astype(np.float64)
    loss = float((nll * batch.weights).sum() / float(batch.weights.sum()))
    expected = math.log(vocab_size)
    good = (
        abs(loss - expected) <= FRESH_TOLERANCE * expected
        if fresh
        else math.isfinite(loss) and loss < LOADED_FACTOR * expected
    )
    if good:
        return loss
    bound = "within 10 % of" if fresh else "below 1.5 times"
    raise PippinError(
        "P402",
        f"the loss at the start is {loss:.3f}; it must be {bound} ln({vocab_size}) = "
        f"{expected:.3f}.",
        found="fresh weights know nothing, so every token is equally likely."
        if fresh
        else "the loaded weights do worse than knowing nothing.",
        remedy="another backend (--backend cpu), or a smaller model.init_std",
        kept="nothing was trained.",
    )


class ProbeCheckpoint:
    """Random weights for the causality check, where a fresh model's zero outputs would hide a leak.

    Values are plain random numbers, not the experiment's: they are replaced before step 1.
    """

    def __init__(self, meta: Meta, specs: Sequence[ParamSpec]) -> None:
        self.meta = meta
        self.names = tuple(spec.name for spec in specs)
        self._specs = {spec.name: spec for spec in specs}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._specs[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor."""
        return "float32"

    def read(self, name: str) -> NDArray[Any]:
        """Values: ones for gains, normal with variance 1 / fan-in for matrices."""
        spec = self._specs[name]
        if spec.group == "vector":
            return np.ones(spec.shape, np.float32)
        rng = np.random.default_rng(len(name) + spec.size)
        std = 1.0 if spec.group == "embed" and spec.tied_to is None else spec.shape[-1] ** -0.5
        values: NDArray[Any] = rng.standard_normal(spec.shape, np.float32) * np.float32(std)
        return values

    def close(self) -> None:
        """Nothing to close."""


def _nll(backend: Backend, row: Batch, tokens: Int32) -> Float32:
    return backend.score(Batch(tokens, row.targets[:1], row.weights[:1])).nll


def _training_loss(backend: Backend, row: Batch, tokens: Int32, position: int) -> float:
    weights = np.zeros_like(row.weights[:1])
    weights[:, :position] = 1.0
    zero: dict[str, float] = {group: 0.0 for group in GROUPS}
    hyper = StepHyper(1, zero, zero, 0.9, float(position), 0.0)
    return float(backend.train_step([Batch(tokens, row.targets[:1], weights)], hyper)["loss"])


def _changed(row: Int32, position: int, vocab_size: int) -> Int32:
    other: Int32 = row.copy()
    other[0, position] = (int(row[0, position]) + 1 + vocab_size // 2) % vocab_size
    if other[0, position] == row[0, position]:
        other[0, position] = (int(row[0, position]) + 1) % vocab_size
    return other


def _relative(a: Float32, b: Float32) -> float:
    scale = float(np.abs(a).max())
    change = float(np.abs(a.astype(np.float64) - b).max())
    return change / scale if scale > 0 else change
