"""Small checkpoints for tests, in both formats."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from backends.torch_common.checkpoint import open_pt, write_pt
from core.checkpoint import Checkpoint, Meta, open_npz, write_npz

OPEN: dict[str, Callable[[Path], Checkpoint]] = {".npz": open_npz, ".pt": open_pt}
WRITE: dict[str, Callable[..., Path]] = {".npz": write_npz, ".pt": write_pt}
SUFFIXES = (".npz", ".pt")


def tiny_meta(**changes: Any) -> Meta:
    """A meta with something in every field."""
    values: dict[str, Any] = {
        "step": 500,
        "tokens_seen": 123_456,
        "model": {"n_layers": 2, "norm_eps": 1e-5},
        "config": {"model": {"n_layers": 2}, "data": {"input_file": None}},
        "tokenizer": {"sha256": "ab" * 32, "vocab_size": 61},
        "data": {"manifest_sha256": "cd" * 32, "seed": 7},
        "optimizer": "muon",
        "loop": {"best_val_loss": 0.1 + 0.2, "best_step": 400},
        "backend": {"name": "mlx", "framework": "mlx", "version": "0.32.4"},
        "backend_state": {"loss_scale": 65536.0, "skipped_total": 3},
    }
    return Meta(**(values | changes))


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """One tensor of each dtype and kind; every bit pattern may occur, NaN and infinities too."""
    rng = np.random.default_rng(seed)

    def bits(dtype: str, *shape: int) -> np.ndarray:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(rng.bytes(count), dtype).reshape(shape)

    return {
        "embed_tokens.weight": bits("<f4", 13, 6),
        "layers.0.input_layernorm.weight": bits("<f4", 7),
        "layers.0.mlp.up_proj.weight": bits("<u2", 5, 11),
        "layers.1.mlp.up_proj.weight": bits("<f2", 3, 2, 5),
        "optim/exp_avg_sq/embed_tokens.weight": bits("<f4", 13, 6),
        "ema/layers.0.input_layernorm.weight": bits("<f4", 7),
    }


def write_tiny(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny checkpoint in the format of the suffix."""
    return WRITE[path.suffix](path, tiny_meta(**changes), iter(tiny_tensors(seed).items()))


def contents(ckpt: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors."""
    for name in ckpt.names:
        yield name, ckpt.read(name)
