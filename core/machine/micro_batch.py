"""`train.micro_batch_size: auto`: the most rows at once that fit, with the rows of a step unchanged.

The rule: the rows of an optimizer step, micro_batch_size x grad_accum_steps, are decided before this and
stay. Of their divisors the largest is taken whose forecast fits the budget; accumulation makes up the
rest, so the step, and the loss curve to rounding, are the same on every machine. Where the forecast
comes near the budget, one real step in a process of its own confirms it: a crash there costs nothing.
A micro_batch_size that a user gave is never touched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from core.config.draft import Draft, Source
from core.config.load import build
from core.config.schema import RunConfig
from core.machine.memory import predict_training_memory
from core.params import ParamSpec, param_specs

# Below this share of the budget a forecast need not be confirmed: it would have to be off by half.
SURE_FRACTION = 0.5
# Probe steps before the forecast is trusted no more.
MAX_PROBES = 4


@dataclass(frozen=True)
class Probed:
    """What one real step in a process of its own showed.

    Attributes:
        verdict: "fits", "too large" (out of memory, killed, above the limit), or "failed", where it
            says nothing of memory.
        peak_bytes: The most that it used, None where it is not known.
        reason: Why, where it does not fit.
    """

    verdict: Literal["fits", "too large", "failed"]
    peak_bytes: int | None = None
    reason: str = ""


# Takes the configuration and the bytes that its process or device may use.
ProbeStep = Callable[[RunConfig, int], Probed]


@dataclass(frozen=True)
class Fit:
    """The split of a step.

    Attributes:
        micro_batch_size: Rows at once.
        grad_accum_steps: Micro-batches of a step.
        reason: Why, with the forecast or what was measured, and the budget.
        notes: What a user should know besides.
    """

    micro_batch_size: int
    grad_accum_steps: int
    reason: str
    notes: tuple[str, ...] = ()


def divisors(rows: int, most: int) -> list[int]:
    """The divisors of `rows` of at most `most`, largest first."""
    return [size for size in range(min(rows, most), 0, -1) if rows % size == 0]


def split(config: RunConfig, micro_batch_size: int) -> RunConfig:
    """The configuration with its rows of a step cut into micro-batches of this size.

    Raises:
        ValueError: It does not divide them.
    """
    t = config.train
    parts, rest = divmod(t.micro_batch_size * t.grad_accum_steps, micro_batch_size)
    if rest:
        raise ValueError(f"{micro_batch_size} does not divide the rows of a step")
    changes = {"micro_batch_size": micro_batch_size, "grad_accum_steps": parts}
    return config.model_copy(update={"train": t.model_copy(update=changes)})


def fit_micro_batch(
    config: RunConfig,
    specs: Sequence[ParamSpec],
    *,
    budget_bytes: int,
    most_rows: int | None = None,
    probe: ProbeStep | None = None,
) -> Fit:
    """The largest micro-batch that fits.

    Args:
        config: A resolved configuration; its micro_batch_size x grad_accum_steps stays.
        specs: Its parameter table.
        budget_bytes: What the run may use.
        most_rows: The largest micro-batch to try, all rows by default.
        probe: Takes one real step; None trusts the forecast.

    Returns:
        The split; where nothing fits one row at a time, which is for the caller to refuse.
    """
    t = config.train
    rows = t.micro_batch_size * t.grad_accum_steps
    sizes = divisors(rows, rows if most_rows is None else most_rows)
    budget = f"{budget_bytes / 1e9:.1f} GB"
    notes: list[str] = []
    probes = 0
    for size in sizes:
        trial = split(config, size)
        forecast = predict_training_memory(trial, specs).total
        if forecast > budget_bytes:
            continue
        accum = trial.train.grad_accum_steps
        said = f"forecast {forecast / 1e9:.1f} of {budget}"
        if forecast < SURE_FRACTION * budget_bytes or probe is None:
            return Fit(size, accum, f"fits: {said}", tuple(notes))
        if probes == MAX_PROBES:
            notes.append(f"{probes} probe steps did not fit; {size} rows are the forecast's word")
            return Fit(size, accum, f"not probed: {said}", tuple(notes))
        found, probes = probe(trial, budget_bytes), probes + 1
        if found.verdict == "fits":
            used = (
                ""
                if found.peak_bytes is None
                else f" used {found.peak_bytes / 1e9:.1f} of {budget}"
            )
            return Fit(size, accum, f"fits: a probe step{used}", tuple(notes))
        if found.verdict == "failed":
            notes.append(f"the probe step said nothing of memory: {found.reason}")
            return Fit(size, accum, f"not probed: {said}", tuple(notes))
        notes.append(f"{size} rows do not fit, although {said}: {found.reason}")
    return Fit(1, rows, f"the least there is; a step does not fit {budget}", tuple(notes))


def settle_micro_batch(
    draft: Draft, *, budget_bytes: int, probe: ProbeStep | None, warn: Callable[[str], None]
) -> None:
    """Decide an automatic `train.micro_batch_size` in a draft that is otherwise resolved.

    A given `train.grad_accum_steps` is the least number of micro-batches; where more are needed, that is
    told. Micro-batch sizes that were given, by a user or by a checkpoint, stay.

    Args:
        draft: Changed in place.
        budget_bytes: What the run may use.
        probe: Takes one real step; None trusts the forecast.
        warn: Told what a user should know.
    """
    name, parts_name = "train.micro_batch_size", "train.grad_accum_steps"
    source, parts_source = draft.sources[name], draft.sources[parts_name]
    if source.kind != "auto":
        return
    config = build(draft)
    given = parts_source.kind not in ("default", "auto")
    rows = config.train.micro_batch_size * config.train.grad_accum_steps
    fit = fit_micro_batch(
        config,
        param_specs(config.model),
        budget_bytes=budget_bytes,
        most_rows=config.train.micro_batch_size if given else None,
        probe=probe,
    )
    for note in fit.notes:
        warn(f"{name}: {note}")
    why = "; ".join(part for part in (fit.reason, source.reason) if part)
    draft.set(name, fit.micro_batch_size, Source("auto", reason=why))
    if fit.grad_accum_steps == config.train.grad_accum_steps:
        return
    if given:
        warn(
            f"{parts_name} is {fit.grad_accum_steps}, not {config.train.grad_accum_steps}: only "
            f"{fit.micro_batch_size} of the {rows} rows of a step fit at once; the step is the same"
        )
    why = f"{rows} rows a step, {fit.micro_batch_size} at once"
    draft.set(parts_name, fit.grad_accum_steps, Source("auto", reason=why))
