"""The experiment that every backend runs: its configuration, its batches, its prompts.

The built-in one is small and awkward on purpose: fewer key heads than query heads, sizes and a
length that are no powers of two, two micro-batches with a partial window among the rows, a clip that
is active, decay, and a momentum that is still warming up. No text is needed: the tokens come from a
seeded integer Markov chain, which a model learns within a few steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.config.draft import Source
from core.config.load import build, load
from core.config.schema import RunConfig
from core.data.sampling.loader import TrainLoader, open_train_loader
from core.data.shards.stream import TokenStream
from core.errors import PippinError
from core.machine.autoconfig import DataFacts, DeviceFacts, resolve_auto

# What the built-in experiment sets, and what fills sizes that a preset leaves "auto".
SIZES: dict[str, Any] = {
    "model.vocab_size": 257,
    "model.n_layers": 2,
    "model.d_model": 64,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.d_ff": 172,
    "data.seq_len": 48,
    "train.micro_batch_size": 3,
}
BUILT_IN: dict[str, Any] = {
    **SIZES,
    "train.grad_accum_steps": 2,
    "train.max_grad_norm": 0.25,
    "train.momentum_warmup_steps": 10,
}
# What is compared: rounding, so neither half precision nor TF32.
FORCED: dict[str, Any] = {"train.precision": "float32", "train.tf32": False}

NUM_STATES = 24
# Chances of a state's three successors, of 65,536.
_FIRST, _SECOND = 49_152, 60_293
PROMPT_LENGTHS = (5, 11, 16)
NEW_TOKENS = 32


def resolve_experiment(
    config: str | None, overrides: Sequence[str], num_steps: int
) -> tuple[RunConfig, list[str]]:
    """The configuration to run, without a backend of its own, and what was changed in it.

    Args:
        config: Preset name or path; None is the built-in experiment.
        overrides: `section.key=value` texts.
        num_steps: Length of the schedule where the configuration gives none.

    Raises:
        PippinError: P010 to P012 for a configuration that cannot be used.
    """
    built_in = BUILT_IN if config is None else {}
    typed = dict.fromkeys(built_in, "the built-in experiment")
    command = "python tools/parity.py --config"
    draft = load(config=config, overrides=overrides, flags=built_in, typed=typed, command=command)
    notes = []
    for key, value in FORCED.items():
        if draft.is_auto(key) or draft.values[key] == value:
            draft.set(key, value, Source("auto", reason="compared to rounding"))
            continue
        if draft.sources[key].kind == "flag":
            raise PippinError(
                "P012",
                f"{draft.sources[key].where}: backends are compared to rounding, in float32.",
                remedy=f"leave out {draft.sources[key].where}",
            )
        notes.append(f"{key}: {value} instead of {draft.values[key]}, so that rounding is all")
        draft.set(key, value, Source("auto", reason="compared to rounding"))
    _fill_sizes(draft.values, lambda key, value: draft.resolve(key, value, "small"))
    draft.resolve("train.backend", "cpu", "replaced by each backend's own name")
    draft.resolve("train.total_steps", num_steps, "--steps")
    draft.resolve("train.save_dir", "checkpoints/parity", "nothing is kept there")
    draft.resolve("data.corpus_bytes", 100_000, "not used")
    draft.resolve("data.tokenizer", "byte", "not used")
    vocab_size = int(draft.values["model.vocab_size"])
    facts = DataFacts(vocab_size, train_tokens=100_000, name="parity", is_stories=False)
    device = DeviceFacts("cpu", "", is_gpu=False, native_bf16=False, budget_bytes=1 << 33)
    resolve_auto(draft, facts, device, None)
    return build(draft), notes


def _fill_sizes(values: Mapping[str, Any], resolve: Any) -> None:
    width_given = values["model.d_model"] != "auto"
    for key, value in SIZES.items():
        # Heads and d_ff of the small width would not fit a width that was given.
        if not (width_given and key in ("model.n_heads", "model.n_kv_heads", "model.d_ff")):
            resolve(key, value)
    if values["model.n_heads"] != "auto" and values["model.n_heads"] % 2:
        resolve("model.n_kv_heads", values["model.n_heads"])
    resolve("data.sampling", "contiguous")
    resolve("model.max_seq_len", max(values["data.seq_len"], max(PROMPT_LENGTHS) + NEW_TOKENS))


def markov_tokens(count: int, vocab_size: int, seed: int) -> NDArray[np.int32]:
    """A learnable stream of token ids, the same integers on every machine.

    Each of at most `NUM_STATES` ids is followed by one of three others, with chances 0.75, 0.17
    and 0.08: at most 0.72 nats a token, against ln(vocab_size) before training.

    Returns:
        int32 `[count]`, each below `vocab_size`.
    """
    num_states = min(NUM_STATES, vocab_size)
    # random_raw, because numpy's distributions may change from version to version.
    source = np.random.PCG64(seed)
    successors = (source.random_raw(3 * num_states) % np.uint64(num_states)).reshape(-1, 3).tolist()
    stride = vocab_size // num_states
    state, out = 0, np.empty(count, np.int32)
    for i, raw in enumerate((source.random_raw(count) >> np.uint64(48)).tolist()):
        out[i] = state * stride
        state = successors[state][0 if raw < _FIRST else 1 if raw < _SECOND else 2]
    return out


def token_stream(config: RunConfig, num_steps: int) -> TokenStream:
    """About half the tokens of the steps, so that every window is seen, the partial one too."""
    train, seq_len = config.train, config.data.seq_len
    rows = train.micro_batch_size * train.grad_accum_steps * num_steps
    count = max(rows // 2, 2) * seq_len + max(seq_len // 3, 1) + 1
    vocab_size = config.model.vocab_size
    ids = markov_tokens(count, vocab_size, train.seed)
    return TokenStream([ids], vocab_size=vocab_size, text_bytes=count)


def open_loader(config: RunConfig, num_steps: int, *, start_step: int) -> TrainLoader:
    """The batches of the experiment from a step on, by the project's own loader."""
    return open_train_loader(token_stream(config, num_steps), config, start_step=start_step)


def prompts(config: RunConfig) -> tuple[list[NDArray[np.int32]], int]:
    """Prompts of different lengths, and how many tokens fit after the longest."""
    limit = config.model.max_seq_len
    ids = markov_tokens(sum(PROMPT_LENGTHS), config.model.vocab_size, config.train.seed + 1)
    lengths = [min(n, max(limit // 2, 1)) for n in PROMPT_LENGTHS]
    starts = np.cumsum([0, *lengths])
    rows = [ids[a : a + n] for a, n in zip(starts, lengths)]
    return rows, max(1, min(NEW_TOKENS, limit - max(lengths)))
