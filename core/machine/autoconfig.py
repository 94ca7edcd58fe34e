"""Resolves every "auto" key once, with its reason.

The size of the model is the smaller of what memory holds and what can see `TOKENS_PER_PARAMETER` tokens
per parameter: in the steps where their number is given, else in the time, at a measured speed. Keys
that a file or flag has set are never touched.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.config.draft import Draft, Source
from core.config.load import build
from core.config.schema import RunConfig
from core.machine.memory import predict_training_memory
from core.machine.speed import flops_per_token
from core.params import num_parameters, param_specs

TOKENS_PER_PARAMETER = 10
# Width and depth of the sizes that are tried, smallest first.
# A model below the first one writes no stories, however many it reads: slower machines train it too.
LADDER = ((128, 4), (192, 4), (256, 6), (384, 6), (512, 8), (768, 12), (1024, 16))
STORY_VOCAB_SIZE = 4096
# Of the longest story in that vocabulary, about.
STORY_TOKENS = 224
# Share of the time that goes to steps; the rest is validation, samples and saving (docs/LOG.md).
STEP_SHARE = 0.95
# Passes over a text after which a small model only memorises it.
MAX_EPOCHS = 20
# Rates of the groups as multiples of train.lr, measured at a width of 128 (docs/LOG.md 2026-11-21).
# The head's falls with the width, as the sum it scales grows (Yang et al., 2022, arXiv:2203.03466).
MEASURED_WIDTH = 128
RATE_MULTIPLIERS = {
    "untied": {"matrix": 6.0, "embed": 50.0, "head": 25.0, "vector": 5.0},
    "tied": {"matrix": 4.0, "embed": 2.0, "head": 2.0, "vector": 2.0},
}


@dataclass(frozen=True)
class DataFacts:
    """What is known of the prepared data.

    `fill` is the share of a window's positions that are trained on, the rest is padding; `work` is the
    share that is computed.
    """

    vocab_size: int
    train_tokens: int
    name: str
    is_stories: bool
    fill: float = 1.0
    work: float = 1.0


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of the device before a framework is asked."""

    backend: str
    reason: str
    is_gpu: bool
    native_bf16: bool
    budget_bytes: int


def resolve_early(draft: Draft, device: DeviceFacts) -> None:
    """What the data needs to know: backend, window length, corpus size."""
    draft.resolve("train.backend", device.backend, device.reason)
    limit = None if draft.is_auto("model.max_seq_len") else draft.values["model.max_seq_len"]
    _resolve_windows(draft, limit)
    draft.resolve("model.max_seq_len", draft.values["data.seq_len"], "as data.seq_len")
    if draft.values["data.input_file"] is None and draft.values["data.tokenizer"] in (
        "auto",
        "bpe",
    ):
        why = "a token for nearly every word of the stories"
        draft.resolve("model.vocab_size", STORY_VOCAB_SIZE, why)
    minutes = float(draft.values["train.minutes"])
    if draft.is_auto("data.corpus_bytes"):
        per_minute = 16_000_000 if device.is_gpu else 4_000_000
        size = int(min(max(minutes * per_minute, 4_000_000), 400_000_000))
        draft.resolve("data.corpus_bytes", size, "about one epoch in the time")


def _resolve_windows(draft: Draft, limit: int | None) -> None:
    """Stories are read whole: a story whose beginning is missing teaches nothing about its names."""
    values = draft.values
    whole = values["data.input_file"] is None and values["data.tokenizer"] in ("auto", "bpe")
    room = STORY_TOKENS if draft.is_auto("data.seq_len") else int(values["data.seq_len"])
    whole = whole and min(room, limit or room) >= STORY_TOKENS
    if whole and values["data.sampling"] in ("auto", "document"):
        draft.resolve("data.seq_len", STORY_TOKENS, "the longest story")
        draft.resolve("data.sampling", "document", "each story is read from its beginning")
    draft.resolve("data.seq_len", min(256, limit or 256), "enough for a few paragraphs")
    draft.resolve("data.sampling", "contiguous", "the text as it comes")


