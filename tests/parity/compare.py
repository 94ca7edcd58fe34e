"""The comparisons of two backends, each a function that returns the largest relative difference.

They share a setting in which little can hide: grouped heads, a length that is no power of two, packed
rows, dropout, clipping, decay, and gains other than 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from core.backend import Backend, Batch, StepHyper
from core.checkpoint import Checkpoint, initial_checkpoint
from core.config.schema import RunConfig
from core.params import ParamSpec, param_specs, uses_muon
from tests.helpers import random_batch, split_batch, step_hyper, tiny_config
from tests.reference import optim_np

ROWS = 4
STEPS = 20
CLIP = 0.5  # the norm of a first gradient here is 2 to 6: the clip is active
DECAY = 0.5
NORM_EPS = 1e-2  # an error of 1e-3 in it, or in the decay, must be seen
Array = NDArray[Any]


def setting(backend: str, **overrides: Any) -> RunConfig:
    """The config of the comparisons for one backend."""
    base: dict[str, Any] = {
        "model__dropout": 0.1,
        "model__norm_eps": NORM_EPS,
        "train__max_grad_norm": CLIP,
        "train__weight_decay": DECAY,
        "train__backend": backend,
    }
    return tiny_config(**(base | overrides))


class Gained:
    """An initial checkpoint whose gains are not 1 and whose matrices are larger."""

    def __init__(self, config: RunConfig, *, scale: float = 8.0) -> None:
        self.specs = {s.name: s for s in param_specs(config.model)}
        self.inner = initial_checkpoint(config, tuple(self.specs.values()))
        self.meta, self.names, self.scale = self.inner.meta, self.inner.names, scale

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def dtype(self, name: str) -> str:
        return self.inner.dtype(name)

    def read(self, name: str) -> Array:
        value = self.inner.read(name)
        if self.specs[name].group == "vector":
            rng = np.random.default_rng(len(name) + self.names.index(name))
            return (value + 0.3 * rng.standard_normal(value.shape)).astype(np.float32)
        return (value * np.float32(self.scale)).astype(np.float32)

    def close(self) -> None:
        self.inner.close()


class Scaled:
    """A checkpoint in which the tensors whose names begin with `prefix` are scaled."""

    def __init__(self, inner: Checkpoint, prefix: str, factor: float) -> None:
        self.inner, self.prefix, self.factor = inner, prefix, factor
        self.meta, self.names = inner.meta, inner.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def dtype(self, name: str) -> str:
        return self.inner.dtype(name)

    def read(self, name: str) -> Array:
        value = self.inner.read(name)
        return value * np.float32(self.factor) if name.startswith(self.prefix) else value

    def close(self) -> None:
        self.inner.close()


def make(config: RunConfig, ckpt: Checkpoint | None = None, *, mode: str = "train") -> Backend:
    """The backend of a config, loaded."""
    backend = backends.load(config.train.backend)(config, param_specs(config.model), mode=mode)
    backend.load(Gained(config) if ckpt is None else ckpt)
    return backend


def difference(a: Array, b: Array) -> float:
    """Largest difference over the largest value; infinite where something is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def worst(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """The largest difference over tensors of equal names."""
    assert a.keys() == b.keys()
    return max(difference(a[name], b[name]) for name in b)


def step_batches(config: RunConfig, step: int, parts: int = 1) -> list[Batch]:
    """The packed rows of a step, split into micro-batches; three batches take turns, so it learns."""
    rows = random_batch(config, rows=ROWS, seed=step % 3, segments=True)
    return split_batch(rows, parts)


def logits_difference(a: Backend, b: Backend, config: RunConfig) -> float:
    """Logits of whole rows and of packed rows."""
    batch = step_batches(config, 1)[0]
    return max(
        difference(a.logits(batch.tokens, parts), b.logits(batch.tokens, parts))
        for parts in (None, batch.segments)
    )


def gradients_difference(a: Backend, b: Backend, config: RunConfig) -> float:
    """Gradients of every tensor: after one step without clip a first moment is (1 - beta) g."""
    batches = step_batches(config, 1)
    hyper = step_hyper(config, 1, batches, max_grad_norm=0.0)
    for backend in (a, b):
        backend.train_step(batches, hyper)
    return worst(_first_moments(a), _first_moments(b))


def _first_moments(backend: Backend) -> dict[str, Array]:
    slots = ("optim/momentum/", "optim/exp_avg/")
    return {n: np.array(v) for n, v in backend.tensors() if n.startswith(slots)}


def curve(
    backend: Backend, config: RunConfig, *, parts: int = 1, start: int = 1, end: int = STEPS
) -> Array:
    """Losses and gradient norms of steps, float64 `[steps, 2]`."""
    rows = []
    for step in range(start, end + 1):
        batches = step_batches(config, step, parts)
        metrics = backend.train_step(batches, warm_hyper(config, step, batches))
        rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(rows)


def warm_hyper(config: RunConfig, step: int, batches: list[Batch]) -> StepHyper:
    """The numbers of a step inside the warm-up of rate and momentum."""
    hyper = step_hyper(config, step, batches, lr_scale=min(1.0, step / 5))
    return replace(hyper, momentum=0.85 + 0.1 * min(1.0, step / 10))


def curve_difference(a: Array, b: Array) -> tuple[float, float]:
    """Largest difference of two curves: of the loss in nats, and of the gradient norm over its size."""
    assert a.shape == b.shape
    loss, norm = np.abs(a - b).T
    return float(loss.max()), float((norm / b[:, 1]).max())


def decode_difference(a: Backend, b: Backend, config: RunConfig) -> float:
    """Logits of decoding with ragged rows, a fork and a row cut short."""
    rng = np.random.default_rng(6)
    caches = [x.start(3, 20) for x in (a, b)]
    worst_so_far = 0.0
    for step in range(8):
        width = 4 if step % 3 == 0 else 1
        rows = len(caches[0].lengths)
        tokens = rng.integers(0, config.model.vocab_size, (rows, width), dtype=np.int32)
        lengths = rng.integers(1, width + 1, rows, dtype=np.int32)
        x, y = (be.decode(tokens, lengths, c) for be, c in zip((a, b), caches, strict=True))
        worst_so_far = max(worst_so_far, difference(x, y))
        for cache in caches:
            if step == 2:
                cache.keep([2, 0, 2, 1])
            if step == 4:
                cache.trim(1, 2)
    return worst_so_far


def greedy(backend: Backend, config: RunConfig, *, rows: int = 256, new: int = 20) -> Array:
    """Most likely tokens after ragged prompts, by the cache, int32 `[rows, new]`."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, config.model.vocab_size, (rows, 5), dtype=np.int32)
    lengths = rng.integers(1, 6, rows, dtype=np.int32)
    cache = backend.start(rows, 5 + new)
    out = []
    for _ in range(new):
        chosen = backend.decode(tokens, lengths, cache).argmax(-1).astype(np.int32)
        out.append(chosen)
        tokens, lengths = chosen[:, None], np.ones(rows, np.int32)
    return np.stack(out, axis=1)


@dataclass
class FixedGradients:
    """Gives a backend the gradients of `current` in place of the loss's; the optimizer is untouched."""

    current: dict[str, Array]

    @contextmanager
    def on(self, backend: Backend) -> Iterator[None]:
        """Inside, the objective is the sum of all parameters times their gradients."""
        if backend.name == "mlx":
            yield from self._on_mlx()
        else:
            yield from self._on_torch(backend)

    def _on_mlx(self) -> Iterator[None]:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from backends.mlx import backend as module

        def objective(model: Any, **_: Any) -> Any:
            params = dict(tree_flatten(model.parameters()))
            parts = [(params[name] * mx.array(g)).sum() for name, g in self.current.items()]
            return sum(parts), None

        yield from _patched(module, "pretrain_loss", objective)

    def _on_torch(self, backend: Any) -> Iterator[None]:
        import torch

        def objective(model: Any, *_: Any) -> Any:
            params = dict(model.named_parameters())
            parts = [(params[n] * torch.from_numpy(g)).sum() for n, g in self.current.items()]
            return sum(parts), None

        yield from _patched(backend, "_loss", objective)


def _patched(target: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def random_gradients(specs: Sequence[ParamSpec], step: int, rank: int | None) -> dict[str, Array]:
    """Gradients of every tensor, of full rank or of a low one; float32."""
    rng = np.random.default_rng([step, 3])
    grads = {}
    for spec in specs:
        g = rng.standard_normal(spec.shape)
        if rank is not None and len(spec.shape) == 2:
            basis = np.random.default_rng(len(spec.name)).standard_normal((rank, spec.shape[1]))
            g = rng.standard_normal((spec.shape[0], rank)) @ basis
        grads[spec.name] = (0.01 * g).astype(np.float32)
    return grads


@dataclass(frozen=True)
class UpdateDifference:
    """Of the change of parameters by Muon and by AdamW, and of the optimizer's state."""

    muon: float
    adamw: float
    state: float


def update_difference(
    backend: Backend,
    config: RunConfig,
    *,
    given: RunConfig | None = None,
    rank: int | None = None,
    steps: int = 10,
) -> UpdateDifference:
    """What an optimizer makes of given gradients in some steps, against float64.

    Args:
        backend: Any backend, loaded.
        config: The config that the reference follows.
        given: The config whose rates, decay and clip the backend is given, where they are wrong.
        rank: Rank of the matrices' gradients, None for full.
        steps: Steps, in which rate and momentum warm up.
    """
    specs = param_specs(config.model)
    start = {n: np.array(v) for n, v in backend.tensors(optimizer=False)}
    expected = optim_np.Optimizer(start, specs, config.train)
    gradients = FixedGradients({})
    batches = step_batches(config, 1)
    with gradients.on(backend):
        for step in range(1, steps + 1):
            gradients.current = random_gradients(specs, step, rank)
            right, wrong = (warm_hyper(c, step, batches) for c in (config, given or config))
            backend.train_step(batches, wrong)
            expected.step(gradients.current, right)
    end = {n: np.array(v, np.float64) for n, v in backend.tensors()}
    largest = {True: 0.0, False: 0.0}
    for spec in specs:
        before = start[spec.name].astype(np.float64)
        change = difference(end[spec.name] - before, expected.params[spec.name] - before)
        kind = uses_muon(spec, config.train.optimizer)
        largest[kind] = max(largest[kind], change)
    state = {name: value for name, value in end.items() if name.startswith("optim/")}
    return UpdateDifference(largest[True], largest[False], worst(state, expected.state))
