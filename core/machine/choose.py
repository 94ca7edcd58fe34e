"""Which backend `auto` means on this machine."""

from collections.abc import Mapping

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


def choose_backend(
    available: Mapping[str, Availability], *, is_apple_silicon: bool
) -> tuple[str, str]:
    """Name of the best backend that can run, and why it is that one.

    Args:
        available: Every backend by name, as `backends.available()` gives it.
        is_apple_silicon: Whether the machine is a Mac with an Apple chip.

    Raises:
        PippinError: P501 where none can run; says why for each.
    """
    order = _ON_APPLE_SILICON if is_apple_silicon else _ELSEWHERE
    passed_over: list[str] = []
    for name in order:
        state = available.get(name)
        if state is None:
            continue
        if state.ok:
            return name, "; ".join([_REASON[name], *passed_over])
        # On a PC the absence of Apple's or NVIDIA's hardware is no news.
        if is_apple_silicon:
            passed_over.append(f"not {name}: {state.reason}")
    states = [s for s in available.values() if not s.ok]
    raise PippinError(
        "P501",
        "no backend can run here.",
        found="\n".join(f"{s.name}: {s.reason}" for s in states),
        remedy=next((s.remedy for s in states if s.remedy), "pip install torch"),
        kept="nothing was started.",
    )
