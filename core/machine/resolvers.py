"""The rules by which single "auto" keys are resolved, each with its reason; a key that is set stays.

What depends on the choice of a size is put together by core.machine.autoconfig.
"""

import math
from dataclasses import dataclass

from core.config.draft import Draft, Source
from core.machine import depth as dials
from core.machine.depth import Dial
from core.machine.scaling import MAX_EPOCHS, Tier, tier_heads, tier_of

STORY_VOCAB_SIZE = 4096
# Of the longest story in that vocabulary, about.
STORY_TOKENS = 224
# Share of the time that goes to steps; the rest is validation, samples and saving (docs/LOG.md).
STEP_SHARE = 0.95
# What a run may lose at most to a crash or a power cut, where its speed is known.
CHECKPOINT_MINUTES = 30
SIZE = ("model.d_model", "model.n_layers")
# Limits of the schema.
MAX_ROWS, MAX_STEPS = 65_536, 1_000_000_000
# Rates of the groups as multiples of train.lr, measured at a width of 128 (docs/LOG.md 2026-11-21).
# The head's falls with the width, as the sum it scales grows (Yang et al., 2022, arXiv:2203.03466).
MEASURED_WIDTH = 128
RATE_MULTIPLIERS = {
    "untied": {"matrix": 6.0, "embed": 50.0, "head": 25.0, "vector": 5.0, "router": 1.0},
    "tied": {"matrix": 4.0, "embed": 2.0, "head": 2.0, "vector": 2.0, "router": 1.0},
}


