"""What went wrong on the device, as an error that a user can act on."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from core.backend import Batch, OutOfMemory
from core.errors import PippinError

# How the allocators say it, in lower case: of CUDA and its libraries, of MPS, which refuses a single
# buffer beyond its limit as "Invalid buffer size: 48.00 GiB", and of the CPU (c10/core/impl/alloc_cpu).
OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "insufficient memory",
    "invalid buffer size",
    "_status_alloc_failed",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
)
# aten/src/ATen/mps/MPSFallback.mm.
MISSING_OPERATOR = re.compile(
    r"The operator '([^']+)' is not currently (?:implemented|supported) (?:for|on) the MPS"
)

FEWER_TOKENS = "fewer --num-samples or --max-new-tokens, or close other programs"

# Rows, tokens, and whether they are packed.
Shape = tuple[int, int, bool]

F = TypeVar("F", bound=Callable[..., Any])


def shapes_of(micro: Sequence[Batch]) -> set[Shape]:
    """What a compiler sees of a step: each other shape is compiled once more."""
    return {(*b.tokens.shape, b.segments is not None) for b in micro}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in OUT_OF_MEMORY)


def missing_operator(error: BaseException) -> str | None:
    """The operator, "aten::...", that MPS has no kernel for, where that is what an exception says."""
    found = MISSING_OPERATOR.search(str(error)) if isinstance(error, RuntimeError) else None
    return found[1] if found else None


def explain(error: Exception, *, backend: str, compiling: bool, intact: bool = True) -> Exception:
    """The error itself, or one that a user can act on in its place.

    Args:
        error: What the framework raised.
        backend: Name of the backend.
        compiling: Whether the step was the first of one of its shapes under `train.compile`.
        intact: Whether the state is still that of the last finished step.

    Returns:
        `OutOfMemory`, P504 for an operator without a kernel, P502 for a compiler, or the error.
    """
    if isinstance(error, PippinError):
        return error
    text = str(error)
    first = text.splitlines()[0] if text else ""
    if is_out_of_memory(error):
        what = f"the device ran out of memory ({backend})."
        return OutOfMemory(what, found=first, intact=intact)
    operator = missing_operator(error)
    if operator is not None:
        return PippinError(
            "P504",
            f"this torch has no MPS kernel for the operator {operator}.",
            found=f"torch {torch.__version__} on backend {backend}",
            choices=("--backend mlx", "--backend cpu", "pip install -U torch"),
            remedy="--allow-cpu-fallback   (runs that operator on the CPU, slowly)",
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


def explained(method: F) -> F:
    """A method of a backend whose failures are those of `explain`; the state is not its to change."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            failure = explain(error, backend=self.name, compiling=False)
            if isinstance(failure, OutOfMemory) and self.mode == "infer":
                failure = OutOfMemory(failure.what, found=failure.found, remedy=FEWER_TOKENS)
            if failure is error:
                raise
            raise failure from error

    return cast(F, call)
