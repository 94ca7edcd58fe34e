"""What two backends found, as numbers with tolerances."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from tools.parities.worker import INITIAL_NAME, half_way, result_path

Arrays = Mapping[str, NDArray[Any]]

TOL_LOGITS = 1e-5
TOL_LOSS = 1e-4
TOL_GRAD_NORM = 1e-3
TOL_UPDATE = 2e-4
TOL_WEIGHTS = 1e-3
TOL_TOKENS = 0.0


@dataclass(frozen=True)
class Found:
    """What one backend found: its result file, and its arrays by name."""

    name: str
    values: dict[str, Any]
    arrays: Arrays

    @property
    def losses(self) -> NDArray[np.float64]:
        """Loss of every step, nats a token."""
        return np.asarray(self.values["losses"], np.float64)


@dataclass(frozen=True)
class Check:
    """One measured difference. `note` says where it is largest, or what helps to judge it."""

    quantity: str
    measured: float
    tolerance: float
    unit: str
    note: str = ""

    @property
    def ok(self) -> bool:
        """Within tolerance; NaN is not."""
        return self.measured <= self.tolerance


@dataclass(frozen=True)
class Handover:
    """Losses of a run that was begun on `source` and ended on `target`."""

    source: str
    target: str
    first_step: int
    losses: NDArray[np.float64]

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.source} -> {self.target}"


def read_found(folder: Path, name: str) -> Found:
    """Result of a backend's run."""
    values = json.loads(result_path(folder, name, ".json").read_text(encoding="utf-8"))
    with np.load(result_path(folder, name, ".npz"), allow_pickle=False) as data:
        return Found(name, values, dict(data))


def read_handover(folder: Path, source: str, target: str) -> Handover:
    """Result of a run that changed its backend."""
    path = result_path(folder, f"{target}-from-{source}", ".json")
    values = json.loads(path.read_text(encoding="utf-8"))
    losses = np.asarray(values["losses"], np.float64)
    return Handover(source, target, int(values["first_step"]), losses)


def initial_weights(folder: Path) -> dict[str, NDArray[Any]]:
    """The weights that every backend was given."""
    ckpt = backends.open_checkpoint(folder / INITIAL_NAME)
    try:
        return {name: ckpt.read(name) for name in ckpt.names}
    finally:
        ckpt.close()


def relative_max(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest difference over the largest value of `a`."""
    gap = float(np.max(np.abs(a.astype(np.float64) - b)))
    scale = float(np.max(np.abs(a)))
    return gap / scale if scale > 0 else gap


def relative_norm(
    a: Arrays, b: Arrays, scale: Mapping[str, NDArray[np.float64]]
) -> tuple[float, str]:
    """Norm of all differences together over the norm of `scale`, and the tensor that differs most.

    Which tensor differs most is judged by its own norm.
    """
    gaps, sizes = {}, {}
    for name in a:
        gaps[name] = float(np.sum((a[name].astype(np.float64) - b[name]) ** 2))
        sizes[name] = float(np.sum(scale[name] ** 2))
    total = sum(sizes.values())
    worst = max(gaps, key=lambda n: gaps[n] / sizes[n] if sizes[n] > 0 else 0.0)
    share = (gaps[worst] / sizes[worst]) ** 0.5 if sizes[worst] > 0 else 0.0
    overall = (sum(gaps.values()) / total) ** 0.5 if total > 0 else sum(gaps.values()) ** 0.5
    return overall, f"most in {worst}: {share:.1e}"


def compare(
    a: Found, b: Found, initial: Arrays, handovers: list[tuple[Handover, Found]]
) -> list[Check]:
    """Every check of backend `b` against backend `a`.

    Args:
        a: The reference.
        b: The other one.
        initial: The weights that both started from.
        handovers: Runs that changed from one to the other, each with the run it must agree with.
    """
    norms_a, norms_b = (np.asarray(x.values["grad_norms"], np.float64) for x in (a, b))
    norm_gaps = np.abs(norms_a - norms_b) / norms_a
    checks = [
        Check(
            "initial logits",
            relative_max(a.arrays["logits"], b.arrays["logits"]),
            TOL_LOGITS,
            "relative",
        ),
        _loss_check(f"losses of {len(a.losses)} steps", a.losses, b.losses, 1),
        Check(
            "gradient norms",
            float(norm_gaps.max()),
            TOL_GRAD_NORM,
            "relative",
            f"at step {int(norm_gaps.argmax()) + 1}",
        ),
        _update_check(a, b),
        _weights_check(a, b, initial),
        _tokens_check(a, b),
    ]
    for handover, own in handovers:
        rest = own.losses[handover.first_step - 1 :]
        name = f"{handover.label} after step {half_way(len(own.losses))}"
        checks.append(_loss_check(name, rest, handover.losses, handover.first_step))
    return checks


def _loss_check(
    name: str, a: NDArray[np.float64], b: NDArray[np.float64], first_step: int
) -> Check:
    if not a.size:
        return Check(name, 0.0, TOL_LOSS, "nats", "no step is left")
    gaps = np.abs(a - b)
    return Check(
        name, float(gaps.max()), TOL_LOSS, "nats", f"at step {first_step + int(gaps.argmax())}"
    )


def _update_check(a: Found, b: Found) -> Check:
    ours, theirs = ({n: v for n, v in x.arrays.items() if n.startswith("update/")} for x in (a, b))
    scale = {name: value.astype(np.float64) for name, value in ours.items()}
    gap, worst = relative_norm(ours, theirs, scale)
    return Check("update of step 1", gap, TOL_UPDATE, "relative", worst.replace("update/", ""))


def _weights_check(a: Found, b: Found, initial: Arrays) -> Check:
    ours = {name: a.arrays[f"final/{name}"] for name in initial}
    theirs = {name: b.arrays[f"final/{name}"] for name in initial}
    moved = {name: ours[name].astype(np.float64) - initial[name] for name in initial}
    gap, worst = relative_norm(ours, theirs, moved)
    return Check("final weights", gap, TOL_WEIGHTS, "of the way trained", worst)


def _tokens_check(a: Found, b: Found) -> Check:
    ours, theirs = (np.asarray(x.values["tokens"]) for x in (a, b))
    lead = min(a.values["lead"], b.values["lead"])
    different = float(np.count_nonzero(ours != theirs))
    return Check(
        "greedy tokens",
        different,
        TOL_TOKENS,
        f"of {ours.size} differ",
        f"smallest lead {lead:.2g}",
    )