def resolve_auto(
    draft: Draft,
    data: DataFacts,
    device: DeviceFacts,
    measure: Callable[[RunConfig], float] | None,
) -> float | None:
    """Resolve everything that is left.

    Args:
        draft: Changed in place.
        data: Facts of the prepared data.
        device: Facts of the device.
        measure: Positions per second of a configuration, by a short probe on the backend.

    Returns:
        Trained tokens per second of the result, None if nothing had to be measured.
    """
    _resolve_plain(draft, data, device)
    speed = None
    sized = any(draft.is_auto(k) for k in ("model.d_model", "model.n_layers"))
    if measure is not None and (sized or draft.is_auto("train.total_steps")):
        share = data.fill / data.work
        speed = _resolve_size(draft, data, device, lambda config: share * measure(config))
    _resolve_shape(draft, *LADDER[0])
    _resolve_batch(draft, data)
    _resolve_steps(draft, data, speed)
    _resolve_rates(draft)
    return speed


def _resolve_plain(draft: Draft, data: DataFacts, device: DeviceFacts) -> None:
    resolve, values = draft.resolve, draft.values
    if draft.is_auto("model.vocab_size") or draft.sources["model.vocab_size"].kind == "auto":
        draft.set("model.vocab_size", data.vocab_size, Source("auto", reason="the tokenizer's"))
    tied = bool(values["model.tie_embeddings"])
    resolve("model.embed_init_std", 0.02, "as the matrices; the rate of its own moves it fast")
    resolve("model.zero_init_outputs", not tied, "tied" if tied else "untied")
    # An eager step in bfloat16 took 625 ms and in float32 536 ms on an M4 Max (nanochat #685).
    native = device.native_bf16 and device.backend != "mps"
    why = "bfloat16 is native here" if native else "bfloat16 is not faster here"
    resolve("train.precision", "bfloat16" if native else "float32", why)
    resolve("train.ns_dtype", "float32", "as exact as the rest")
    compiled = device.backend == "mlx" and device.is_gpu
    resolve("train.compile", compiled, "whole step on Metal" if compiled else "eager starts sooner")


