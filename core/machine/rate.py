"""How fast training is taken to be before a step of it has been seen: a share of a rate of matmul."""

import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from core.config.schema import RunConfig
from core.machine.facts import MachineFacts
from core.machine.resolvers import DeviceFacts
from core.machine.speed import flops_per_token, newton_schulz_flops, peak_flops
from core.params import num_parameters, param_specs

# Share of the measured or known matmul rate that training is taken to reach (docs/LOG.md).
UTILISATION = 0.4
# Dense TF32 has half the rate of bfloat16 (data sheets of A100, H100, RTX 4090).
TF32_DIVISOR = 2.0
# Initial values and a step that are expected to take longer are not measured for a forecast.
SLOW_PROBE_S = 15.0
# Initial values that are drawn and loaded in a second, on one core (50 M took 3.3 s).
INITIALISED_PER_S = 15e6


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


def peak_rate(
    device: DeviceFacts, chip: str | None, precision: str, *, tf32: bool = False
) -> float | None:
    """FLOP/s of a GPU's large matmuls in a precision, None where they are not known.

    Args:
        device: The device.
        chip: Name of its GPU.
        precision: "float32", "bfloat16" or "float16".
        tf32: Whether float32 matmuls may be of reduced precision.
    """
    if precision == "bfloat16" and not device.native_bf16:
        precision = "float32"  # it is converted for each product
    if precision == "float32" and tf32 and device.backend == "cuda" and device.native_bf16:
        half = peak_flops(chip or "", "bfloat16")
        return None if half is None else half / TF32_DIVISOR
    return peak_flops(chip or "", precision)


def rate_of(device: DeviceFacts, chip: str | None, precision: str, *, tf32: bool = False) -> Rate:
    """What training is taken to reach on a device.

    Args:
        device: The device.
        chip: Name of its GPU, None for a processor.
        precision: The configuration's `train.precision`.
        tf32: Its `train.tf32`.
    """
    if device.is_gpu:
        peak = peak_rate(device, chip, precision, tf32=tf32)
        if peak is None:
            return Rate(None, f"unknown: no matmul rate of {chip or 'this GPU'} is known")
        return Rate(UTILISATION * peak, f"predicted: {UTILISATION:.0%} of the known matmul rate")
    flops = matmul_flops()
    how = f"predicted: {UTILISATION:.0%} of {flops / 1e9:.0f} GFLOP/s of numpy's matmul, just measured"
    return Rate(UTILISATION * flops, how)


def step_seconds(config: RunConfig, rate: Rate, length: int) -> float | None:
    """How long a step is expected to take, None where the rate is not known.

    Args:
        config: The experiment.
        rate: What it is taken to reach.
        length: Positions of a row.
    """
    if rate.flops is None:
        return None
    specs, t = param_specs(config.model), config.train
    positions = t.micro_batch_size * t.grad_accum_steps * length
    work = flops_per_token(config.model, specs, config.data.seq_len) * positions
    products = newton_schulz_flops(specs, t.ns_steps) if t.optimizer == "muon" else 0.0
    # Newton-Schulz is nothing but large products: 56 of 81 GFLOP/s at width 512, on two cores.
    return work / rate.flops + products * UTILISATION / rate.flops


def predicted_speed(
    config: RunConfig, device: DeviceFacts, machine: MachineFacts, length: int
) -> tuple[float | None, str]:
    """Expected positions per second, None where no rate is known, and how they are known.

    Args:
        config: The experiment.
        device: The device of the run.
        machine: The machine that has it.
        length: Positions of a row.
    """
    t = config.train
    rate = rate_of(device, chip_of(machine), t.precision, tf32=t.tf32)
    step = step_seconds(config, rate, length)
    if step is None:
        return None, rate.how
    return t.micro_batch_size * t.grad_accum_steps * length / step, rate.how


def slow_speed(
    config: RunConfig, device: DeviceFacts, machine: MachineFacts, length: int
) -> tuple[float, str] | None:
    """`predicted_speed`, where measuring would take long.

    Returns:
        None where initial values and a step take at most `SLOW_PROBE_S`, or no rate is known.
    """
    t = config.train
    speed, how = predicted_speed(config, device, machine, length)
    if speed is None:
        return None
    initial = num_parameters(param_specs(config.model)) / INITIALISED_PER_S
    step = t.micro_batch_size * t.grad_accum_steps * length / speed
    return None if initial + step <= SLOW_PROBE_S else (speed, how)


@lru_cache(maxsize=1)
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
