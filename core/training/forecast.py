"""What a run will take, in words, and the refusal of what does not fit into memory or on the disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.backend import DeviceInfo
from core.checkpoint import list_checkpoints
from core.config.schema import RunConfig
from core.errors import PippinError
from core.machine.memory import (
    MemoryForecast,
    checkpoint_bytes,
    kv_cache_bytes,
    predict_inference_memory,
    predict_training_memory,
)
from core.machine.memory_fit import nearest_fits
from core.params import ParamSpec, num_active_parameters, num_parameters
from core.training import format as fmt
from core.training.disk import DiskPlan, saves_between
from core.training.resume import ResumePoint

# Smaller parts are not worth a word: below 0.1 MB.
SHOWN_BYTES = 100_000
# Of a file beside its values, about: 48 KB were measured for 2 layers.
META_BYTES, HEADER_BYTES = 16_384, 1_400


@dataclass(frozen=True)
class Speed:
    """Trained tokens per second, None where not known, and how it is known: "measured" or why not."""

    tokens_per_s: float | None
    how: str

    @property
    def is_measured(self) -> bool:
        """Whether real steps were timed."""
        return self.tokens_per_s is not None and self.how == "measured"


@dataclass(frozen=True)
class Forecast:
    """What the steps that are left of a run take.

    Attributes:
        config: The run.
        specs: Its parameter table.
        speed: Its speed.
        budget_bytes: Memory that it may use.
        first_step: The step it goes on from; 0 for a fresh start.
        stop_step: The step it stops at.
        fill: Share of a window's positions that are trained on.
        disk: What its checkpoints take.
    """

    config: RunConfig
    specs: tuple[ParamSpec, ...]
    speed: Speed
    budget_bytes: int
    first_step: int
    stop_step: int
    fill: float
    disk: DiskPlan

    @property
    def tokens(self) -> int:
        """Tokens that are left to train on."""
        t = self.config.train
        rows = (self.stop_step - self.first_step) * t.micro_batch_size * t.grad_accum_steps
        return round(rows * self.config.data.seq_len * self.fill)

    def line(self) -> str:
        """Size, tokens, time, memory and disk."""
        size = fmt.parameters(num_parameters(self.specs), num_active_parameters(self.specs))
        memory = predict_training_memory(self.config, self.specs).total
        parts = [
            size,
            f"{fmt.si(self.tokens)} tokens",
            self._time(),
            f"memory {fmt.gigabytes(memory)} of {fmt.gigabytes(self.budget_bytes)}",
            f"disk {fmt.gigabytes(self.disk.added_bytes())}",
        ]
        return " · ".join(parts)

    def _time(self) -> str:
        if self.speed.tokens_per_s is None:
            return "time not known"
        took = f"about {fmt.duration(max(self.tokens / self.speed.tokens_per_s, 1.0))}"
        return took if self.speed.is_measured else f"{took} (predicted)"

    def details(self) -> Iterator[tuple[str, str]]:
        """Label and text of the lines of a dry run."""
        yield from zip(("memory", "", ""), memory_lines(self.config, self.specs))
        tokens_per_s, how = self.speed.tokens_per_s, self.speed.how
        yield "time", how if tokens_per_s is None else f"{fmt.si(tokens_per_s)} tok/s, {how}"
        free = self.disk.free_bytes()
        room = "" if free is None else f"; {fmt.gigabytes(free)} are free"
        files = self.disk.added_files()
        yield (
            "disk",
            f"{fmt.gigabytes(self.disk.added_bytes())}: {files:,} checkpoint{'s' * (files != 1)} of "
            f"{fmt.gigabytes(self.disk.each_bytes)} at once{room}",
        )

    def refuse(self, depth: int | None = None) -> None:
        """Refuse what does not fit, `depth` being the `--depth` that set the size.

        Raises:
            PippinError: P101 for memory, P312 for the disk.
        """
        refuse_too_large(self.config, self.specs, self.budget_bytes, depth=depth)
        self.disk.refuse()


def disk_plan(
    config: RunConfig,
    specs: tuple[ParamSpec, ...],
    start: ResumePoint | None,
    stop_step: int,
    *,
    overwrite: bool,
) -> DiskPlan:
    """What the checkpoints take of a run that is about to start.

    Args:
        config: The run.
        specs: Its parameter table.
        start: Where it goes on; None for a fresh start.
        stop_step: The step it stops at.
        overwrite: Whether a run that is there is removed first.
    """
    train, folder = config.train, Path(config.train.save_dir)
    there = list_checkpoints(folder)
    held: tuple[Path, ...] = ()
    dropped = there if overwrite else ()
    if start is not None and start.folder is not None:
        dropped = start.later
        held = tuple(p for p in there if p not in dropped)
    return DiskPlan(
        folder,
        saves=saves_between(start.meta.step if start else 0, stop_step, train.ckpt_interval),
        keep=train.ckpt_keep,
        each_bytes=checkpoint_bytes(config, specs) + META_BYTES + HEADER_BYTES * len(specs),
        held=held,
        dropped=dropped,
    )


def memory_lines(config: RunConfig, specs: tuple[ParamSpec, ...]) -> list[str]:
    """The forecast by parts, largest first, and what samples take at another moment."""
    forecast = predict_training_memory(config, specs)
    gone = [name for name, n in forecast.parts().items() if n < SHOWN_BYTES and name != "KV cache"]
    lines = [_parts(forecast), f"the most is held at: {forecast.moment}"]
    if gone:
        lines[-1] += f" ({', '.join(gone)}: none at that moment)"
    if config.train.samples:
        length = sample_length(config)
        cache = kv_cache_bytes(config, 1, length)
        whole = predict_inference_memory(config, specs, 1, length)
        work = whole.workspace + whole.logits
        lines.append(
            f"samples, between steps: KV cache {fmt.gigabytes(cache)} for {length} tokens, "
            f"workspace {fmt.gigabytes(work)}"
        )
    return lines


def _parts(forecast: MemoryForecast) -> str:
    parts = forecast.parts().items()
    return " · ".join(f"{name} {fmt.gigabytes(n)}" for name, n in parts if n >= SHOWN_BYTES)


def sample_length(config: RunConfig) -> int:
    """Tokens of a sample's context, at most."""
    return min(config.model.max_seq_len, config.data.seq_len + config.train.sample_tokens)


