"""Where a step's time goes: data, transfer, forward, backward, optimizer, logging.

Method. The parts are those of real steps of the run's own configuration: `Backend.profile_step` takes a
step and waits for the device at the end of each part, so that no part's work is timed in the next one.
Waiting costs time itself, so every profiled step is followed by a whole one, as the loop takes it, and
the sum of the parts is shown against it. Medians over the steps; a row of the log is spread over the
steps between two rows. Data is the waiting for the loader's thread, which works beside the device. The
head's gradient is made with the loss, chunk by chunk (docs/numerics.md section 3), so all of the
head's work is in "forward"; what gradient checkpointing computes again is in "backward".
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.backend import Backend
from core.config.schema import RunConfig
from core.data.sampling.loader import open_train_loader
from core.machine.speed import flops_per_token
from core.params import param_specs
from core.training.runlog import RunLog
from core.training.schedule import step_hyper
from tools.benchmarks import training
from tools.benchmarks.report import Measured, OtherLoad, median, number

PHASES = ("data", "transfer", "forward", "backward", "optimizer", "logging")
NOTES = {
    "data": "waiting for it",
    "transfer": "tokens to device",
    "forward": "with the head's gradient",
    "backward": "of the blocks",
    "optimizer": "norm, clip, update",
    "logging": "a row, over its interval",
}


@dataclass(frozen=True)
class Profile:
    """Median seconds of a step.

    Attributes:
        seconds: By part, in the order of `PHASES`.
        whole: A step that is waited for only at its end, from the batch to the loss.
        num_steps: Steps of either kind.
        tokens: Positions of a step.
    """

    seconds: Mapping[str, float]
    whole: float
    num_steps: int
    tokens: int

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())


def measure(config: RunConfig, num_steps: int) -> tuple[Profile, list[Measured], dict[str, Any]]:
    """Profile training on random tokens.

    Args:
        config: Resolved configuration.
        num_steps: Steps to profile, and as many whole ones between them.

    Returns:
        The profile, its figures, and facts for the report.
    """
    with training.opened(config, num_steps) as (backend, folder, facts):
        others = OtherLoad()
        profile = take(backend, config, num_steps, folder)
    work = split_flops(config, profile.tokens)
    rows = figures(profile, work, facts["peak_flops"])
    facts |= {"seconds": dict(profile.seconds), "whole_step_s": profile.whole}
    return profile, [*rows, others.figure()], facts


def take(backend: Backend, config: RunConfig, num_steps: int, folder: Path) -> Profile:
    """Profiled and whole steps in turns, after a few of each that compile and allocate."""
    loader = open_train_loader(training.random_stream(config, folder / "tokens.bin"), config)
    log = RunLog(folder)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    whole: list[float] = []
    try:
        for turn in range(-training.WARMUP_STEPS, num_steps):
            begin = time.perf_counter()
            batch = next(loader)
            waited = time.perf_counter() - begin
            hyper = step_hyper(batch.step, config.train, batch.normalizer)
            parts = backend.profile_step(batch.micro, hyper)
            batch = next(loader)
            hyper = step_hyper(batch.step, config.train, batch.normalizer)
            backend.synchronize()
            begin = time.perf_counter()
            metrics = backend.train_step(batch.micro, hyper)
            float(metrics["loss"])
            backend.synchronize()
            spent = time.perf_counter() - begin
            begin = time.perf_counter()
            training.write_row(backend, config, log, batch.step, metrics)
            logged = time.perf_counter() - begin
            if turn < 0:
                continue
            whole.append(spent)
            found = {**parts, "data": waited, "logging": logged / config.train.log_interval}
            for phase in PHASES:
                times[phase].append(found[phase])
    finally:
        log.close()
        loader.close()
    t = config.train
    tokens = t.micro_batch_size * t.grad_accum_steps * config.data.seq_len
    return Profile({p: median(v) for p, v in times.items()}, median(whole), num_steps, tokens)


def split_flops(config: RunConfig, tokens: int) -> dict[str, float]:
    """FLOPs of the forward and of the backward part of a step, as this project splits them.

    A product forward is two of its size backward. Of the head all three are forward; of checkpointed
    blocks the forward ones are done again in the backward part.
    """
    m = config.model
    head = 6.0 * m.vocab_size * m.d_model * tokens
    blocks = tokens * flops_per_token(m, param_specs(m), config.data.seq_len) - head
    again = blocks / 3 if config.train.gradient_checkpointing else 0.0
    return {"forward": blocks / 3 + head, "backward": 2 * blocks / 3 + again}


def figures(profile: Profile, work: Mapping[str, float], peak: float | None) -> list[Measured]:
    """What is reported of a profile.

    Args:
        profile: Seconds.
        work: FLOPs by part, as `split_flops` gives them.
        peak: Peak FLOP/s of the device, None where it is not known.
    """
    rows = []
    for phase in PHASES:
        seconds = profile.seconds[phase]
        note = f"{100 * seconds / profile.total:.1f} %, {NOTES[phase]}"
        if phase in work and seconds > 0:
            rate = work[phase] / seconds
            note += f", {number(rate / 1e9)} GFLOP/s"
            note += f", {100 * rate / peak:.0f} % of peak" if peak else ""
        rows.append(Measured(phase, 1e3 * seconds, "ms", note=note))
    rows.append(Measured("sum of the parts", 1e3 * profile.total, "ms"))
    step = profile.total - profile.seconds["data"] - profile.seconds["logging"]
    note = f"its parts took {step / profile.whole:.2f} x this"
    rows.append(Measured("whole step, not split", 1e3 * profile.whole, "ms", note=note))
    return rows


def plot(profile: Profile, title: str, path: Path) -> None:
    """Draw the parts as bars, as a picture in the format of the path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(profile.seconds)
    values = [1e3 * profile.seconds[name] for name in names]
    shares = [100 * v / (1e3 * profile.total) for v in values]
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    bars = axes.barh(names, values, color="#0072B2", height=0.62)
    labels = [f" {number(v)} ms   {s:.1f} %" for v, s in zip(values, shares)]
    axes.bar_label(bars, labels, padding=2, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * max(values))
    axes.set_xlabel("milliseconds of a step, median")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def summary(rows: Sequence[Measured]) -> str:
    """The largest part in a sentence."""
    parts = [row for row in rows if row.name in PHASES]
    largest = max(parts, key=lambda row: row.value or 0.0)
    return f"most of the time: {largest.name}, {largest.note.split(',')[0]}"
