"""Resolves every "auto" key once, with its reason.

The size of the model is the largest of its tier (core.machine.scaling) that memory holds and that sees
`TOKENS_PER_PARAMETER` tokens per parameter: in the steps where their number is given, else in the time,
at a measured speed. With a `Dial` the size is given, and length, batch and rates follow from it
(core.machine.depth). Keys that a file or flag has set are never touched.
"""

from collections.abc import Callable, Sequence

from core.backend import OutOfMemory
from core.config.checking import check, invalid
from core.config.draft import Draft, Source
from core.config.load import build, nested
from core.config.schema import ModelConfig, RunConfig
from core.errors import PippinError
from core.machine import depth as dials
from core.machine.depth import Dial
from core.machine.memory import predict_training_memory
from core.machine.micro_batch import fit_micro_batch, split
from core.machine.resolvers import (
    SIZE,
    STEP_SHARE,
    STORY_TOKENS,
    STORY_VOCAB_SIZE,
    DataFacts,
    DeviceFacts,
    plan_batch,
    resolve_plain,
    resolve_rates,
    resolve_shape,
    resolve_steps,
    resolve_windows,
    speed_text,
)
from core.machine.scaling import (
    LADDER,
    MAX_EPOCHS,
    corpus_bytes,
    corpus_bytes_for,
    sizes_of,
    worth_of_tokens,
)
from core.machine.speed import flops_per_token
from core.params import num_parameters, param_specs

__all__ = [
    "STEP_SHARE",
    "STORY_TOKENS",
    "STORY_VOCAB_SIZE",
    "TOKENS_PER_PARAMETER",
    "DataFacts",
    "DeviceFacts",
    "resolve_auto",
    "resolve_early",
]

TOKENS_PER_PARAMETER = 10
# By how much the next size may beat the FLOP/s of the one below it, to be worth a look.
HOPE = 1.7


def resolve_early(draft: Draft, device: DeviceFacts, dial: Dial | None = None) -> None:
    """What the data needs to know: backend, window length, corpus size.

    Raises:
        PippinError: P010 where no automatic size goes with the shape that is set; said here, before a
            text is prepared.
    """
    _refuse_shape(draft, device)
    draft.resolve("train.backend", device.backend, device.reason)
    limit = None if draft.is_auto("model.max_seq_len") else draft.values["model.max_seq_len"]
    resolve_windows(draft, limit)
    draft.resolve("model.max_seq_len", draft.values["data.seq_len"], "as data.seq_len")
    if draft.values["data.input_file"] is None and draft.values["data.tokenizer"] in (
        "auto",
        "bpe",
    ):
        why = "a token for nearly every word of the stories"
        draft.resolve("model.vocab_size", STORY_VOCAB_SIZE, why)
    if not draft.is_auto("data.corpus_bytes"):
        return
    minutes = float(draft.values["train.minutes"])
    if dial is None or dials.is_given(draft, "train.minutes"):
        size = corpus_bytes(minutes, is_gpu=device.is_gpu)
        draft.resolve("data.corpus_bytes", size, "about one epoch in the time")
        return
    horizon = dials.horizon_tokens(num_parameters(param_specs(_early_model(draft, device))))
    why = f"{dial.flag}: {horizon / 1e6:,.0f} M tokens in at most 4 epochs"
    draft.resolve("data.corpus_bytes", corpus_bytes_for(horizon), why)


def _refuse_shape(draft: Draft, device: DeviceFacts) -> None:
    sized = any(draft.is_auto(k) for k in SIZE)
    first = None
    for size in sizes_of(device.tier) if sized else LADDER[:1]:
        trial = Draft(dict(draft.values), dict(draft.sources))
        resolve_shape(trial, *size)
        problems = check(trial)
        if not problems:
            return
        first = first or problems
    if first is not None:
        what = "no automatic size goes with the shape that is set; of the smallest:"
        raise invalid(first, what=what if sized else "")


def _early_model(draft: Draft, device: DeviceFacts) -> ModelConfig:
    """The architecture as far as it is known before the text is: for the size of the corpus."""
    trial = Draft(dict(draft.values), dict(draft.sources))
    trial.resolve("model.vocab_size", STORY_VOCAB_SIZE, "")
    resolve_plain(trial, DataFacts(int(trial.values["model.vocab_size"]), 0, "", True), device)
    resolve_shape(trial, *LADDER[0])
    return ModelConfig.model_validate(nested(trial.values.items())["model"])


