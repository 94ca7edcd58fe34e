"""Tiny configs and batches for tests: sizes that differ, so that swapped axes cannot pass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from core.backend import Backend, Batch, StepHyper
from core.checkpoint import initial_checkpoint
from core.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from core.params import GROUPS, ParamSpec, param_specs

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "d_ff": 40,
    "max_seq_len": 32,
    "embed_init_std": 0.02,
    "zero_init_outputs": False,
}
DATA: dict[str, Any] = {
    "tokenizer": "byte",
    "seq_len": 13,
    "sampling": "contiguous",
    "corpus_bytes": 100_000,
}
TRAIN: dict[str, Any] = {
    "backend": "cpu",
    "precision": "float32",
    "compile": False,
    "seed": 7,
    "total_steps": 20,
    "micro_batch_size": 2,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lr_matrix": 1e-2,
    "lr_embed": 2e-2,
    "lr_head": 5e-3,
    "lr_vector": 3e-3,
    "lr_router": 4e-3,
    "warmup_steps": 3,
    "ns_dtype": "float32",
    "eval_interval": 10,
    "ckpt_interval": 10,
    "save_dir": "unused",
}


def tiny_config(**overrides: Any) -> RunConfig:
    """A resolved config of a tiny model; `model__d_model=32` overrides a key.

    Raises:
        KeyError: an override that names no section.
    """
    sections = {"model": dict(MODEL), "data": dict(DATA), "train": dict(TRAIN)}
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        sections[section][key] = value
    return RunConfig(
        model=ModelConfig(**sections["model"]),
        data=DataConfig(**sections["data"]),
        train=TrainConfig(**sections["train"]),
    )


def random_batch(
    config: RunConfig,
    *,
    rows: int = 2,
    length: int | None = None,
    seed: int = 0,
    row0: int = 0,
    segments: bool = False,
) -> Batch:
    """A random micro-batch with some weights 0 and some other than 1, and packed rows if asked."""
    rng = np.random.default_rng([seed, row0])
    t = config.data.seq_len if length is None else length
    stream = rng.integers(0, config.model.vocab_size, (rows, t + 1), dtype=np.int32)
    weights = rng.choice(np.array([0.0, 0.5, 1.0, 1.0], np.float32), (rows, t))
    weights[:, 0] = 1.0
    parts = np.sort(rng.integers(0, 3, (rows, t), dtype=np.int32), axis=1) if segments else None
    return Batch(stream[:, :-1].copy(), stream[:, 1:].copy(), weights, segments=parts, row0=row0)


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The same rows as `parts` micro-batches of equal size."""
    rows = batch.tokens.shape[0] // parts
    cut = [slice(i * rows, (i + 1) * rows) for i in range(parts)]
    return [
        Batch(
            batch.tokens[s],
            batch.targets[s],
            batch.weights[s],
            segments=None if batch.segments is None else batch.segments[s],
            row0=batch.row0 + s.start,
        )
        for s in cut
    ]


def step_hyper(
    config: RunConfig,
    step: int,
    batches: Sequence[Batch],
    *,
    max_grad_norm: float | None = None,
    normalizer: float | None = None,
    lr_scale: float = 1.0,
) -> StepHyper:
    """The numbers of one step: the config's rates, decay on all but vectors, the batches' weight."""
    train = config.train
    rates = {g: lr_scale * float(getattr(train, f"lr_{g}")) for g in GROUPS}
    decay = {g: 0.0 if g == "vector" else train.weight_decay for g in GROUPS}
    total = float(sum(b.weights.astype(np.float64).sum() for b in batches))
    return StepHyper(
        step=step,
        lr=rates,
        weight_decay=decay,
        momentum=train.momentum,
        normalizer=total if normalizer is None else normalizer,
        max_grad_norm=train.max_grad_norm if max_grad_norm is None else max_grad_norm,
    )


def random_params(
    specs: Sequence[ParamSpec], *, seed: int = 0, std: float = 0.15
) -> dict[str, np.ndarray]:
    """Parameters far from their initial values: no gain is 1, no matrix is 0. float32."""
    rng = np.random.default_rng(seed)
    return {
        s.name: (rng.standard_normal(s.shape) * std + (1.0 if s.group == "vector" else 0.0)).astype(
            np.float32
        )
        for s in specs
    }


class ArrayCheckpoint:
    """A checkpoint in memory, of any tensors and backend state."""

    def __init__(
        self,
        config: RunConfig,
        tensors: Mapping[str, np.ndarray],
        *,
        step: int = 0,
        backend_state: dict[str, float] | None = None,
    ) -> None:
        first = initial_checkpoint(config, param_specs(config.model)).meta
        self.meta = replace(first, step=step, backend_state=backend_state or {})
        self.names = tuple(tensors)
        self._tensors = dict(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return "bfloat16" if self._tensors[name].dtype == np.uint16 else "float32"

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].copy()

    def close(self) -> None:
        pass


def snapshot(backend: Backend) -> dict[str, np.ndarray]:
    """Copies of every tensor of a backend."""
    return {name: np.array(value) for name, value in backend.tensors()}


def assert_same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    """Two sets of float32 tensors are equal bit for bit, NaN and signs of zero included."""
    assert a.keys() == b.keys()
    differ = [n for n in a if a[n].view(np.uint32).tobytes() != b[n].view(np.uint32).tobytes()]
    assert not differ, differ