def _resolve_shape(draft: Draft, d_model: int, n_layers: int) -> None:
    resolve, values = draft.resolve, draft.values
    resolve("model.d_model", d_model, "size of the ladder")
    resolve("model.n_layers", n_layers, "size of the ladder")
    width = int(values["model.d_model"])
    if draft.is_auto("model.n_heads"):
        head = 64 if width >= 128 else 32
        heads = max(width // head, 1)
        # One head always divides; an odd width is for the rules to refuse.
        while heads > 1 and (width % heads or (width // heads) % 2):
            heads -= 1
        resolve("model.n_heads", heads, f"heads of {width // heads}")
    resolve("model.n_kv_heads", values["model.n_heads"], "as model.n_heads")
    resolve("model.head_dim", width // int(values["model.n_heads"]), "d_model / n_heads")
    d_ff = max(8 * round(float(values["model.mlp_multiple"]) * width / 8), 8)
    resolve("model.d_ff", d_ff, f"{values['model.mlp_multiple']:.3g} x d_model")


def _resolve_batch(draft: Draft, data: DataFacts) -> None:
    seq_len = int(draft.values["data.seq_len"])
    width = int(draft.values["model.d_model"])
    tokens = 3072 if width < 256 else 8192 if width < 512 else 16_384
    accum = int(draft.values["train.grad_accum_steps"])
    rows = max(int(tokens / (seq_len * data.fill * accum)), 1)
    why = f"about {round(rows * seq_len * data.fill * accum):,} tokens a step"
    draft.resolve("train.micro_batch_size", rows, why)


def _resolve_steps(draft: Draft, data: DataFacts, speed: float | None) -> None:
    values = draft.values
    rows = int(values["train.micro_batch_size"]) * int(values["train.grad_accum_steps"])
    step_tokens = rows * int(values["data.seq_len"]) * data.fill
    if draft.is_auto("train.total_steps"):
        if speed is None:
            steps, why = max(int(data.train_tokens / step_tokens), 20), "one epoch"
        else:
            seconds = 60.0 * float(values["train.minutes"]) * STEP_SHARE
            steps = max(int(speed * seconds / step_tokens), 20)
            most = max(int(MAX_EPOCHS * data.train_tokens / step_tokens), 20)
            epochs = min(steps, most) * step_tokens / data.train_tokens
            why = (
                f"{values['train.minutes']:g} min at {speed / 1000:.1f}k tok/s, {epochs:.2g} epochs"
            )
            if steps > most:
                steps, why = most, f"{MAX_EPOCHS} epochs; more would learn this text by heart"
        draft.resolve("train.total_steps", steps, why)
    total = int(values["train.total_steps"])
    warmup = min(100, total // 20)
    draft.resolve("train.warmup_steps", warmup, "a twentieth of the run, at most 100")
    least = math.ceil(int(values["train.eval_tokens"]) / step_tokens)
    tenth = math.ceil(total / 10)
    draft.resolve("train.ckpt_interval", tenth, "10 checkpoints")
    # Every checkpoint is validated, to know the best.
    why = "with each checkpoint" if tenth >= least else "not more tokens than are trained on"
    draft.resolve("train.eval_interval", max(tenth, least), why)


def _resolve_rates(draft: Draft) -> None:
    values = draft.values
    lr = float(values["train.lr"])
    tied = bool(values["model.tie_embeddings"])
    for group, factor in RATE_MULTIPLIERS["tied" if tied else "untied"].items():
        if values["train.optimizer"] == "adamw" and group == "matrix":
            factor = 1.0
        why = f"{factor:g} x train.lr"
        if group == "head" and int(values["model.d_model"]) > MEASURED_WIDTH:
            factor *= MEASURED_WIDTH / int(values["model.d_model"])
            why += f" x {MEASURED_WIDTH} / model.d_model"
        draft.resolve(f"train.lr_{group}", float(f"{lr * factor:.6g}"), why)
    draft.resolve("train.min_lr", 0.1 * lr, "a tenth of train.lr")


def _trial(draft: Draft, data: DataFacts, d_model: int, n_layers: int) -> RunConfig:
    """A configuration of one size, to measure and weigh it; its length plays no part."""
    trial = Draft(dict(draft.values), dict(draft.sources))
    trial.resolve("train.total_steps", 1_000_000_000, "")
    _resolve_shape(trial, d_model, n_layers)
    _resolve_batch(trial, data)
    _resolve_steps(trial, data, None)
    _resolve_rates(trial)
    trial.resolve("train.save_dir", "checkpoints/trial", "")
    return build(trial)


def _resolve_size(
    draft: Draft, data: DataFacts, device: DeviceFacts, measure: Callable[[RunConfig], float]
) -> float:
    """Choose the rung; returns the speed measured at it."""
    budget = device.budget_bytes * float(draft.values["train.memory_fraction"])
    seconds = 60.0 * float(draft.values["train.minutes"]) * STEP_SHARE
    sized = any(draft.is_auto(k) for k in ("model.d_model", "model.n_layers"))
    trials = [_trial(draft, data, *rung) for rung in (LADDER if sized else LADDER[:1])]
    fitting = [c for c in trials if _memory(c) <= budget] or trials[:1]
    if not sized or not draft.is_auto("train.total_steps"):
        # The length is known: the largest size that sees enough tokens in these steps.
        enough = [c for c in fitting if _tokens(c) >= TOKENS_PER_PARAMETER / data.fill * _size(c)]
        config = (enough or fitting)[-1 if enough else 0]
        speed = measure(config)
        _note(draft, config, speed)
        return speed
    start = 0
    speed = measure(fitting[start])
    rate = speed * _flops(fitting[start])  # FLOP/s, which larger sizes reach at least
    chosen = 0
    for i, config in enumerate(fitting):
        if rate / _flops(config) * seconds >= TOKENS_PER_PARAMETER * _size(config):
            chosen = i
    while chosen != start:
        speed = measure(fitting[chosen])
        if chosen == 0 or speed * seconds >= TOKENS_PER_PARAMETER * _size(fitting[chosen]):
            break
        chosen -= 1
        if chosen == start:
            speed = rate / _flops(fitting[start])
    config = fitting[chosen]
    _note(draft, config, speed)
    return speed


def _note(draft: Draft, config: RunConfig, speed: float) -> None:
    size = _size(config)
    why = f"{size / 1e6:.1f} M parameters, {speed / 1000:.1f}k tok/s measured"
    values: dict[str, Any] = {
        "model.d_model": config.model.d_model,
        "model.n_layers": config.model.n_layers,
    }
    for name, value in values.items():
        draft.resolve(name, value, why)


def _tokens(config: RunConfig) -> int:
    t = config.train
    return t.total_steps * t.micro_batch_size * t.grad_accum_steps * config.data.seq_len


def _memory(config: RunConfig) -> int:
    return predict_training_memory(config, param_specs(config.model)).total


def _flops(config: RunConfig) -> float:
    return flops_per_token(config.model, param_specs(config.model), config.data.seq_len)


def _size(config: RunConfig) -> int:
    return num_parameters(param_specs(config.model))
