"""Which backend `auto` means on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass

from core.backend import Availability
from core.errors import PippinError

# Best first. MLX is for Apple silicon: elsewhere it runs for tests, slower than torch.
_ON_APPLE_SILICON = ("mlx", "mps", "cpu")
_ELSEWHERE = ("cuda", "mps", "cpu")
_REASON = {
    "mlx": "MLX on Apple silicon",
    "mps": "PyTorch on Apple's GPU",
    "cuda": "an NVIDIA GPU",
    "cpu": "no GPU that a backend can use",
}


@dataclass(frozen=True)
class Remembered:
    """What `tools/benchmark.py compare` measured on this machine with these versions.

    Attributes:
        tokens_per_s: Trained tokens per second by backend.
        date: When, as 2026-11-20.
        machine: The machine in a word: "Mac" or "machine".
    """

    tokens_per_s: Mapping[str, float]
    date: str
    machine: str = "machine"


def choose_backend(
    available: Mapping[str, Availability],
    *,
    is_apple_silicon: bool,
    remembered: Remembered | None = None,
) -> tuple[str, str]:
    """Name of the best backend that can run, and why it is that one.

    Args:
        available: Every backend by name, as `backends.available()` gives it.
        is_apple_silicon: Whether the machine is a Mac with an Apple chip.
        remembered: An earlier measurement, which may change the order of those that are chosen
            from; it never adds one, and never puts the CPU before a GPU: that a small model is faster
            there says nothing of a larger one.

    Raises:
        PippinError: P501 where none can run; says why for each.
    """
    order = _ON_APPLE_SILICON if is_apple_silicon else _ELSEWHERE
    here = [name for name in order if name in available and available[name].ok]
    if here:
        if remembered is not None:
            measured = choose_measured(
                available, is_apple_silicon=is_apple_silicon, remembered=remembered
            )
            if measured is not None:
                return measured
        # On a PC the absence of Apple's or NVIDIA's hardware is no news.
        better = order[: order.index(here[0])] if is_apple_silicon else ()
        passed_over = [f"not {n}: {available[n].reason}" for n in better if n in available]
        return here[0], "; ".join([_REASON[here[0]], *passed_over])
    states = [s for s in available.values() if not s.ok]
    raise PippinError(
        "P501",
        "no backend can run here.",
        found="\n".join(f"{s.name}: {s.reason}" for s in states),
        remedy=next((s.remedy for s in states if s.remedy), "pip install torch"),
        kept="nothing was started.",
    )


def choose_measured(
    available: Mapping[str, Availability], *, is_apple_silicon: bool, remembered: Remembered
) -> tuple[str, str] | None:
    """The fastest of the GPU backends that are here, and why; None unless each was measured."""
    order = _ON_APPLE_SILICON if is_apple_silicon else _ELSEWHERE
    gpus = [n for n in order if n != "cpu" and n in available and available[n].ok]
    if len(gpus) < 2:
        return None
    speeds = {n: remembered.tokens_per_s[n] for n in gpus if n in remembered.tokens_per_s}
    if len(speeds) < len(gpus):
        return None
    first, second = sorted(gpus, key=lambda n: -speeds[n])[:2]
    factor = speeds[first] / speeds[second]
    how = f"{factor:.1f}x" if factor >= 1.05 else "as fast as"
    return first, f"measured {how} {second} on this {remembered.machine}, {remembered.date}"
