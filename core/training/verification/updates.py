"""Self-tests of training: gradients, both optimizers, the clip, dropout, saving, and memory."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from core.backend import Backend, Batch
from core.checkpoint import Checkpoint, initial_checkpoint
from core.config.schema import RunConfig
from core.params import param_specs, uses_muon
from core.training.verification import reference
from core.training.verification.bench import (
    MOMENTUM,
    Bench,
    batch_of,
    gradients,
    hyper_of,
    relative,
    running,
    setting,
    snapshot,
    weights_of,
)
from core.training.verification.forward import BROKEN, GRADIENT, LOSS
from core.training.verification.report import Check, measured, worst

Array = NDArray[np.float64]
# Measured on a 2-core x86-64 in November 2026 (torch 2.13 and MLX 0.32, CPU), the larger of both:
# gradients 2e-6, Newton-Schulz 1e-5, AdamW 6e-6, norm 2e-7. Other hardware gets several times that.
NEWTON_SCHULZ = 1e-3
ADAMW = 1e-4
NORM = 1e-5
COMPILED = 1e-4
# The master is float32: a change is known to 6e-8 of the weight.
LARGE_RATE = 0.1
DECAY = 0.1
MEMORY_STEPS, WARM_STEPS = 50, 12
# Counters are exact; a process's resident memory also holds what its allocator keeps.
SLOPE_BYTES = {
    "the backend's counter": 64_000,
    "malloc's count": 64_000,
    "resident memory": 200_000,
}


def backward(bench: Bench) -> Iterator[Check]:
    """Every tensor's gradient against central differences of the float64 loss."""
    config = setting(bench)
    batch = batch_of(config, rows=1, packed=True)
    grads, _ = gradients(bench, config, batch)
    exact = _exact(config)
    errors = {name: _slope_error(exact, name, g, batch, config) for name, g in grads.items()}
    name = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    check = measured(bench.group, "gradients, float32", errors[name], GRADIENT, remedy=BROKEN)
    yield replace(check, figure=f"{check.figure} (largest: {name})")


def _exact(config: RunConfig) -> dict[str, Array]:
    tensors = weights_of(param_specs(config.model))
    return {name: value.astype(np.float64) for name, value in tensors.items()}


def _slope_error(
    exact: dict[str, Array], name: str, grad: Array, batch: Batch, config: RunConfig
) -> float:
    """Along the gradient itself, which sees its size, and a random direction, which sees the rest."""
    norm = float(np.sqrt((grad * grad).sum()))
    if not 0 < norm < float("inf"):
        return float("inf")
    rng = np.random.default_rng(len(name))
    noise = rng.standard_normal(grad.shape)
    # A random direction sees 1 / sqrt(n) of a difference.
    directions = [(grad / norm, 1.0), (noise / np.sqrt((noise**2).sum()), np.sqrt(grad.size))]
    size, errors = 1e-4, []
    for direction, gain in directions:
        ends = [exact | {name: exact[name] + s * size * direction} for s in (1.0, -1.0)]
        above, below = (reference.loss(p, batch, config.model) for p in ends)
        slope = (above - below) / (2 * size)
        errors.append(float(gain * abs((grad * direction).sum() - slope) / norm))
    return worst(errors)


def muon(bench: Bench) -> Iterator[Check]:
    """The change of every matrix by Muon, with momentum, decay and Newton-Schulz in float64."""
    yield measured(
        bench.group,
        "Muon's update against float64",
        _update_error(bench, "muon", steps=2),
        NEWTON_SCHULZ,
        remedy=BROKEN,
    )


def adamw(bench: Bench) -> Iterator[Check]:
    """The change of every tensor by AdamW, over three steps, and its second moment."""
    yield measured(
        bench.group,
        "AdamW's update against float64",
        _update_error(bench, "adamw", steps=3),
        ADAMW,
        remedy=BROKEN,
    )


def _update_error(bench: Bench, optimizer: str, *, steps: int) -> float:
    """Follow each step in float64 from the state that the backend shows before it."""
    config = setting(bench, train__optimizer=optimizer)
    errors: list[float] = []
    with running(bench, config) as backend:
        before = snapshot(backend)
        for step in range(1, steps + 1):
            batch = batch_of(config, rows=4, seed=step)
            hyper = hyper_of(batch, step=step, lr=LARGE_RATE, decay=DECAY)
            float(backend.train_step([batch], hyper)["loss"])
            after = snapshot(backend)
            for spec in param_specs(config.model):
                if uses_muon(spec, optimizer) == (optimizer == "muon"):
                    errors.append(_tensor_error(config, spec.name, before, after, step))
            before = after
    return worst(errors)


