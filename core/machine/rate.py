"""How fast training is taken to be before a step of it has been seen: a share of a rate of matmul."""

import time
from dataclasses import dataclass

import numpy as np

from core.machine.facts import MachineFacts
from core.machine.resolvers import DeviceFacts
from core.machine.speed import peak_flops

# Share of the measured or known matmul rate that training is taken to reach (docs/LOG.md).
UTILISATION = 0.4


@dataclass(frozen=True)
class Rate:
    """FLOP/s that training is taken to reach, and how it is known."""

    flops: float | None
    how: str


def chip_of(machine: MachineFacts) -> str | None:
    """Name of the first GPU, as tables of rates have it; None for a processor."""
    if machine.nvidia is not None and machine.nvidia.gpus:
        return machine.nvidia.gpus[0].name
    return machine.apple.chip if machine.apple is not None else None


def rate_of(device: DeviceFacts, chip: str | None) -> Rate:
    """What training is taken to reach on a device.

    Args:
        device: The device.
        chip: Name of its GPU, None for a processor.
    """
    precision = "bfloat16" if device.native_bf16 and device.backend != "mps" else "float32"
    if device.is_gpu:
        peak = peak_flops(chip or "", precision)
        if peak is None:
            return Rate(None, f"unknown: no matmul rate of {chip or 'this GPU'} is known")
        return Rate(UTILISATION * peak, f"predicted: {UTILISATION:.0%} of the known matmul rate")
    flops = matmul_flops()
    how = f"predicted: {UTILISATION:.0%} of {flops / 1e9:.0f} GFLOP/s of numpy's matmul, just measured"
    return Rate(UTILISATION * flops, how)


def matmul_flops(seconds: float = 0.3) -> float:
    """float32 FLOP/s of numpy's matmul on this processor, the best of a short while."""
    n = 768
    a = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    best, end = float("inf"), time.perf_counter() + seconds
    a @ a
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2.0 * n**3 / best
