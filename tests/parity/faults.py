"""Errors of one part in a thousand, put into the MLX backend: every comparison must see them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from core.backend import Backend
from core.checkpoint import Checkpoint
from tests.parity.compare import CLIP, DECAY, NORM_EPS, Gained, Scaled, make, setting

FACTOR = 1.001


@dataclass(frozen=True)
class Fault:
    """Config keys that are wrong, a tensor that is scaled, or code that is replaced."""

    overrides: dict[str, Any] = field(default_factory=dict)
    tensor: str | None = None
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext


def _rms() -> AbstractContextManager[Any]:
    from backends.mlx.layers import RMSNorm

    healthy = RMSNorm.__call__
    return mock.patch.object(RMSNorm, "__call__", lambda self, x: healthy(self, x) * FACTOR)


def _newton_schulz() -> AbstractContextManager[Any]:
    from backends.mlx import optim

    a, b, c = optim.NS_COEFFICIENTS
    return mock.patch.object(optim, "NS_COEFFICIENTS", (a * FACTOR, b, c))


def _naive_sum() -> AbstractContextManager[Any]:
    from backends.mlx import layers

    return mock.patch.object(layers, "FSUM_BLOCK", 1 << 40)


FORWARD = {
    "rms": Fault(patch=_rms),
    "norm_eps": Fault({"model__norm_eps": NORM_EPS * FACTOR}),
    "rope_theta": Fault({"model__rope_theta": 10_000.0 * FACTOR}),
    "down_proj": Fault(tensor="layers.1.mlp.down_proj.weight"),
    "k_norm": Fault(tensor="layers.1.self_attn.k_norm.weight"),
}
DROPOUT = {"dropout": Fault({"model__dropout": 0.1 * FACTOR})}
OPTIMIZER = {
    "lr": Fault({"train__lr_matrix": 1e-2 * FACTOR}),
    "weight_decay": Fault({"train__weight_decay": DECAY * FACTOR}),
    "beta1": Fault({"train__beta1": 0.9 * FACTOR}),
    "beta2": Fault({"train__beta2": 0.95 * FACTOR}),
    "newton_schulz": Fault(patch=_newton_schulz),
}
# Muon and AdamW hardly depend on the size of a gradient; their state does.
CLIPPING = Fault({"train__max_grad_norm": CLIP * FACTOR})
NAIVE_SUM = Fault(patch=_naive_sum)


@contextmanager
def faulty(fault: Fault, *, scale: float = 8.0, **overrides: Any) -> Iterator[Backend]:
    """The MLX backend with a fault, for as long as the context lasts."""
    config = setting("mlx", **(overrides | fault.overrides))
    ckpt: Checkpoint = Gained(config, scale=scale)
    if fault.tensor is not None:
        ckpt = Scaled(ckpt, fault.tensor, FACTOR)
    with fault.patch():
        yield make(config, ckpt)