def refuse_too_large(
    config: RunConfig,
    specs: tuple[ParamSpec, ...],
    budget_bytes: int,
    *,
    whose: str = "",
    depth: int | None = None,
) -> MemoryForecast:
    """The forecast, where it fits.

    Args:
        config: The run.
        specs: Its parameter table.
        budget_bytes: What it may use.
        whose: Where the budget is from, where that is news.
        depth: The `--depth` that set the size, None where none did.

    Raises:
        PippinError: P101 where it does not, with the nearest settings that do.
    """
    forecast = predict_training_memory(config, specs)
    if forecast.total <= budget_bytes:
        return forecast
    found = nearest_fits(config, budget_bytes, depth=depth)
    choices = [f"{f.typed}   ({fmt.gigabytes(f.total_bytes)}; {f.note})" for f in found]
    raise PippinError(
        "P101",
        f"a step needs about {fmt.gigabytes(forecast.total)}, and this run may use "
        f"{fmt.gigabytes(budget_bytes)}{whose}.",
        found=f"at its most ({forecast.moment}): {_parts(forecast)}",
        choices=(*choices, "--force   (tries it all the same)"),
        remedy=f"the same command with {found[0].typed}"
        if found
        else "no smaller setting of this model fits; close other programs",
        kept="nothing was started.",
    )


def check_device(
    config: RunConfig, specs: tuple[ParamSpec, ...], info: DeviceInfo, *, force: bool
) -> None:
    """The same once the framework is there, by the device's own figure of its memory.

    Raises:
        PippinError: P101.
    """
    if info.budget_bytes is None or force:
        return
    budget = int(info.budget_bytes * config.train.memory_fraction)
    refuse_too_large(config, specs, budget, whose=f", by {info.device}'s own figure")