def resolve_auto(
    draft: Draft,
    data: DataFacts,
    device: DeviceFacts,
    measure: Callable[[RunConfig], float] | None,
    dial: Dial | None = None,
    *,
    how: str = "measured",
) -> float | None:
    """Resolve everything that is left.

    Args:
        draft: Changed in place.
        data: Facts of the prepared data.
        device: Facts of the device.
        measure: Positions per second of a configuration, by a short probe on the backend.
        dial: What `apply_depth` returned, where `--depth` was given.
        how: What `measure` does, in a word for the reasons.

    Returns:
        Trained tokens per second of the result, None if nothing had to be measured or the model does
        not fit into memory.
    """
    resolve_plain(draft, data, device)
    planner = _Planner(draft, data, device, dial)
    speed = None
    sized = any(draft.is_auto(k) for k in ("model.d_model", "model.n_layers"))
    # The length that goes with a depth needs no speed.
    timed = draft.is_auto("train.total_steps") and (
        dial is None or dials.is_given(draft, "train.minutes")
    )
    if measure is not None and (sized or timed):
        share = data.fill / data.work
        speed = planner.resolve_size(lambda config: share * measure(config), how)
    resolve_shape(draft, *LADDER[0])
    planner.resolve_dial()
    planner.resolve_batch()
    resolve_steps(draft, data, speed, planner.horizon)
    resolve_rates(draft, dial)
    return speed


