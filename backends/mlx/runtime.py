"""How MLX is imported, and the memory limits of a Mac: everything that comes before the model.

MLX reads `MLX_ENABLE_TF32` once, at its first matmul, and binds its BLAS when it is loaded. So all of
the project imports `mlx.core` through `import_mlx`, which prepares both.
"""

import contextlib
import ctypes
import importlib
import os
import platform
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Shares of Metal's recommended working set. Wiring all of it has crashed machines (mlx-lm #883,
# mlx #3186); at 75 % nothing is reported.
WIRED_FRACTION = 0.75
MEMORY_FRACTION = 0.85
# Shapes of a training run are fixed, so its cache reaches a steady size; generation's vary.
CACHE_BYTES = {"train": 2 << 30, "infer": 256 << 20}
# mlx.core raises for a wired limit before this version of macOS.
MIN_MACOS_WIRED = 15


def import_mlx(*, tf32: bool | None = None) -> ModuleType:
    """Import `mlx.core` with its environment prepared.

    Args:
        tf32: Whether float32 matmuls may be of reduced precision. The configuration is the
            experiment, so it overrides the environment; None only states the default, off.

    Raises:
        ImportError: MLX is missing or does not load.
    """
    if tf32 is None:
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
    else:
        os.environ["MLX_ENABLE_TF32"] = "1" if tf32 else "0"
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        # The BLAS in MLX's CPU wheel is a reference one: with OpenBLAS in front of it a float32
        # matmul is 15 times faster (measured 2026-11 on 2 cores of an EPYC, mlx 0.32.4).
        with contextlib.suppress(OSError):
            ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL)
    return importlib.import_module("mlx.core")


def device_facts(mx: Any) -> dict[str, Any]:
    """MLX's facts of the default device; empty where the build has none."""
    try:
        return dict(mx.device_info())
    except (AttributeError, RuntimeError, ValueError):
        return {}


def is_metal(mx: Any) -> bool:
    """Whether MLX computes on Metal."""
    return bool(mx.metal.is_available()) and mx.default_device() == mx.Device(mx.gpu)


def limit_memory(mx: Any, *, fraction: float, mode: str) -> Callable[[], None]:
    """Keep a run from taking the whole Mac; elsewhere nothing is limited.

    Args:
        mx: The module `mlx.core`.
        fraction: `train.memory_fraction`, an upper bound of what is wired.
        mode: "train" or "infer", which sets the size of the cache.

    Returns:
        A function that restores the limits that were there.
    """
    budget = int(device_facts(mx).get("max_recommended_working_set_size", 0))
    if not is_metal(mx) or budget <= 0:
        return lambda: None
    limits = [
        (mx.set_memory_limit, mx.set_memory_limit(int(MEMORY_FRACTION * budget))),
        (mx.set_cache_limit, mx.set_cache_limit(CACHE_BYTES[mode])),
    ]
    if _macos_major() >= MIN_MACOS_WIRED:
        # A limit above `iogpu.wired_limit_mb` raises; then the system's own default stands.
        with contextlib.suppress(RuntimeError, ValueError):
            wired = mx.set_wired_limit(int(min(WIRED_FRACTION, fraction) * budget))
            limits.append((mx.set_wired_limit, wired))

    def restore() -> None:
        for setter, previous in limits:
            setter(previous)

    return restore


def _macos_major() -> int:
    return int(platform.mac_ver()[0].split(".")[0] or 0)