def _tensor_error(
    config: RunConfig, name: str, before: dict[str, Array], after: dict[str, Array], step: int
) -> float:
    c = config.train
    change = before[name] * (1 - LARGE_RATE * DECAY) - after[name]
    if c.optimizer == "muon":
        key = f"optim/momentum/{name}"
        grad = (after[key] - MOMENTUM * before[key]) / (1 - MOMENTUM)
        return relative(change / LARGE_RATE, reference.muon_change(after[key], grad, MOMENTUM, c))
    first, second = f"optim/exp_avg/{name}", f"optim/exp_avg_sq/{name}"
    grad = (after[first] - c.beta1 * before[first]) / (1 - c.beta1)
    moment = c.beta2 * before[second] + (1 - c.beta2) * grad * grad
    update = reference.adamw_change(after[first], after[second], step, c)
    return max(relative(after[second], moment), relative(change / LARGE_RATE, update))


def clip(bench: Bench) -> Iterator[Check]:
    """The norm of all gradients, of a large table too, and what the clip makes of them."""
    config = setting(bench, model__vocab_size=24_001, model__n_layers=1)
    batch = batch_of(config, rows=4)
    grads, norm = gradients(bench, config, batch)
    exact = float(np.sqrt(sum((g * g).sum() for g in grads.values())))
    clipped, _ = gradients(bench, config, batch, clip=exact / 4)
    factor = min(1.0, exact / 4 / (exact + 1e-6))
    errors = [relative(clipped[name], factor * g) for name, g in grads.items()]
    group = bench.group
    yield measured(group, "norm of the gradients", relative(norm, exact), NORM, remedy=BROKEN)
    yield measured(group, "clip of the norm", worst(errors), NORM * 10, remedy=BROKEN)


def dropout(bench: Bench, open_checkpoint: Callable[[Path], Checkpoint]) -> Iterator[Check]:
    """The masks are those of the formula, and the same after saving and loading."""
    config = setting(bench, model__dropout=0.2)
    batch = batch_of(config)
    path = bench.folder / f"dropout-{bench.backend}"
    with running(bench, config) as backend:
        first = float(backend.train_step([batch], hyper_of(batch))["loss"])
        file = _save(backend, config, path.with_suffix(backend.suffix))
        losses = [_loss(backend, batch, step) for step in (2, 3)]
    seed = config.train.seed
    expected = reference.loss(_exact(config), batch, config.model, seed=seed, step=1)
    yield measured(
        bench.group, "dropout against float64", relative(first, expected), LOSS, remedy=BROKEN
    )
    with running(bench, config) as backend:
        ckpt = open_checkpoint(file)
        try:
            backend.load(ckpt)
        finally:
            ckpt.close()
        again = [_loss(backend, batch, step) for step in (2, 3)]
    same, other = losses == again, losses[0] != losses[1]
    yield Check(
        bench.group,
        "dropout after saving and loading",
        "pass" if same and other else "fail",
        ("the same losses, bit for bit" if same else f"{losses} before, {again} after")
        if other
        else "two steps have the same mask",
        remedy="a resumed run would not equal an uninterrupted one here: report it",
    )


def _loss(backend: Backend, batch: Batch, step: int) -> float:
    return float(backend.train_step([batch], hyper_of(batch, step=step))["loss"])


def _save(backend: Backend, config: RunConfig, path: Path) -> Path:
    meta = replace(initial_checkpoint(config, param_specs(config.model)).meta, step=1)
    return backend.save(path, meta).result()


