"""What went wrong in a training step, as an error that a user can act on."""

from collections.abc import Sequence

from core.backend import Batch
from core.errors import PippinError

# How MLX and Metal say it, in lower case: "[metal::malloc] ..." for a buffer that cannot be made, and
# "[METAL] Command buffer execution failed: Insufficient Memory (...OutOfMemory)" for one that runs.
OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "malloc")

# Rows, tokens, whether they are packed, and whether the step is one micro-batch.
Shape = tuple[int, int, bool, bool]


def shapes_of(micro: Sequence[Batch]) -> set[Shape]:
    """What a compiler sees of a step: each other shape is compiled once more."""
    return {(*b.tokens.shape, b.segments is not None, len(micro) == 1) for b in micro}


def check_scores(shape: tuple[int, ...], pair_bytes: int, *, limit: int | None) -> None:
    """Refuse scores of attention that are larger than one array can be.

    Training on Metal is unfused: the scores of a layer `[B, H, T, T]` are one array.

    Args:
        shape: B and T.
        pair_bytes: Bytes of the scores of one query and one key: H times the size of one.
        limit: Bytes of the largest array, None where there is no limit.

    Raises:
        PippinError: P101 if they do not fit.
    """
    rows, length = shape
    row_bytes = pair_bytes * length**2
    if limit is None or rows * row_bytes <= limit:
        return
    fits = limit // row_bytes
    raise PippinError(
        "P101",
        f"the attention scores of {rows} rows of {length} tokens do not fit into one buffer of "
        "this GPU.",
        found=f"{rows * row_bytes:,} bytes; Metal allows {limit:,}",
        remedy=f"train.micro_batch_size={fits} and more train.grad_accum_steps"
        if fits
        else "a shorter data.seq_len",
    )


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
    if isinstance(error, MemoryError) or any(s in text.lower() for s in OUT_OF_MEMORY):
        return PippinError(
            "P101",
            f"the device ran out of memory in a training step ({backend}).",
            found=first,
            remedy="halve train.micro_batch_size and double train.grad_accum_steps",
        )
    if compiling:
        return PippinError(
            "P502",
            "mx.compile does not work for this model on this machine.",
            found=f"{type(error).__name__}: {first}",
            remedy="train.compile=false",
            kept="the step was not taken.",
        )
    return error
