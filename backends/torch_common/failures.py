"""What went wrong in a training step, as an error that a user can act on."""

from collections.abc import Sequence

import torch

from core.backend import Batch
from core.errors import PippinError

# How the allocators of CUDA and of MPS say it, in lower case. MPS refuses a single buffer beyond its
# limit as "Invalid buffer size: 48.00 GiB".
OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "invalid buffer size")

# Rows, tokens, and whether they are packed.
Shape = tuple[int, int, bool]


def shapes_of(micro: Sequence[Batch]) -> set[Shape]:
    """What a compiler sees of a step: each other shape is compiled once more."""
    return {(*b.tokens.shape, b.segments is not None) for b in micro}


def explain(error: Exception, *, backend: str, compiling: bool) -> Exception:
    """The error itself, or P101 or P502 in its place.

    Args:
        error: What a step raised.
        backend: Name of the backend.
        compiling: Whether the step was the first of one of its shapes under `train.compile`.
    """
    if isinstance(error, PippinError):
        return error
    text = str(error)
    first = text.splitlines()[0] if text else ""
    if isinstance(error, torch.OutOfMemoryError) or any(s in text.lower() for s in OUT_OF_MEMORY):
        return PippinError(
            "P101",
            f"the device ran out of memory in a training step ({backend}).",
            found=first,
            remedy="halve train.micro_batch_size and double train.grad_accum_steps",
        )
    if compiling:
        return PippinError(
            "P502",
            "torch.compile does not work for this model on this machine.",
            found=f"{type(error).__name__}: {first}",
            remedy="train.compile=false",
            kept="the step was not taken.",
        )
    return error
