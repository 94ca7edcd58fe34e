"""How fast training is taken to be before a step of it has been seen: a share of a rate of matmul.

The one such mechanism: `--dry-run`, `tools/show_configs.py` and `auto_configure()` all ask it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from core.config.schema import RunConfig
from core.machine.detect import machine_facts
from core.machine.estimate import estimated_peak
from core.machine.facts import MachineFacts
from core.machine.resolvers import DeviceFacts
from core.machine.speed import flops_per_token, newton_schulz_flops, peak_flops
from core.params import num_parameters, param_specs

# Share of a GPU's matmul rate that training is taken to reach: the lower end of what is published (MLX
# 0.34-0.58).
UTILISATION = 0.35
# Of a processor's: a quiet step of 128 x 4 made 85 GFLOP/s on two cores of 66 each (docs/LOG.md).
CPU_UTILISATION = 0.65
# Of either, what Newton-Schulz reaches: 56 of 81 GFLOP/s at width 512, on two cores.
PRODUCTS_UTILISATION = 0.69
# More cores than this do not speed up steps of small models.
MOST_CORES = 16
# Initial values and a step that are expected to take longer are not measured for a forecast.
SLOW_PROBE_S = 15.0
# Initial values that are drawn and loaded in a second, on one core (50 M took 3.3 s).
INITIALISED_PER_S = 15e6
# So small that BLAS takes one thread (OpenBLAS: m n k up to 2^18): threads that wait for each other
# measure other programs, not this machine. The best of many.
_MATRIX, _PRODUCTS = 64, 10
PROBE_S = 0.2


@dataclass(frozen=True)
class Rate:
    """What training is taken to reach, and how it is known.

    Attributes:
        flops: FLOP/s of a step, None where no rate is known.
        how: In words.
        products: FLOP/s of Newton-Schulz; None is as `flops`.
    """

    flops: float | None
    how: str
    products: float | None = None


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
    return peak_flops(
        chip or "",
        precision,
        backend=device.backend,
        native_bf16=device.native_bf16,
        tf32=tf32,
    )


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
        how = f"predicted: {UTILISATION:.0%} of the known matmul rate"
        return _share(peak, UTILISATION, how)
    flops = matmul_flops()
    how = (
        f"predicted: {CPU_UTILISATION:.0%} of {flops / 1e9:.0f} GFLOP/s of numpy's matmul, just "
        "measured"
    )
    return _share(flops, CPU_UTILISATION, how)


def sizing_rate(
    device: DeviceFacts, machine: MachineFacts, precision: str, *, tf32: bool = False
) -> Rate:
    """`rate_of`, with an estimate for a GPU whose rate nobody measured: to size a model by.

    Args:
        device: The device.
        machine: The machine that has it.
        precision: The configuration's `train.precision`.
        tf32: Its `train.tf32`.
    """
    chip = chip_of(machine)
    rate = rate_of(device, chip, precision, tf32=tf32)
    if not device.is_gpu:
        return replace(rate, how="estimated from a matrix product")
    if rate.flops is not None:
        return replace(rate, how=f"estimated from the published rate of {chip}")
    peak, how = estimated_peak(device, machine, precision, tf32=tf32)
    return _share(peak, UTILISATION, f"estimated from {how}")


def _share(matmul: float, share: float, how: str) -> Rate:
    return Rate(share * matmul, how, PRODUCTS_UTILISATION * matmul)


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
    return work / rate.flops + products / (rate.products or rate.flops)


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
    return speed_at(config, rate, length), rate.how


def speed_at(config: RunConfig, rate: Rate, length: int) -> float | None:
    """Positions per second at a rate, None where it is not known.

    Args:
        config: The experiment.
        rate: What it is taken to reach.
        length: Positions of a row.
    """
    step, t = step_seconds(config, rate, length), config.train
    return None if step is None else t.micro_batch_size * t.grad_accum_steps * length / step


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
def matmul_flops(seconds: float = PROBE_S) -> float:
    """float32 FLOP/s of numpy's matmul on this processor: one core's, times those that may be used."""
    cpu = machine_facts().cpu
    cores = min(cpu.physical_cores or 1, cpu.usable_cores or 1, MOST_CORES)
    return cores * core_flops(seconds)


def core_flops(seconds: float, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of one core: the best of some rows of products of square float32 matrices.

    Args:
        seconds: How long to try.
        clock: Monotonic seconds.
    """
    a = np.ones((_MATRIX, _MATRIX), np.float32)
    out = np.empty_like(a)
    best, start, rounds = math.inf, clock(), 0
    while rounds < 3 or clock() - start < seconds:
        begin = clock()
        for _ in range(_PRODUCTS):
            np.matmul(a, a, out=out)
        best, rounds = min(best, clock() - begin), rounds + 1
    return float(_PRODUCTS * 2.0 * _MATRIX**3 / max(best, 1e-9))
