"""FLOPs, peak rates and a short measurement of training speed.

FLOPs count matrix products only, forward and backward: 6 per multiplied parameter and token, and
12 L H Dh T for attention counted in full (PaLM, arXiv 2204.02311, appendix B). Muon's Newton-Schulz is not
counted, so it shows as lost utilisation.
"""

import math
import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from core.backend import Backend, Batch, StepHyper
from core.config.schema import ModelConfig, RunConfig
from core.params import GROUPS, ParamSpec, num_matmul_parameters

# Dense matmul rates in TFLOP/s: (float32, half). Measured with large matrices, public data of
# zzc0721/torch-performance-test-data and of the makers; other chips have no MFU.
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "Apple M1 Pro": (4.28, 4.75),
    "Apple M3 Max": (11.5, 12.8),
    "Apple M4": (2.98, 3.12),
    "Apple M4 Max": (13.8, 14.8),
    "NVIDIA H200": (51.0, 790.0),
    "NVIDIA H100": (52.0, 784.0),
    "NVIDIA A100": (19.0, 265.0),
    "NVIDIA GeForce RTX 4090": (55.0, 170.0),
    "Tesla T4": (4.0, 42.0),
}
# What a driver writes after the name of the same chip. Anything else is another one, and slower: "PCIe",
# "NVL", "Laptop GPU", "D", a slice ("MIG 1g.10gb"), "Pro".
SAME_CHIP = {
    "NVIDIA H200": r"( SXM5?)?( 141GB)?( HBM3e)?",
    "NVIDIA H100": r"( SXM5?)?( 80GB)?( HBM3)?",
    "NVIDIA A100": r"(-SXM4?(-(40|80)GB)?)?",
}
# Dense TF32 has half the rate of bfloat16 (data sheets of A100, H100, RTX 4090).
TF32_DIVISOR = 2.0


def flops_per_token(model: ModelConfig, specs: Sequence[ParamSpec], seq_len: int) -> float:
    """Training FLOPs of one token, forward and backward."""
    attention = 12.0 * model.n_layers * model.n_heads * model.head_dim * seq_len
    return 6.0 * num_matmul_parameters(specs) + attention


def newton_schulz_flops(specs: Sequence[ParamSpec], ns_steps: int) -> float:
    """FLOPs of Muon's Newton-Schulz in one step: X X^T, its square, and their product with X."""
    total = 0.0
    for spec in specs:
        if spec.group == "matrix":
            *stacked, rows, columns = spec.shape
            short, long = sorted((rows, columns))
            each = 4.0 * short**2 * long + 2.0 * short**3
            total += ns_steps * each * math.prod(stacked)
    return total


def peak_flops(
    device: str,
    precision: str,
    *,
    backend: str = "",
    native_bf16: bool = True,
    tf32: bool = False,
) -> float | None:
    """FLOP/s of a device's large products as a run takes them, None where they are not known.

    Args:
        device: Name of the chip, as its driver writes it.
        precision: "float32", "bfloat16" or "float16".
        backend: Of the run; only "cuda" has TF32.
        native_bf16: Whether the device multiplies bfloat16; else it is converted for each product.
        tf32: The configuration's `train.tf32`.
    """
    name = next(
        (n for n in PEAK_TFLOPS if re.fullmatch(re.escape(n) + SAME_CHIP.get(n, ""), device)), None
    )
    if name is None:
        return None
    full, half = (1e12 * rate for rate in PEAK_TFLOPS[name])
    return at_precision(
        full, half, precision, native_bf16=native_bf16, tf32=tf32 and backend == "cuda"
    )


def at_precision(
    full: float, half: float, precision: str, *, native_bf16: bool, tf32: bool
) -> float:
    """The rate of products in a precision.

    Args:
        full: Rate in float32.
        half: Rate in float16, and in bfloat16 where it is native.
        precision: As in `peak_flops`.
        native_bf16: As in `peak_flops`.
        tf32: Whether float32 products are of reduced precision, where the chip can.
    """
    if precision == "float16" or (precision == "bfloat16" and native_bf16):
        return half
    return half / TF32_DIVISOR if precision == "float32" and tf32 and native_bf16 else full


class PhaseClock:
    """Seconds of the parts of a step; the device is waited for at the end of each.

    Args:
        wait: Waits for the device: a clock that does not, times the handing over of work.
        clock: Monotonic seconds.
    """

    def __init__(
        self, wait: Callable[[], None], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._wait, self._clock = wait, clock
        wait()
        self._last = clock()

    def mark(self, phase: str) -> None:
        """End a part: the time since the last mark, or the start, is its own."""
        self._wait()
        now = self._clock()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def measure_tokens_per_s(
    backend: Backend,
    config: RunConfig,
    *,
    seconds: float,
    length: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Train on random tokens for a moment and return positions per second.

    The first step (compilation, allocation) is left out. Rates are 0, so nothing is learned.

    Args:
        backend: A loaded backend in mode "train".
        config: Its configuration.
        seconds: How long to measure; at least one step is timed.
        length: Positions of a row; `data.seq_len` by default.
        clock: Monotonic clock in seconds.
    """
    rng = np.random.default_rng(0)
    rows, length = config.train.micro_batch_size, length or config.data.seq_len
    tokens = rng.integers(0, config.model.vocab_size, (rows, length + 1), np.int32)
    batch = Batch(
        np.ascontiguousarray(tokens[:, :-1]),
        np.ascontiguousarray(tokens[:, 1:]),
        np.ones((rows, length), np.float32),
    )
    micro = [batch] * config.train.grad_accum_steps
    zero: dict[str, float] = {group: 0.0 for group in GROUPS}
    hyper = StepHyper(1, zero, zero, 0.9, float(rows * length * len(micro)), 1.0)
    begin = clock()
    float(backend.train_step(micro, hyper)["loss"])
    backend.synchronize()
    start = clock()
    if start - begin > seconds:  # so slow that allocation and compiling matter little
        return hyper.normalizer / (start - begin)
    times: list[float] = []
    while not times or clock() - start < seconds:
        begin = clock()
        float(backend.train_step(micro, hyper)["loss"])
        backend.synchronize()
        times.append(clock() - begin)
    # The median: another program's moment is not this machine's speed.
    return hyper.normalizer / sorted(times)[(len(times) - 1) // 2]
