"""Speed of training as the loop does it, and what loading data and logging cost of it."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import backends
from core.backend import Backend, Lazy, MemoryStats
from core.checkpoint import initial_checkpoint
from core.config.load import build, load
from core.config.schema import RunConfig
from core.data.sampling.loader import StepBatches, TrainLoader, open_train_loader
from core.data.shards.stream import TokenStream
from core.machine import detect
from core.machine.autoconfig import DataFacts, resolve_auto, resolve_early
from core.machine.speed import flops_per_token, peak_flops
from core.machine.system import process_memory
from core.params import num_parameters, param_specs
from core.training.runlog import RunLog
from core.training.schedule import step_hyper
from tools.benchmarks.report import GB, Measured, OtherLoad, median, percentile

LOG_EVERY = 10
# The first steps compile, allocate, and fill the loader's queue.
WARMUP_STEPS = 3
MAX_LOADER_SHARE = MAX_LOG_SHARE = 0.01
VOCAB_SIZE = 4096
STREAM_TOKENS = 4_000_000


@dataclass
class Timings:
    """Seconds of one measurement.

    Attributes:
        steps: Each step by itself, from handing it over until the device is done.
        total: The steps as the loop does them: the device is waited for at log steps alone.
        loader: Of `total`, waiting for the loader.
        log: Of `total`, making and writing rows once the device was done.
        rows: Rows written.
        tokens: Trained in `total`.
        memory: The backend's counters after the last step.
    """

    steps: list[float] = field(default_factory=list)
    total: float = 0.0
    loader: float = 0.0
    log: float = 0.0
    rows: int = 0
    tokens: int = 0
    memory: MemoryStats = field(default_factory=lambda: MemoryStats(None, None, None))


def resolve_config(name: str, config: str | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration to measure; sizes that are "auto" are those of a small model.

    Raises:
        PippinError: P010 to P012 for a configuration, P501 and P502 for a backend.
    """
    flags = {"train.backend": name}
    draft = load(config=config or "quickstart", overrides=overrides, flags=flags)
    device = detect.device_facts(name, backends.available()).device
    resolve_early(draft, device)
    draft.resolve("data.tokenizer", "byte", "not used")
    draft.resolve("train.save_dir", "checkpoints/benchmark", "nothing is kept there")
    data = DataFacts(VOCAB_SIZE, train_tokens=STREAM_TOKENS, name="benchmark", is_stories=False)
    resolve_auto(draft, data, device, None)
    return build(draft)


def measure(config: RunConfig, num_steps: int) -> tuple[list[Measured], dict[str, Any]]:
    """Train on random tokens, `num_steps` steps twice, and sum up.

    Returns:
        The figures, and facts for the report.
    """
    with opened(config, num_steps) as (backend, folder, facts):
        others = OtherLoad()
        timings = _time(backend, config, num_steps, folder)
    flops = flops_per_token(config.model, param_specs(config.model), config.data.seq_len)
    rows = figures(timings, flops, facts["peak_flops"])
    return [*rows, others.figure()], facts


@contextmanager
def opened(config: RunConfig, num_steps: int) -> Iterator[tuple[Backend, Path, dict[str, Any]]]:
    """A backend with fresh weights, a folder for its files, and facts for the report; all go again."""
    specs = param_specs(config.model)
    backend = backends.load(config.train.backend)(config, specs, mode="train")
    try:
        backend.load(initial_checkpoint(config, specs))
        info = backend.device_info()
        facts = {
            "backend": info.backend,
            "framework": info.framework,
            "device": info.device,
            "parameters": num_parameters(specs),
            "steps": num_steps,
            "peak_flops": peak_flops(
                info.device,
                config.train.precision,
                backend=info.backend,
                native_bf16=info.native_bf16,
                tf32=config.train.tf32,
            ),
            "config": config.model_dump(mode="json"),
        }
        with tempfile.TemporaryDirectory(prefix="pippin-benchmark-") as folder:
            yield backend, Path(folder), facts
    finally:
        backend.close()


