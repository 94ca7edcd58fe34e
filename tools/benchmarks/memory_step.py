"""Measures the peak of steps 2 and 3 of one configuration, in a process of its own.

    python -m tools.benchmarks.memory_step fixed < config.json

The configuration is a resolved one, as JSON. Where the backend has a counter of its own, its peak is
what counts. On the CPU it is resident memory: with `fixed`, glibc gives every block of 64 KiB or more
back to the system when it is freed, so that resident memory is what is alive; with `ordinary` its heap
keeps them, as in a run.
"""

import ctypes
import json
import platform
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import backends
from core.backend import Backend, Batch
from core.checkpoint import initial_checkpoint
from core.config.schema import RunConfig
from core.params import param_specs
from core.training.schedule import step_hyper

MMAP_THRESHOLD = 64 << 10
# Numbers of `man 3 mallopt`.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
SAMPLE_SECONDS = 0.002


def fix_allocator() -> bool:
    """Have glibc give freed blocks back at once; False where the allocator is another."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, MMAP_THRESHOLD)
    libc.mallopt(M_MMAP_MAX, 1 << 30)
    libc.malloc_trim(0)
    return True


def random_batches(config: RunConfig) -> list[Batch]:
    """One step's micro-batches of random tokens, all of them trained on."""
    rng = np.random.default_rng(0)
    rows, length = config.train.micro_batch_size, config.data.seq_len
    micro = []
    for index in range(config.train.grad_accum_steps):
        ids = rng.integers(0, config.model.vocab_size, (rows, length + 1), np.int32)
        segments = None
        if config.data.sampling == "packed":
            halves = (np.arange(length) * 2 // length).astype(np.int32)
            segments = np.tile(halves, (rows, 1))
        micro.append(
            Batch(
                np.ascontiguousarray(ids[:, :-1]),
                np.ascontiguousarray(ids[:, 1:]),
                np.ones((rows, length), np.float32),
                segments=segments,
                row0=index * rows,
            )
        )
    return micro


def resident_peak(work: Callable[[], None]) -> int:
    """The most resident memory of this process while `work` runs, in bytes."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak begins anew
    except OSError:
        return _sampled_peak(work)
    work()
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return _sampled_peak(work)


def _sampled_peak(work: Callable[[], None]) -> int:
    process, done, most = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            most[0] = max(most[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    work()
    done.set()
    thread.join()
    return most[0]


def measure(config: RunConfig, *, fixed: bool) -> dict[str, Any]:
    """Train three steps and measure the last two.

    Args:
        config: What to train.
        fixed: Whether the allocator keeps nothing; no matter where the backend counts by itself.

    Returns:
        `measured_bytes`, `counter` (what was read), `framework_bytes` before the model.
    """
    specs = param_specs(config.model)
    create = backends.load(config.train.backend)
    before = psutil.Process().memory_info().rss
    backend = create(config, specs, mode="train")
    is_fixed = fix_allocator() if fixed else False
    try:
        backend.load(initial_checkpoint(config, specs))
        micro = random_batches(config)
        _step(backend, config, micro, 1)
        if fixed and is_fixed:
            fix_allocator()
        backend.memory(reset_peak=True)

        def work() -> None:
            for step in (2, 3):
                _step(backend, config, micro, step)

        resident = resident_peak(work)
        counted = backend.memory().peak_bytes
    finally:
        backend.close()
    kind = "resident, fixed" if is_fixed else "resident"
    return {
        "measured_bytes": resident if counted is None else counted,
        "counter": kind if counted is None else f"{config.train.backend}'s own",
        "framework_bytes": before,
    }


def _step(backend: Backend, config: RunConfig, micro: list[Batch], step: int) -> None:
    total = float(sum(batch.weights.sum() for batch in micro))
    float(backend.train_step(micro, step_hyper(step, config.train, total))["loss"])
    backend.synchronize()


def main() -> int:
    """Read a configuration, print the figures."""
    config = RunConfig.model_validate_json(sys.stdin.read())
    with suppress(BrokenPipeError):
        print(json.dumps(measure(config, fixed=sys.argv[1:] != ["ordinary"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
