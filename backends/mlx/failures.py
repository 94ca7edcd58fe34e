"""What went wrong on the device, as an error that a user can act on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from core.backend import Batch, OutOfMemory
from core.errors import PippinError

# How MLX and Metal say it, in lower case: "[metal::malloc] ..." for a buffer that cannot be made, and
# "[METAL] Command buffer execution failed: Insufficient Memory (...OutOfMemory)" for one that runs.
OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "malloc")
# Metal's count of live buffers, not their size (mlx #3849): smaller batches have as many.
TOO_MANY_BUFFERS = "resource limit"

FEWER_TOKENS = "fewer --num-samples or --max-new-tokens, or close other programs"

# Rows, tokens, whether they are packed, and whether the step is one micro-batch.
Shape = tuple[int, int, bool, bool]

F = TypeVar("F", bound=Callable[..., Any])


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
    raise OutOfMemory(
        f"the attention scores of {rows} rows of {length} tokens do not fit into one buffer of "
        "this GPU.",
        found=f"{rows * row_bytes:,} bytes; Metal allows {limit:,}",
        remedy=f"train.micro_batch_size={fits} and more train.grad_accum_steps"
        if fits
        else "a shorter data.seq_len",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    known = isinstance(error, (RuntimeError, ValueError)) and TOO_MANY_BUFFERS not in text
    return known and any(s in text for s in OUT_OF_MEMORY)


def explain(error: Exception, *, backend: str, compiling: bool) -> Exception:
    """The error itself, or one that a user can act on in its place.

    A step makes new weights and state beside the old ones, so whatever fails leaves those whole.

    Args:
        error: What a step raised.
        backend: Name of the backend.
        compiling: Whether the step was the first of one of its shapes under `train.compile`.

    Returns:
        `OutOfMemory`, P101 for too many buffers, P502 for a compiler, or the error.
    """
    if isinstance(error, PippinError):
        return error
    text = str(error)
    first = text.splitlines()[0] if text else ""
    if is_out_of_memory(error):
        what = f"the device ran out of memory ({backend})."
        return OutOfMemory(what, found=first)
    if "malloc" in text and TOO_MANY_BUFFERS in text.lower():
        return PippinError(
            "P101",
            f"Metal holds too many buffers at once ({backend}); their size is not the matter.",
            found=first,
            remedy="--backend mps, or fewer model.n_layers; a restart of the Mac may help",
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


def explained(method: F) -> F:
    """A method of a backend whose failures are those of `explain`; the state is not its to change."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (RuntimeError, ValueError, MemoryError) as error:
            failure = explain(error, backend=self.name, compiling=False)
            if isinstance(failure, OutOfMemory) and self.mode == "infer":
                failure = OutOfMemory(failure.what, found=failure.found, remedy=FEWER_TOKENS)
            if failure is error:
                raise
            raise failure from error

    return cast(F, call)
