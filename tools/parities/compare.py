"""What two backends found, as numbers with tolerances."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from tools.parities.worker import INITIAL_NAME, result_path

Arrays = Mapping[str, NDArray[Any]]

# Measured with torch 2.13 and mlx 0.32 on the CPUs of an EPYC, built-in experiment and quickstart,
# 20 and 50 steps, against an injected fault of 1e-3 in one tensor. Tolerances lie between.
# Sums of 64 float32 products in another order: 3e-7; fault 1e-3.
TOL_LOGITS = 1e-5
# A loss of 5 has steps of 5e-7, and training amplifies rounding: 3e-6; fault 2e-3.
TOL_LOSS = 1e-4
# 1e-5; fault 2e-3.
TOL_GRAD_NORM = 2e-4
# Newton-Schulz multiplies what is smallest by up to 3.4445^5 = 485, and AdamW's first step divides
# each element by itself: 2e-5; fault 1e-3.
TOL_UPDATE = 2e-4
# Of the distance from the initial weights, 4e-6; fault 1e-3.
TOL_WEIGHTS = 2e-4
TOL_TOKENS = 0.0
# Leads, as logits, below which the best two tokens are a tie that rounding may decide either way;
# what follows a tie in its row is not compared. A hundred times the rounding of a logit.
TIE = 1e-4


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
    """One measured difference, its unit in its name; `note` helps to judge it."""

    quantity: str
    measured: float
    tolerance: float
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


def relative_norm(a: Arrays, b: Arrays, scale: Arrays) -> tuple[float, str]:
    """Norm of all differences together over the norm of `scale`, and the tensor that differs most.

    Which tensor differs most is judged by its own norm.
    """
    gaps, sizes = {}, {}
    for name in a:
        gaps[name] = float(np.sum((a[name].astype(np.float64) - b[name]) ** 2))
        sizes[name] = float(np.sum(scale[name].astype(np.float64) ** 2))
    total = sum(sizes.values())
    worst = max(gaps, key=lambda n: gaps[n] / sizes[n] if sizes[n] > 0 else 0.0)
    share = (gaps[worst] / sizes[worst]) ** 0.5 if sizes[worst] > 0 else 0.0
    overall = (sum(gaps.values()) / total) ** 0.5 if total > 0 else sum(gaps.values()) ** 0.5
    parts = worst.rpartition("/")[2].removesuffix(".weight").split(".")
    where = f"layer {parts[1]} {parts[-1]}" if parts[0] == "layers" else parts[-1]
    return overall, f"{where} {share:.0e}"


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
    logits = relative_max(a.arrays["logits"], b.arrays["logits"])
    checks = [
        Check("initial logits (relative)", logits, TOL_LOGITS),
        _loss_check(f"losses of {len(a.losses)} steps (nats)", a.losses, b.losses, 1),
        _norm_check(a, b),
        _update_check(a, b),
        _weights_check(a, b, initial),
        _tokens_check(a, b),
    ]
    for handover, own in handovers:
        rest = own.losses[handover.first_step - 1 :]
        name = f"{handover.label} after step {handover.first_step - 1} (nats)"
        checks.append(_loss_check(name, rest, handover.losses, handover.first_step))
    return checks


def _loss_check(
    name: str, a: NDArray[np.float64], b: NDArray[np.float64], first_step: int
) -> Check:
    gaps = np.abs(a - b)
    return Check(name, float(gaps.max()), TOL_LOSS, f"step {first_step + int(gaps.argmax())}")


def _norm_check(a: Found, b: Found) -> Check:
    ours, theirs = (np.asarray(x.values["grad_norms"], np.float64) for x in (a, b))
    gaps = np.abs(ours - theirs) / ours
    note = f"step {int(gaps.argmax()) + 1}"
    return Check("gradient norms (relative)", float(gaps.max()), TOL_GRAD_NORM, note)


def _update_check(a: Found, b: Found) -> Check:
    ours, theirs = ({n: v for n, v in x.arrays.items() if n.startswith("update/")} for x in (a, b))
    gap, worst = relative_norm(ours, theirs, ours)
    return Check("update of step 1 (relative)", gap, TOL_UPDATE, worst)


def _weights_check(a: Found, b: Found, initial: Arrays) -> Check:
    ours = {name: a.arrays[f"final/{name}"] for name in initial}
    theirs = {name: b.arrays[f"final/{name}"] for name in initial}
    moved = {name: ours[name].astype(np.float64) - initial[name] for name in initial}
    gap, worst = relative_norm(ours, theirs, moved)
    return Check("final weights (of the way trained)", gap, TOL_WEIGHTS, worst)


def _tokens_check(a: Found, b: Found) -> Check:
    ours, theirs = (np.asarray(x.values["tokens"]) for x in (a, b))
    leads = np.minimum(*(np.asarray(x.values["leads"]) for x in (a, b)))
    before_tie = np.cumsum(leads < TIE, axis=1) == 0
    different = float(np.count_nonzero((ours != theirs) & before_tie))
    # Where rows differ, leads of different texts mean nothing.
    lead = float(leads[before_tie].min()) if before_tie.any() else 0.0
    name = f"greedy tokens (differ, of {np.count_nonzero(before_tie)})"
    return Check(name, different, TOL_TOKENS, f"smallest lead {lead:.2g}")
