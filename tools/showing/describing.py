"""What a configuration is: true parameter counts, predicted memory, and a time that says what it is.

Nothing here imports a framework. A count that depends on the text uses a stated vocabulary; a size
that the machine decides is not guessed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from core.config.draft import Draft
from core.config.load import build, load
from core.config.presets import preset_head
from core.config.schema import ModelConfig, RunConfig
from core.machine.autoconfig import DataFacts, DeviceFacts, resolve_auto, resolve_early
from core.machine.memory import predict_training_memory
from core.machine.rate import Rate
from core.machine.speed import flops_per_token
from core.params import num_parameters, param_specs
from core.paths import CONFIGS_DIR

# Vocabularies that a text decides: 65 characters as tinyshakespeare has, 256 bytes; 5 control symbols.
TEXT_VOCAB = {"char": 70, "byte": 261}
# Memory of the README's table, which must not depend on the machine that wrote it.
README_DEVICE = DeviceFacts("mlx", "", is_gpu=True, native_bf16=True, budget_bytes=1 << 40)


class Rates(Protocol):
    """The rate that a device is taken to reach in a precision."""

    def __call__(self, precision: str, *, tf32: bool = False) -> Rate:
        """See `core.machine.rate.rate_of`."""
        ...


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters: as built, with the other kind of head, and parts."""

    total: int
    tied: int
    untied: int
    non_embedding: int
    active: int


@dataclass(frozen=True)
class Described:
    """One configuration.

    Attributes:
        name: Preset or file name.
        path: The file.
        title: What it is for.
        about: Where its numbers come from.
        config: Resolved for the device.
        counts: Parameters; None where the machine decides the size.
        vocab_is_stated: Whether the file states the vocabulary they are counted with.
        memory_bytes: Predicted peak of a training step; None where the size is not known.
        tokens: Tokens of the run; None where the length is decided by time.
        seconds: Predicted time; None where the rate of the device is not known.
        time_is: "asked for", or how the rate is known.
    """

    name: str
    path: Path
    title: str
    about: str
    config: RunConfig
    counts: Counts | None
    vocab_is_stated: bool
    memory_bytes: int | None
    tokens: int | None
    seconds: float | None
    time_is: str


def count(model: ModelConfig) -> Counts:
    """Parameters of an architecture, from the table that models are built from."""
    specs = param_specs(model)
    other = param_specs(model.model_copy(update={"tie_embeddings": not model.tie_embeddings}))
    total, swapped = num_parameters(specs), num_parameters(other)
    outside = sum(s.size for s in specs if s.group in ("embed", "head"))
    # Experts are stacked [E, out, in], and a token goes to top_k of the E.
    resting = sum(
        s.size - s.size * model.top_k // model.n_experts for s in specs if len(s.shape) == 3
    )
    return Counts(
        total=total,
        tied=total if model.tie_embeddings else swapped,
        untied=swapped if model.tie_embeddings else total,
        non_embedding=total - outside,
        active=total - resting,
    )


def describe(path: Path, device: DeviceFacts, rates: Rates) -> Described:
    """A configuration on a device, at the rate of its own precision.

    Raises:
        PippinError: P010 or P011 for a file that does not load.
    """
    is_preset = path.parent == CONFIGS_DIR
    draft = load(config=path.stem if is_preset else str(path))
    sized = not any(draft.is_auto(k) for k in ("model.d_model", "model.n_layers"))
    timed = draft.is_auto("train.total_steps")
    stated = not draft.is_auto("model.vocab_size")
    config = resolved(draft, device)
    specs = param_specs(config.model)
    t = config.train
    tokens = t.total_steps * t.micro_batch_size * t.grad_accum_steps * config.data.seq_len
    seconds: float | None = 60.0 * t.minutes
    how = "asked for"
    if not timed:
        rate = rates(t.precision, tf32=t.tf32)
        work = flops_per_token(config.model, specs, config.data.seq_len) * tokens
        seconds = work / rate.flops if rate.flops and sized else None
        how = rate.how
    head = preset_head(path) if is_preset else None
    return Described(
        name=path.stem if is_preset else path.name,
        path=path,
        title=head.title if head else "",
        about=head.about if head else "",
        config=config,
        counts=count(config.model) if sized else None,
        vocab_is_stated=stated,
        memory_bytes=predict_training_memory(config, specs).total if sized else None,
        tokens=None if timed or not sized else tokens,
        seconds=seconds,
        time_is=how,
    )


def resolved(draft: Draft, device: DeviceFacts) -> RunConfig:
    """The configuration that a run on the device would have, were the text as large as it needs."""
    draft = Draft(dict(draft.values), dict(draft.sources))
    resolve_early(draft, device)
    tokenizer = str(draft.values["data.tokenizer"])
    draft.resolve("data.tokenizer", "bpe", "")
    known: Any = draft.values["model.vocab_size"]
    vocab = TEXT_VOCAB.get(tokenizer, 4096) if draft.is_auto("model.vocab_size") else int(known)
    data = DataFacts(vocab, 10**12, "text", is_stories=draft.values["data.input_file"] is None)
    for key, value in (("train.total_steps", 1000), ("train.save_dir", "checkpoints/shown")):
        draft.resolve(key, value, "")
    resolve_auto(draft, data, device, None)
    return build(draft)


def with_rate(shown: Described, tokens_per_s: float) -> Described:
    """The same with a measured speed."""
    if shown.tokens is None:
        return replace(shown, time_is=f"asked for; {tokens_per_s:,.0f} tokens/s measured")
    how = f"measured: {tokens_per_s:,.0f} tokens/s"
    return replace(shown, seconds=shown.tokens / tokens_per_s, time_is=how)
