"""A compiled loss that is trusted only after it has agreed with the eager one.

PyTorch calls its compiler for Metal an early prototype (`torch/_inductor/codegen/mps.py`, 2.13), and
wrong results were not always errors (pytorch #150454, #152155, #161905).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch_common.device import Loss
from backends.torch_common.optim import global_norm
from core.errors import PippinError

# Largest relative difference of the loss and of the gradient's norm: half precision fuses otherwise.
TOLERANCE = 1e-2


def verified(compiled: Loss, eager: Loss) -> Loss:
    """The compiled loss, which raises P502 where its first result of a shape is not the eager one's.

    Args:
        compiled: `eager`, compiled.
        eager: A loss of a model and of tensors, or None for those that are not there.
    """
    agreed: set[tuple[Any, ...]] = set()

    def loss(model: nn.Module, *args: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shapes = tuple(None if x is None else tuple(x.shape) for x in args)
        if shapes not in agreed:
            _compare(figures(eager, model, args), figures(compiled, model, args))
            agreed.add(shapes)
        return compiled(model, *args)

    return loss


def figures(function: Loss, model: nn.Module, args: Sequence[Tensor | None]) -> tuple[float, float]:
    """A loss and the norm of its gradient; no gradient is kept."""
    params = [p for p in model.parameters() if p.requires_grad]
    value, balance = function(model, *args)
    value = value if balance is None else value + balance
    grads = torch.autograd.grad(value, params, allow_unused=True)
    return float(value.detach()), float(global_norm([g for g in grads if g is not None]))


def _compare(eager: tuple[float, float], compiled: tuple[float, float]) -> None:
    both = list(zip(eager, compiled, strict=True))
    if all(math.isclose(a, b, rel_tol=TOLERANCE) or not math.isfinite(a) for a, b in both):
        return
    raise PippinError(
        "P502",
        "torch.compile computes something else than the eager model on this machine.",
        found="; ".join(
            f"{name} {a:.6g} eager, {b:.6g} compiled"
            for name, (a, b) in zip(("loss", "gradient norm"), both, strict=True)
        ),
        remedy="train.compile=false",
        kept="the step was not taken.",
    )
