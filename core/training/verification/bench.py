"""What the self-tests stand on: a tiny model of awkward sizes, known weights, and one backend.

All of it goes through the Backend protocol. Gradients are read from the optimizer's state: with rates
of 0 and no clip, the first moment after step 1 is the gradient times 1 - beta.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.backend import Backend, Batch, CreateBackend, Int32, StepHyper
from core.checkpoint import Meta, initial_checkpoint
from core.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from core.params import GROUPS, ParamSpec, param_specs

Tensors = dict[str, NDArray[np.float32]]
# Heads of 64, which have kernels of their own; grouped; a length that no block of keys divides.
MODEL: dict[str, Any] = {
    "vocab_size": 97,
    "n_layers": 2,
    "d_model": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 64,
    "d_ff": 80,
    "max_seq_len": 128,
    "tie_embeddings": False,
    "embed_init_std": 1.0,
    "zero_init_outputs": False,
}
LENGTH = 67
TRAIN: dict[str, Any] = {
    "precision": "float32",
    "compile": False,
    "seed": 11,
    "total_steps": 100,
    "micro_batch_size": 2,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "warmup_steps": 1,
    "ns_dtype": "float32",
    "eval_interval": 10,
    "ckpt_interval": 10,
    "save_dir": "unused",
}
RATES = tuple(name for name in TrainConfig.model_fields if name.startswith("lr_"))
MOMENTUM = 0.9


@dataclass(frozen=True)
class Bench:
    """One backend under test.

    Attributes:
        backend: Its name.
        create: What `backends.load` returned.
        folder: Where temporary files may be written.
        is_gpu: Whether larger sizes are needed to reach more than one block, and can be afforded.
        compiles: Whether the run that is verified compiles.
        quick: Only what finds a broken installation in seconds.
    """

    backend: str
    create: CreateBackend
    folder: Path
    is_gpu: bool = False
    compiles: bool = False
    quick: bool = False

    @property
    def group(self) -> str:
        """Heading in the report."""
        return f"backend {self.backend}"


def setting(bench: Bench, **changes: Any) -> RunConfig:
    """The tiny configuration; `model__dropout=0.1` changes a key."""
    sections: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "data": {
            "tokenizer": "byte",
            "seq_len": LENGTH,
            "sampling": "contiguous",
            "corpus_bytes": 100_000,
        },
        "train": TRAIN | {"backend": bench.backend} | dict.fromkeys(RATES, 1e-2),
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        sections[section][key] = value
    return RunConfig(
        model=ModelConfig(**sections["model"]),
        data=DataConfig(**sections["data"]),
        train=TrainConfig(**sections["train"]),
    )


def weights_of(specs: Sequence[ParamSpec], *, seed: int = 5) -> Tensors:
    """Weights far from initial ones: activations of size 1, no gain is 1, no matrix is 0."""
    out: Tensors = {}
    for i, spec in enumerate(specs):
        rng = np.random.default_rng([seed, i])
        values = rng.standard_normal(spec.shape)
        if spec.group == "vector":
            values = 1.0 + 0.2 * values
        elif spec.group != "embed":
            values *= spec.shape[-1] ** -0.5
        out[spec.name] = values.astype(np.float32)
    return out


class Known:
    """A checkpoint of known tensors, of step 0."""

    def __init__(self, config: RunConfig, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self.meta: Meta = initial_checkpoint(config, param_specs(config.model)).meta
        self.names = tuple(tensors)
        self._tensors = dict(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """Dtype of a tensor."""
        return "float32"

    def read(self, name: str) -> NDArray[Any]:
        """A copy of a tensor."""
        values: NDArray[Any] = self._tensors[name].copy()
        return values

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def running(
    bench: Bench, config: RunConfig, tensors: Mapping[str, NDArray[np.float32]] | None = None
) -> Iterator[Backend]:
    """The backend with these weights (by default `weights_of`), closed at the end."""
    specs = param_specs(config.model)
    backend = bench.create(config, specs, mode="train")
    try:
        backend.load(Known(config, weights_of(specs) if tensors is None else tensors))
        yield backend
    finally:
        backend.close()


def batch_of(
    config: RunConfig, *, rows: int = 2, length: int = LENGTH, seed: int = 0, packed: bool = False
) -> Batch:
    """Random tokens; every fourth weight is 0, others are 1 or 1/2; packed rows if asked."""
    rng = np.random.default_rng([seed, rows, length])
    stream = rng.integers(0, config.model.vocab_size, (rows, length + 1), dtype=np.int32)
    weights = rng.choice(np.array([0.0, 0.5, 1.0, 1.0], np.float32), (rows, length))
    weights[:, 0] = 1.0
    parts = np.sort(rng.integers(0, 3, (rows, length), dtype=np.int32), axis=1) if packed else None
    return Batch(stream[:, :-1].copy(), stream[:, 1:].copy(), weights, segments=parts)


def hyper_of(
    batch: Batch, *, step: int = 1, lr: float = 0.0, decay: float = 0.0, clip: float = 0.0
) -> StepHyper:
    """The numbers of one step; a rate of 0 leaves the weights as they are."""
    return StepHyper(
        step=step,
        lr=dict.fromkeys(GROUPS, lr),
        weight_decay=dict.fromkeys(GROUPS, decay),
        momentum=MOMENTUM,
        normalizer=float(batch.weights.astype(np.float64).sum()),
        max_grad_norm=clip,
    )


def snapshot(backend: Backend) -> dict[str, NDArray[np.float64]]:
    """Every tensor in float64."""
    return {name: np.array(value, np.float64) for name, value in backend.tensors()}


def gradients(
    bench: Bench,
    config: RunConfig,
    batch: Batch,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    clip: float = 0.0,
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Gradients of every tensor after the clip, and the norm that was reported before it.

    By AdamW's first moment, whatever optimizer the configuration names.
    """
    train = config.train.model_copy(update={"optimizer": "adamw"})
    config = config.model_copy(update={"train": train})
    with running(bench, config, tensors) as backend:
        metrics = backend.train_step([batch], hyper_of(batch, clip=clip))
        norm = float(metrics["grad_norm"])
        state = snapshot(backend)
    share = 1 - config.train.beta1
    names = [spec.name for spec in param_specs(config.model)]
    return {name: state[f"optim/exp_avg/{name}"] / share for name in names}, norm


def relative(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected value; infinite where something is not finite."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    scale = float(np.abs(b).max())
    return float(np.abs(a - b).max()) / (scale if scale > 0 else 1.0)


def with_token(tokens: Int32, position: int, vocab_size: int) -> Int32:
    """The same tokens but for another one at a position of every row."""
    other: Int32 = tokens.copy()
    other[:, position] = (other[:, position] + 1 + vocab_size // 2) % vocab_size
    return other


def weighted(batch: Batch, until: int) -> Batch:
    """The same batch with weights of 1 before a position, and 0 from it on."""
    weights = np.zeros_like(batch.weights)
    weights[:, :until] = 1.0
    return replace(batch, weights=weights)