def compiled(bench: Bench) -> Iterator[Check]:
    """A compiled step equals the eager one."""
    name = "compiled step equals eager"
    if not bench.compiles and not (bench.backend == "mlx" and bench.is_gpu):
        yield Check(bench.group, name, "skipped", "the run does not compile (train.compile)")
        return
    found: list[list[float]] = []
    for compile_it in (False, True):
        config = setting(bench, train__compile=compile_it)
        batch = batch_of(config)
        with running(bench, config) as backend:
            figures: list[float] = []
            for step in (1, 2, 3):
                metrics = backend.train_step([batch], hyper_of(batch, step=step, lr=1e-3))
                figures += [float(metrics["loss"]), float(metrics["grad_norm"])]
        found.append(figures)
    error = worst([relative(b, a) for a, b in zip(*found, strict=True)])
    yield measured(bench.group, name, error, COMPILED, remedy="train.compile=false")


def conversion(
    bench: Bench, open_checkpoint: Callable[[Path], Checkpoint], suffixes: tuple[str, ...]
) -> Iterator[Check]:
    """Saved as .npz, loaded, saved as .pt, loaded: every tensor and every logit is the same."""
    name = "conversion .npz to .pt and back"
    if len(suffixes) < 2:
        yield Check(bench.group, name, "skipped", "a .pt file needs torch, which is not installed")
        return
    config = setting(bench)
    batch = batch_of(config)
    path = bench.folder / f"convert-{bench.backend}"
    with running(bench, config) as backend:
        backend.train_step([batch], hyper_of(batch, lr=1e-2, decay=DECAY))
        states, logits = [_bits(backend)], [backend.logits(batch.tokens).tobytes()]
        file = _save(backend, config, path.with_suffix(suffixes[0]))
    for suffix in (*suffixes[1:], suffixes[0]):
        with running(bench, config) as backend:
            ckpt = open_checkpoint(file)
            try:
                backend.load(ckpt)
            finally:
                ckpt.close()
            states.append(_bits(backend))
            logits.append(backend.logits(batch.tokens).tobytes())
            file = _save(backend, config, path.with_suffix(suffix))
    tensors = [n for n in states[0] if any(s.get(n) != states[0][n] for s in states)]
    equal = not tensors and len(set(logits)) == 1
    figure = f"{len(states[0])} tensors and all logits, bit for bit"
    yield Check(
        bench.group,
        name,
        "pass" if equal else "fail",
        figure if equal else f"different: {', '.join(tensors[:5]) or 'logits'}",
        remedy="checkpoints cannot be trusted here: report it",
    )


def _bits(backend: Backend) -> dict[str, bytes]:
    return {name: np.ascontiguousarray(value).tobytes() for name, value in backend.tensors()}


def memory_slope(bench: Bench) -> Iterator[Check]:
    """Memory after each of 50 steps does not grow."""
    config = setting(bench)
    batch = batch_of(config, rows=4)
    used: list[int] = []
    kind = ""
    with running(bench, config) as backend:
        for step in range(1, WARM_STEPS + MEMORY_STEPS + 1):
            float(backend.train_step([batch], hyper_of(batch, step=step, lr=1e-3))["loss"])
            backend.synchronize()
            kind, held = _held_bytes(backend)
            used.append(held)
    slope = steady_slope(np.array(used[WARM_STEPS:], np.float64))
    check = measured(
        bench.group,
        f"memory over {MEMORY_STEPS} steps",
        max(slope, 0.0),
        SLOPE_BYTES[kind],
        unit=" B a step",
        remedy="something is kept from step to step: update torch or MLX, and report it",
    )
    yield replace(check, figure=f"{check.figure}, by {kind}")


def _held_bytes(backend: Backend) -> tuple[str, int]:
    """What is held now, and by whose count: the most exact one that there is."""
    active = backend.memory().active_bytes
    if active is not None:
        return "the backend's counter", active
    allocated = malloc_bytes()
    if allocated is not None:
        return "malloc's count", allocated
    return "resident memory", int(psutil.Process().memory_info().rss)


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33: ten size_t."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def malloc_bytes() -> int | None:
    """Bytes that this process has allocated and not freed, None without glibc's `mallinfo2`.

    Resident memory does not grow where freed memory is used again, and would hide a leak.
    """
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    ask.restype = _Mallinfo2
    info = ask()
    return int(info.uordblks) + int(info.hblkhd)


def steady_slope(used: NDArray[Any]) -> float:
    """Bytes a step by Theil and Sen: the median of all slopes, which single jumps do not move."""
    steps = np.arange(len(used))
    first, second = np.triu_indices(len(used), 1)
    return float(np.median((used[second] - used[first]) / (steps[second] - steps[first])))
