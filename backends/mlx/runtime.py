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
from importlib import metadata
from types import ModuleType
from typing import Any

from core.backend import DeviceInfo, MemoryStats

# Shares of Metal's recommended working set. Wiring all of it has crashed machines (mlx-lm #883,
# mlx #3186); at 75 % nothing is reported.
WIRED_FRACTION = 0.75
MEMORY_FRACTION = 0.85
# Shapes of a training run are fixed, so its cache reaches a steady size; generation's vary.
CACHE_BYTES = {"train": 2 << 30, "infer": 256 << 20}
# Apple GPUs compute bfloat16 at the rate of float16 from the M3 on, architecture "applegpu_g15".
FIRST_BF16_GENERATION = 15
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
    # Not beside torch: its matmuls would call OpenBLAS from inside their own threads.
    loaded = {"mlx.core", "torch"} & set(sys.modules)
    if sys.platform == "linux" and not loaded:
        # The BLAS in MLX's CPU wheel is a reference one: with OpenBLAS in front of it a float32
        # matmul is 15 times faster (measured 2026-11 on 2 cores of an EPYC, mlx 0.32.4).
        with contextlib.suppress(OSError):
            ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL)
    return importlib.import_module("mlx.core")


def on_gpu(mx: Any) -> bool:
    """Whether MLX's default device is a GPU, of Apple or NVIDIA."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def on_metal(mx: Any) -> bool:
    """Whether MLX's default device is Metal's."""
    return on_gpu(mx) and bool(mx.metal.is_available())


def describe_device(mx: Any) -> DeviceInfo:
    """MLX's default device."""
    facts = _facts(mx)
    budget = facts.get("max_recommended_working_set_size") or facts.get("total_memory")
    generation = "".join(
        c for c in str(facts.get("architecture")).rpartition("_g")[2] if c.isdigit()
    )
    native = not on_metal(mx) or int(generation or 0) >= FIRST_BF16_GENERATION
    return DeviceInfo(
        backend="mlx",
        framework=f"mlx {metadata.version('mlx')}",
        device=str(facts.get("device_name", mx.default_device())),
        budget_bytes=int(budget) if on_gpu(mx) and budget else None,
        native_bf16=on_gpu(mx) and native,
    )


def _facts(mx: Any) -> dict[str, Any]:
    try:
        return dict(mx.device_info())
    except (AttributeError, RuntimeError, ValueError):
        return {}


def memory_stats(mx: Any, *, reset_peak: bool) -> MemoryStats:
    """MLX's counters, which every build has."""
    stats = MemoryStats(
        active_bytes=int(mx.get_active_memory()),
        peak_bytes=int(mx.get_peak_memory()),
        cached_bytes=int(mx.get_cache_memory()),
    )
    if reset_peak:
        mx.reset_peak_memory()
    return stats


def limit_memory(mx: Any, *, fraction: float, mode: str) -> Callable[[], None]:
    """Keep a run from taking the whole Mac; elsewhere nothing is limited.

    Args:
        mx: The module `mlx.core`.
        fraction: `train.memory_fraction`, an upper bound of what is used and of what is wired.
        mode: "train" or "infer", which sets the size of the cache.

    Returns:
        A function that restores the limits that were there.
    """
    budget = int(_facts(mx).get("max_recommended_working_set_size", 0))
    if not on_metal(mx) or budget <= 0:
        return lambda: None
    limits = [
        (mx.set_memory_limit, mx.set_memory_limit(int(min(MEMORY_FRACTION, fraction) * budget))),
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


def largest_buffer(mx: Any) -> int | None:
    """Bytes of the largest array that Metal can hold, which is well below the memory; else None."""
    limit = int(_facts(mx).get("max_buffer_length", 0))
    return limit if on_metal(mx) and limit > 0 else None


def _macos_major() -> int:
    return int(platform.mac_ver()[0].split(".")[0] or 0)