@dataclass(frozen=True)
class DataFacts:
    """What is known of the prepared data.

    Attributes:
        vocab_size: Tokens of its tokenizer.
        train_tokens: Tokens of its training split.
        name: Short name of the text, for a reason.
        is_stories: Whether it is the story corpus.
        fill: Share of a window's positions that are trained on, above 0 to 1; the rest is padding.
        work: Share of a window's positions that are computed, above 0 to 1.
    """

    vocab_size: int
    train_tokens: int
    name: str
    is_stories: bool
    fill: float = 1.0
    work: float = 1.0


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of the device before a framework is asked.

    Attributes:
        backend: "mlx", "mps", "cuda" or "cpu".
        reason: Why it was chosen; empty where it was given.
        is_gpu: Whether the backend computes on a GPU.
        native_bf16: Whether bfloat16 is a native type there.
        budget_bytes: Memory that a run may use, before `train.memory_fraction`.
        memory_bytes: The memory it is sold by, which names its tier; None where only the budget is
            known.
    """

    backend: str
    reason: str
    is_gpu: bool
    native_bf16: bool
    budget_bytes: int
    memory_bytes: int | None = None

    @property
    def tier(self) -> Tier:
        """The largest model that is decided for this device."""
        return tier_of(self.budget_bytes if self.memory_bytes is None else self.memory_bytes)


def resolve_windows(draft: Draft, limit: int | None) -> None:
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


def resolve_plain(draft: Draft, data: DataFacts, device: DeviceFacts) -> None:
    """What follows from the tokenizer, the head and the device."""
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
    resolve(
        "train.compile", compiled, "whole step on the GPU" if compiled else "eager starts sooner"
    )


def resolve_shape(draft: Draft, d_model: int, n_layers: int) -> None:
    """The shape, of this size where it is not set."""
    resolve, values = draft.resolve, draft.values
    both = all(draft.sources[k].kind in ("auto", "default") for k in SIZE)
    resolve("model.d_model", d_model, "size of the ladder")
    resolve("model.n_layers", n_layers, "size of the ladder")
    width = int(values["model.d_model"])
    named = tier_heads(width, int(values["model.n_layers"])) if both else None
    if named is not None:
        resolve("model.n_heads", named, f"heads of {width // named}, as its tier has them")
    if draft.is_auto("model.n_heads"):
        head = 64 if width >= 128 else 32
        heads = max(width // head, 1)
        # One head always divides; an odd width is for the rules to refuse.
        while heads > 1 and (width % heads or (width // heads) % 2):
            heads -= 1
        resolve("model.n_heads", heads, f"heads of {width // heads}")
    resolve("model.n_kv_heads", values["model.n_heads"], "as model.n_heads")
    resolve("model.head_dim", width // int(values["model.n_heads"]), "d_model / n_heads")
    d_ff = dials.hidden_width(float(values["model.mlp_multiple"]), width)
    resolve("model.d_ff", d_ff, f"{values['model.mlp_multiple']:.3g} x d_model")


def plan_batch(draft: Draft, data: DataFacts, horizon: float | None) -> None:
    """Rows of a micro-batch by the tokens that a step should have, whatever memory says."""
    seq_len = int(draft.values["data.seq_len"])
    width = int(draft.values["model.d_model"])
    if horizon is not None:
        tokens = dials.batch_tokens(horizon)
    else:
        tokens = 3072 if width < 256 else 8192 if width < 512 else 16_384
    accum = int(draft.values["train.grad_accum_steps"])
    rows = max(int(tokens / (seq_len * data.fill * accum)), 1)
    # A number that can be halved, where memory makes it necessary.
    rows -= rows % 4 if rows >= 32 else 0
    why = f"about {round(rows * seq_len * data.fill * accum):,} tokens a step"
    draft.resolve("train.micro_batch_size", min(rows, MAX_ROWS), why)


def resolve_steps(
    draft: Draft, data: DataFacts, speed: float | None, horizon: float | None = None
) -> None:
    """Length, warm-up and intervals.

    Args:
        draft: Its batch is set.
        data: Facts of the text.
        speed: Trained tokens per second, None where it is not known.
        horizon: Tokens that `--depth` wants, None without it.
    """
    values = draft.values
    rows = int(values["train.micro_batch_size"]) * int(values["train.grad_accum_steps"])
    step_tokens = rows * int(values["data.seq_len"]) * data.fill
    if draft.is_auto("train.total_steps"):
        most = max(int(MAX_EPOCHS * data.train_tokens / step_tokens), 20)
        timed = horizon is None or dials.is_given(draft, "train.minutes")
        if timed and speed is None:
            steps, why = max(int(data.train_tokens / step_tokens), 20), "one epoch"
        elif timed and speed is not None:
            seconds = 60.0 * float(values["train.minutes"]) * STEP_SHARE
            steps = max(int(speed * seconds / step_tokens), 20)
            epochs = min(steps, most) * step_tokens / data.train_tokens
            why = f"{values['train.minutes']:g} min at {speed_text(speed)}, {epochs:.2g} epochs"
        else:
            wanted = horizon or 0.0
            steps = max(math.ceil(wanted / step_tokens), 20)
            why = f"{dials.TOKENS_PER_PARAMETER} tokens a parameter, {wanted / 1e6:,.0f} M"
        if steps > most and (not timed or speed is not None):
            steps, why = most, f"{MAX_EPOCHS} epochs; more would learn this text by heart"
        draft.resolve("train.total_steps", min(steps, MAX_STEPS), why)
    total = int(values["train.total_steps"])
    warmup = min(100, total // 20)
    draft.resolve("train.warmup_steps", warmup, "a twentieth of the run, at most 100")
    least = math.ceil(int(values["train.eval_tokens"]) / step_tokens)
    interval, why = _checkpoint_interval(total, step_tokens, speed, least)
    draft.resolve("train.ckpt_interval", interval, why)
    # Every checkpoint is validated, to know the best.
    why = "with each checkpoint" if interval >= least else "not more tokens than are trained on"
    draft.resolve("train.eval_interval", max(interval, least), why)


def speed_text(tokens_per_sec: float) -> str:
    """Thousands a second, `10.6k tok/s`, or below one thousand the number itself, `42 tok/s`."""
    if tokens_per_sec < 1_000:
        return f"{tokens_per_sec:.3g} tok/s"
    return f"{tokens_per_sec / 1000:.1f}k tok/s"


def _checkpoint_interval(
    total: int, step_tokens: float, speed: float | None, least: int
) -> tuple[int, str]:
    """Steps between checkpoints, and why: a tenth of the run, but no more than half an hour.

    Half an hour is never less than `least` steps, since every checkpoint is validated.
    """
    tenth = math.ceil(total / 10)
    if speed is None:
        return tenth, "10 checkpoints"
    in_time = max(int(60 * CHECKPOINT_MINUTES * speed / step_tokens), least, 1)
    if in_time >= tenth:
        return tenth, "10 checkpoints"
    minutes = in_time * step_tokens / speed / 60
    return in_time, f"about every {minutes:.0f} min: what a crash can cost"


def resolve_rates(draft: Draft, dial: Dial | None = None) -> None:
    """The rates of the groups from `train.lr` and the width."""
    values = draft.values
    lr = float(values["train.lr"])
    tied = bool(values["model.tie_embeddings"])
    for group, factor in RATE_MULTIPLIERS["tied" if tied else "untied"].items():
        if values["train.optimizer"] == "adamw" and group == "matrix":
            factor = 1.0
        why = f"{factor:g} x train.lr"
        if group == "matrix" and dial is not None:
            more, how = dials.matrix_factor(values)
            factor, why = factor * more, why + how
        if group == "head" and int(values["model.d_model"]) > MEASURED_WIDTH:
            factor *= MEASURED_WIDTH / int(values["model.d_model"])
            why += f" x {MEASURED_WIDTH} / model.d_model"
        draft.resolve(f"train.lr_{group}", float(f"{lr * factor:.6g}"), why)
    draft.resolve("train.min_lr", 0.1 * lr, "a tenth of train.lr")