def _time(backend: Backend, config: RunConfig, num_steps: int, folder: Path) -> Timings:
    out = Timings()
    loader = open_train_loader(random_stream(config, folder / "tokens.bin"), config)
    log = RunLog(folder)
    try:
        for _ in range(WARMUP_STEPS):
            _step(backend, config, next(loader))
        backend.synchronize()
        _as_the_loop_does(backend, config, loader, log, num_steps, out)
        for _ in range(num_steps):
            batch = next(loader)
            start = time.perf_counter()
            float(_step(backend, config, batch)["loss"])
            backend.synchronize()
            out.steps.append(time.perf_counter() - start)
        out.memory = backend.memory()
    finally:
        log.close()
        loader.close()
    return out


def _as_the_loop_does(
    backend: Backend,
    config: RunConfig,
    loader: TrainLoader,
    log: RunLog,
    num_steps: int,
    out: Timings,
) -> None:
    begin = time.perf_counter()
    for i in range(num_steps):
        asked = time.perf_counter()
        batch = next(loader)
        out.loader += time.perf_counter() - asked
        metrics = _step(backend, config, batch)
        out.tokens += batch.tokens
        if (i + 1) % LOG_EVERY == 0:
            # Waiting for the device is the step's time, not the log's.
            float(metrics["loss"])
            backend.synchronize()
            asked = time.perf_counter()
            write_row(backend, config, log, batch.step, metrics)
            out.log += time.perf_counter() - asked
            out.rows += 1
    backend.synchronize()
    out.total = time.perf_counter() - begin


def _step(backend: Backend, config: RunConfig, batch: StepBatches) -> Mapping[str, Lazy]:
    hyper = step_hyper(batch.step, config.train, batch.normalizer)
    return backend.train_step(batch.micro, hyper)


def write_row(
    backend: Backend, config: RunConfig, log: RunLog, step: int, metrics: Mapping[str, Lazy]
) -> None:
    """What `core.training.loop` gathers and writes at a log step."""
    memory, own = backend.memory(), process_memory(os.getpid())
    row = {name: float(value) for name, value in metrics.items()}
    row |= {
        "learning_rate": step_hyper(step, config.train, 1.0).lr["matrix"],
        "throughput_tokens_per_sec": 1.0,
        "step_time_sec": 1.0,
        "perplexity": float(np.exp(min(row["loss"], 700.0))),
    }
    sizes = {
        "memory_active_bytes": memory.active_bytes,
        "memory_peak_bytes": memory.peak_bytes,
        "memory_process_bytes": own.memory_bytes if own is not None else None,
    }
    log.row(step, {**row, **sizes})


def random_stream(config: RunConfig, path: Path) -> TokenStream:
    """Random ids in a memory-mapped file, as shards are read."""
    vocab_size = config.model.vocab_size
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    count = max(STREAM_TOKENS, 4 * config.data.seq_len)
    np.random.default_rng(0).integers(0, vocab_size, count, dtype).tofile(path)
    ids = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
    return TokenStream([ids], vocab_size=vocab_size, text_bytes=count)


def figures(t: Timings, flops_a_token: float, peak: float | None) -> list[Measured]:
    """What is reported of the timings.

    Args:
        t: Seconds.
        flops_a_token: Training FLOPs of one token.
        peak: Peak FLOP/s of the device, None where it is not known.
    """
    speed = t.tokens / t.total
    own = process_memory(os.getpid())
    mfu = None if peak is None else 100 * speed * flops_a_token / peak
    log_note = (
        f"{1e3 * t.log / t.rows:.2f} ms a row, every {LOG_EVERY} steps" if t.rows else "no row"
    )
    log_share = t.log / t.total if t.rows else None
    return [
        Measured("speed", speed, "tokens/s"),
        Measured("step, median", 1e3 * median(t.steps), "ms", note="each step waited for"),
        Measured("step, p90", 1e3 * percentile(t.steps, 0.9), "ms"),
        _share("loading data", t.loader / t.total, MAX_LOADER_SHARE, "waiting for the loader"),
        _share("logging", log_share, MAX_LOG_SHARE, log_note),
        Measured("memory of the process", _gb(own.memory_bytes if own else None), "GB"),
        Measured("memory of the device, peak", _gb(t.memory.peak_bytes), "GB"),
        Measured("MFU", mfu, "%", note="" if peak else "peak of this device is not known"),
    ]


def _share(name: str, value: float | None, most: float, note: str) -> Measured:
    shown = None if value is None else 100 * value
    return Measured(name, shown, "% of the time", 100 * most, note)


def _gb(value: int | None) -> float | None:
    return None if value is None else value / GB