class _Planner:
    """Sizes and batches of one draft, weighed by memory, data and time."""

    def __init__(
        self, draft: Draft, data: DataFacts, device: DeviceFacts, dial: Dial | None
    ) -> None:
        self.draft, self.data, self.dial = draft, data, dial
        self.tier = device.tier
        self.budget = device.budget_bytes * float(draft.values["train.memory_fraction"])
        self.horizon: float | None = None
        self.too_large = ""  # a size that the forecast let through and the device did not
        if dial is not None:
            self.horizon = float(dials.horizon_tokens(_size(self.trial(*LADDER[0]))))

    def trial(self, d_model: int, n_layers: int) -> RunConfig:
        """A configuration of one size, to measure and weigh it; its length plays no part.

        Where a step of all rows does not fit into memory, its rows are split over several forward
        passes, which is the same step.
        """
        trial = Draft(dict(self.draft.values), dict(self.draft.sources))
        trial.resolve("train.total_steps", 1_000_000_000, "")
        resolve_shape(trial, d_model, n_layers)
        may_split = trial.is_auto("train.micro_batch_size") and _is_default(
            trial, "train.grad_accum_steps"
        )
        plan_batch(trial, self.data, self.horizon)
        resolve_steps(trial, self.data, None)
        resolve_rates(trial)
        trial.resolve("train.save_dir", "checkpoints/trial", "")
        config = build(trial)
        if not may_split:
            return config
        fit = fit_micro_batch(config, param_specs(config.model), budget_bytes=int(self.budget))
        return split(config, fit.micro_batch_size)

    def resolve_dial(self) -> None:
        """The rate that goes with the horizon, where there is a dial."""
        if self.dial is not None and self.horizon is not None:
            dials.set_rate(self.draft, self.dial, self.horizon, dials.batch_tokens(self.horizon))

    def resolve_batch(self) -> None:
        """Rows of a micro-batch, and micro-batches of a step."""
        draft = self.draft
        if not draft.is_auto("train.micro_batch_size"):
            return
        found = self.trial(*LADDER[0]).train
        rows, parts = found.micro_batch_size, found.grad_accum_steps
        if parts > 1 and parts != draft.values["train.grad_accum_steps"]:
            budget = f"{self.budget / 1e9:.1f} GB"
            why = f"{rows * parts} rows of a step do not fit {budget} at once"
            draft.set("train.grad_accum_steps", parts, Source("auto", reason=why))
        tokens = rows * parts * int(draft.values["data.seq_len"]) * self.data.fill
        draft.resolve("train.micro_batch_size", rows, f"about {round(tokens):,} tokens a step")

    def resolve_size(self, measure: Callable[[RunConfig], float], how: str) -> float | None:
        """Choose the size; returns the speed measured at it, None where it cannot run."""
        draft = self.draft
        sized = any(draft.is_auto(k) for k in SIZE)
        sizes, trials = self._possible(sizes_of(self.tier) if sized else LADDER[:1])
        fitting = [c for c in trials if _memory(c) <= self.budget]
        if not fitting:
            if sized:
                self._note(trials[0], "the smallest", sizes)
            return None
        if not sized or not draft.is_auto("train.total_steps"):
            # The length is known: the largest size that sees enough tokens in these steps.
            enough = [c for c in fitting if self._is_enough(c, _tokens(c) * self.data.fill)]
            config = (enough or fitting)[-1 if enough else 0]
            speed = measure(config)
        else:
            config, speed = self._largest_in_time(fitting, measure)
        self._note(config, f"{speed_text(speed)} {how}", sizes)
        return speed

    def _possible(
        self, sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], list[RunConfig]]:
        """The sizes that go with what was set, and their trials: a sixth of 128 is odd."""
        found: list[tuple[tuple[int, int], RunConfig]] = []
        problem: PippinError | None = None
        for size in sizes:
            try:
                found.append((size, self.trial(*size)))
            except PippinError as error:
                problem = problem or error
        if problem is not None and not found:
            raise problem
        return [size for size, _ in found], [config for _, config in found]

    def _largest_in_time(
        self, fitting: Sequence[RunConfig], measure: Callable[[RunConfig], float]
    ) -> tuple[RunConfig, float]:
        """The largest that sees enough tokens in the time, at a speed measured at itself.

        Sizes that were not measured are judged by the FLOP/s of the nearest that was. What is chosen
        is measured, and so is the next one where it is near: larger ones usually reach more FLOP/s.
        The choice is made again until it stands.
        """
        seconds = 60.0 * float(self.draft.values["train.minutes"]) * STEP_SHARE
        most = MAX_EPOCHS * self.data.train_tokens
        speeds = {0: measure(fitting[0])}

        def try_size(i: int) -> float:
            try:
                return measure(fitting[i])
            except OutOfMemory:
                m = fitting[i].model
                self.too_large = f"{m.d_model} x {m.n_layers} ran out of memory when it was tried"
                return 0.0

        def sees_enough(i: int, hope: float = 1.0) -> bool:
            near = min(speeds, key=lambda j: (abs(j - i), j))
            speed = hope * speeds[near] * _flops(fitting[near]) / _flops(fitting[i])
            return self._is_enough(fitting[i], min(speed * seconds, most))

        while True:
            chosen = max((i for i in range(len(fitting)) if sees_enough(i)), default=0)
            above = chosen + 1
            if chosen not in speeds:
                speeds[chosen] = try_size(chosen)
            elif above < len(fitting) and above not in speeds and sees_enough(above, HOPE):
                speeds[above] = try_size(above)
            else:
                return fitting[chosen], speeds[chosen]

    def _is_enough(self, config: RunConfig, tokens: float) -> bool:
        worth = worth_of_tokens(tokens, self.data.train_tokens)
        return worth >= TOKENS_PER_PARAMETER * _size(config)

    def _note(self, config: RunConfig, speed: str, sizes: Sequence[tuple[int, int]]) -> None:
        size = (config.model.d_model, config.model.n_layers)
        why = f"{_size(config) / 1e6:.1f} M parameters, {speed}"
        self.draft.resolve("model.d_model", size[0], why)
        if self.too_large:
            why = self.too_large
        elif size == sizes[-1]:
            why = f"{self.tier.name}: the largest for this memory"
        elif size == sizes[0]:
            why = "the smallest that writes stories"
        else:
            why = f"at least {TOKENS_PER_PARAMETER} tokens a parameter"
        self.draft.resolve("model.n_layers", size[1], why)


def _is_default(draft: Draft, name: str) -> bool:
    return draft.sources[name].kind == "default"


def _tokens(config: RunConfig) -> int:
    t = config.train
    return t.total_steps * t.micro_batch_size * t.grad_accum_steps * config.data.seq_len


def _memory(config: RunConfig) -> int:
    return predict_training_memory(config, param_specs(config.model)).total


def _flops(config: RunConfig) -> float:
    return flops_per_token(config.model, param_specs(config.model), config.data.seq_len)


def _size(config: RunConfig) -> int:
    return num_parameters(param_specs(config.model))
