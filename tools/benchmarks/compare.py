"""The same training on every backend that is here: equal losses, speed, memory, and which to use.

Each backend works in a process of its own, since frameworks would share threads and memory. All start
from the same weights and read the same tokens, which have a pattern to learn, so that a wrong gradient
shows in the loss within a few steps.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import backends
from core.backend import Availability
from core.checkpoint import initial_checkpoint
from core.config.schema import RunConfig
from core.data.sampling.loader import open_train_loader
from core.data.shards.stream import TokenStream
from core.errors import PippinError
from core.machine import detect, remembered
from core.machine.choose import Remembered, choose_backend
from core.machine.system import on_apple_silicon, process_memory
from core.params import num_parameters, param_specs
from core.training.schedule import step_hyper
from tools.benchmarks.report import GB, OtherLoad, median, number

TOOL = Path(__file__).resolve().parents[1] / "benchmark.py"
# Steps whose losses are compared; the first of them compile and allocate and are not timed.
LOSS_STEPS = 12
TIMEOUT_S = 900
# How far losses may differ in nats. Float32: 1.7e-6 was measured between backends over 20 steps of a
# tiny model (docs/numerics.md); other hardware and larger models are given room. Half precision
# rounds to 3 digits in each product.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 5e-2}
# Of a smaller model or step, the speed says little about those that are trained.
MIN_PARAMETERS, MIN_STEP_TOKENS = 1_000_000, 1_024
# Of all processors: what other programs may take before the figures are theirs as much.
MAX_OTHERS = 0.25
# What is compared where nothing is asked for: on a GPU a size that fills it.
GPU_SIZE = ("model.d_model=384", "model.n_layers=6")
STREAM_TOKENS = 400_000


@dataclass(frozen=True)
class Result:
    """One backend.

    Attributes:
        backend: Its name.
        framework: "torch 2.13.0".
        device: Name of the chip.
        precision: dtype of matmuls.
        losses: Of the first steps, in nats a token.
        step_s: Median seconds of a step.
        tokens_per_s: Positions trained a second.
        device_peak_bytes: The framework's own counter, None where it has none.
        process_bytes: Memory of the process at the end.
        other_processors: Processors that other programs kept busy meanwhile.
        error: Why there is nothing, else empty.
    """

    backend: str
    framework: str = ""
    device: str = ""
    precision: str = ""
    losses: tuple[float, ...] = ()
    step_s: float = 0.0
    tokens_per_s: float = 0.0
    device_peak_bytes: int | None = None
    process_bytes: int | None = None
    other_processors: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """All backends, judged.

    Attributes:
        results: As they were measured.
        differences: Largest difference of the losses from the first good result, by backend.
        agree: Whether that is within the tolerance, by backend.
        best: The fastest that agrees, None where there is none.
    """

    results: tuple[Result, ...]
    differences: Mapping[str, float]
    agree: Mapping[str, bool]
    best: str | None

    @property
    def ok(self) -> bool:
        """Whether every backend ran and all agree."""
        return all(not r.error and self.agree[r.backend] for r in self.results)

    def speeds(self) -> dict[str, float]:
        """Tokens per second of what ran and agrees, fastest first."""
        good = [r for r in self.results if not r.error and self.agree[r.backend]]
        return {r.backend: r.tokens_per_s for r in sorted(good, key=lambda r: -r.tokens_per_s)}


def default_size(available: Mapping[str, Availability], overrides: Sequence[str]) -> list[str]:
    """The overrides, with a size for GPUs in front where none is asked for."""
    gpu = any(available[n].ok for n in ("mps", "cuda") if n in available)
    asked = any(
        o.partition("=")[0].strip() in ("model.d_model", "model.n_layers") for o in overrides
    )
    return [*(GPU_SIZE if gpu and not asked else ()), *overrides]


def judge(results: Sequence[Result]) -> Comparison:
    """Compare the losses, and find the fastest that is right.

    With two backends that differ nobody knows which is right; the first is the CPU's, where it is here.
    """
    good = [r for r in results if not r.error]
    reference = next((r for r in good if r.backend == "cpu"), good[0] if good else None)
    differences: dict[str, float] = {}
    agree: dict[str, bool] = {}
    for r in good:
        other = reference if reference is not None else r
        pairs = list(zip(r.losses, other.losses))
        far = max((abs(a - b) for a, b in pairs), default=float("inf"))
        limit = max(TOLERANCE[r.precision], TOLERANCE[other.precision])
        differences[r.backend] = far
        # A NaN is never within a limit.
        agree[r.backend] = far <= limit and all(np.isfinite(r.losses))
    for r in results:
        agree.setdefault(r.backend, False)
    able = [r for r in good if agree[r.backend]]
    best = max(able, key=lambda r: r.tokens_per_s).backend if able else None
    return Comparison(tuple(results), differences, agree, best)


def run_all(configs: Mapping[str, RunConfig], *, seconds: float) -> Comparison:
    """Measure each backend in a process of its own, one after the other."""
    return judge([run_one(name, config, seconds=seconds) for name, config in configs.items()])


def run_one(name: str, config: RunConfig, *, seconds: float) -> Result:
    """One backend; what goes wrong in it becomes its `error`."""
    with tempfile.TemporaryDirectory(prefix="pippin-compare-") as folder:
        job = Path(folder) / "job.json"
        text = json.dumps({"seconds": seconds, "config": config.model_dump(mode="json")})
        job.write_text(text, encoding="utf-8")
        command = [sys.executable, str(TOOL), "compare", "--worker", str(job)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Result(name, error=f"no result after {TIMEOUT_S} s")
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return Result(name, error=lines[0] if lines else f"ended with code {done.returncode}")
        try:
            found = json.loads(done.stdout.strip().splitlines()[-1])
            found["losses"] = tuple(found["losses"])
            return Result(**found)
        except (ValueError, IndexError, KeyError, TypeError):
            return Result(name, error="its process printed no result")


def work(job: Path) -> Result:
    """What a worker does: the losses of the first steps, then the speed."""
    data = json.loads(job.read_text(encoding="utf-8"))
    config = RunConfig.model_validate(data["config"])
    specs = param_specs(config.model)
    backend = backends.load(config.train.backend)(config, specs, mode="train")
    times: list[float] = []
    losses: list[float] = []
    try:
        backend.load(initial_checkpoint(config, specs))
        info = backend.device_info()
        others = OtherLoad()
        loader = open_train_loader(patterned_stream(config, job.parent / "tokens.bin"), config)
        try:
            start = time.perf_counter()
            while len(losses) < LOSS_STEPS or time.perf_counter() - start < data["seconds"]:
                batch = next(loader)
                hyper = step_hyper(batch.step, config.train, batch.normalizer)
                begin = time.perf_counter()
                losses.append(float(backend.train_step(batch.micro, hyper)["loss"]))
                backend.synchronize()
                times.append(time.perf_counter() - begin)
                if len(losses) == LOSS_STEPS // 2:
                    start = time.perf_counter()
        finally:
            loader.close()
        busy = others.figure().value
        memory, own = backend.memory(), process_memory(os.getpid())
    finally:
        backend.close()
    t = config.train
    step_s = median(times[LOSS_STEPS // 2 :])
    return Result(
        backend=config.train.backend,
        framework=info.framework,
        device=info.device,
        precision=t.precision,
        losses=tuple(losses[:LOSS_STEPS]),
        step_s=step_s,
        tokens_per_s=t.micro_batch_size * t.grad_accum_steps * config.data.seq_len / step_s,
        device_peak_bytes=memory.peak_bytes,
        process_bytes=None if own is None else own.memory_bytes,
        other_processors=busy or 0.0,
    )


def worker_main(job: Path) -> int:
    """Print the result of a worker as one line."""
    print(json.dumps(asdict(work(job))))
    return 0


def patterned_stream(config: RunConfig, path: Path) -> TokenStream:
    """Ids of which nine in ten follow from the one before: t' = (3 t + 7) mod V, else any."""
    vocab_size, count = config.model.vocab_size, max(STREAM_TOKENS, 4 * config.data.seq_len)
    rng = np.random.default_rng(0)
    free = rng.random(count) < 0.1
    random = rng.integers(0, vocab_size, count)
    ids = np.empty(count, np.int64)
    last = 0
    for i in range(count):
        last = int(random[i]) if free[i] else (3 * last + 7) % vocab_size
        ids[i] = last
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    ids.astype(dtype).tofile(path)
    stored = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
    return TokenStream([stored], vocab_size=vocab_size, text_bytes=count)


def as_object(found: Comparison, told: str) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "command": "compare",
        "ok": found.ok,
        "recommended": found.best,
        "remembered": told,
        "backends": [
            {
                **asdict(r),
                "agrees": found.agree[r.backend],
                "loss_difference": found.differences.get(r.backend),
            }
            for r in found.results
        ],
    }


def show(console: Console, found: Comparison, configs: Mapping[str, RunConfig], told: str) -> None:
    """Print the table and the recommendation."""
    config = next(iter(configs.values()))
    t = config.train
    size = num_parameters(param_specs(config.model))
    title = (
        f"{size:,} parameters, {t.micro_batch_size * t.grad_accum_steps} rows of "
        f"{config.data.seq_len} tokens"
    )
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("backend", no_wrap=True)
    for name in ("tokens/s", "device GB", "all GB", "loss", "differs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("precision", no_wrap=True)
    for r in found.results:
        if r.error:
            table.add_row(r.backend, *["-"] * 5, "[bold red]FAIL[/]", "")
            continue
        verdict = "[green]PASS[/]" if found.agree[r.backend] else "[bold red]FAIL[/]"
        table.add_row(
            r.backend,
            number(r.tokens_per_s),
            number(None if r.device_peak_bytes is None else r.device_peak_bytes / GB),
            number(None if r.process_bytes is None else r.process_bytes / GB),
            f"{r.losses[-1]:.4f}",
            f"{found.differences[r.backend]:.1g}",
            verdict,
            r.precision,
        )
    console.print(table)
    for r in found.results:
        if r.error:
            console.print(f" {r.backend}: {r.error}", highlight=False, markup=False)
    frameworks = sorted({r.framework for r in found.results if r.framework})
    console.print(
        f" {', '.join(frameworks)}; loss after {LOSS_STEPS} steps, and its largest difference from "
        "the CPU's on the way",
        highlight=False,
        markup=False,
    )
    console.print(f" recommended here: {recommendation(found)}", highlight=False)
    console.print(f" {told}", highlight=False)


def recommendation(found: Comparison) -> str:
    """The fastest that is right, and by how much."""
    speeds = list(found.speeds().items())
    if not speeds:
        return "none: no backend ran and agreed"
    if len(speeds) == 1:
        return f"{speeds[0][0]}, the only one that ran and agreed"
    (first, speed), (second, less) = speeds[:2]
    return f"--backend {first}, {speed / less:.1f}x {second}"


def keep(
    comparison: Comparison, config: RunConfig, available: Mapping[str, Availability]
) -> tuple[str, bool]:
    """Remember the answer for `backend: auto` where it says something.

    Returns:
        What to tell, and whether it was kept.
    """
    size = num_parameters(param_specs(config.model))
    t = config.train
    tokens = t.micro_batch_size * t.grad_accum_steps * config.data.seq_len
    speeds = comparison.speeds()
    if not comparison.ok:
        return "not remembered: not every backend ran and agreed", False
    busy = max(r.other_processors for r in comparison.results)
    if busy > MAX_OTHERS * (os.cpu_count() or 1):
        return (
            f"not remembered: other programs kept {busy:.1f} processors busy; compare again",
            False,
        )
    if size < MIN_PARAMETERS or tokens < MIN_STEP_TOKENS:
        return (
            f"not remembered: {size:,} parameters and {tokens:,} tokens a step say little about "
            f"models that are trained (at least {MIN_PARAMETERS:,} and {MIN_STEP_TOKENS:,})"
        ), False
    machine = remembered.machine_of(detect.machine_facts(), available)
    date = datetime.date.today().isoformat()
    try:
        path = remembered.remember(machine, speeds, date=date)
    except PippinError as error:
        return f"not remembered: {error.what}", False
    name, reason = choose_backend(
        available,
        is_apple_silicon=on_apple_silicon(),
        remembered=Remembered(speeds, date, machine.word),
    )
    return f"backend: auto takes {name} ({reason}); remembered in {path}", True
