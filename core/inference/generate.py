"""Text from a model: batched, with a cache of keys and values, on any backend.

A prompt's text is a function of the weights, the prompt, the sampling settings and the prompt's row
number. It does not depend on the other prompts, up to the rounding of a different batch shape.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from core.backend import Backend, Float32
from core.errors import PippinError
from core.inference.sampling import Sampling, sample
from core.inference.text import BytesDecoder, decode_tokens

StopReason = Literal["stop", "length", "context"]
OnToken = Callable[[int, int], None]


class TextCodec(BytesDecoder, Protocol):
    """The part of a tokenizer that generation needs."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def bos_id(self) -> int:
        """Id that stands before a document."""
        ...

    @property
    def eos_id(self) -> int:
        """Id that follows a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no special id added."""
        ...


@dataclass(frozen=True)
class Generation:
    """One text.

    Attributes:
        prompt_tokens: Ids that the model was given, the one that begins a document included.
        tokens: Ids that it wrote, without the one that ended the text.
        text: Those, decoded; continues the prompt's text directly.
        seconds: From the start of its batch to its last token.
        stop_reason: "stop" for an id of `stop_ids`, "length" for `max_new_tokens`, "context" where
            the model's context is full.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    seconds: float
    stop_reason: StopReason


@dataclass
class _Row:
    number: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason | None = None
    seconds: float = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class _Limits:
    max_new_tokens: int
    max_seq_len: int
    vocab_size: int
    stop_ids: frozenset[int]


def generate(
    backend: Backend,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    *,
    max_seq_len: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] | None = None,
    row_ids: Sequence[int] | None = None,
    batch_size: int = 16,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue every prompt.

    Args:
        backend: Backend with weights loaded.
        tokenizer: The run's tokenizer.
        prompts: Beginnings of documents; one may be empty.
        max_seq_len: The model's context, `config.model.max_seq_len`: the most tokens it is given.
        max_new_tokens: The most tokens to write for each prompt, at least 1.
        sampling: How tokens are chosen.
        stop_ids: Ids that end a text; by default those that end or begin a document.
        row_ids: Row number of each prompt, part of its seed; by default 0, 1, 2, ...
        batch_size: The most prompts at once.
        on_token: Called with (index of the prompt, id) for every token as it is written.

    Returns:
        One `Generation` for each prompt, in their order.

    Raises:
        PippinError: P601 for a prompt longer than the context, or a setting out of range.
    """
    if max_new_tokens < 1:
        raise PippinError(
            "P601",
            f"max_new_tokens is {max_new_tokens}; it must be 1 or more.",
            remedy="--max-new-tokens 256",
            kept="nothing was written.",
        )
    ends = (tokenizer.eos_id, tokenizer.bos_id) if stop_ids is None else stop_ids
    limits = _Limits(
        max_new_tokens,
        max_seq_len,
        tokenizer.vocab_size,
        frozenset(ends),
    )
    encoded = [prompt_ids(tokenizer, prompt, max_seq_len) for prompt in prompts]
    numbers = range(len(prompts)) if row_ids is None else row_ids
    results: list[Generation] = []
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        rows = [_Row(n, p) for n, p in zip(numbers[part], encoded[part], strict=True)]
        _run_batch(backend, rows, limits, sampling, first, on_token)
        results += [_result(tokenizer, row) for row in rows]
    return results


def prompt_ids(tokenizer: TextCodec, prompt: str, max_seq_len: int) -> tuple[int, ...]:
    """Ids of a prompt, after the id that begins a document where the context has room for it.

    In the training data every document follows that id; without it a prompt looks like the middle
    of one.

    Raises:
        PippinError: P601 for a prompt longer than the context.
    """
    ids = tuple(tokenizer.encode(prompt))
    if len(ids) > max_seq_len:
        raise PippinError(
            "P601",
            f"the prompt has {len(ids):,} tokens, the model's context is {max_seq_len:,}.",
            remedy="a shorter prompt",
        )
    return (tokenizer.bos_id, *ids) if len(ids) < max_seq_len else ids


def _run_batch(
    backend: Backend,
    rows: Sequence[_Row],
    limits: _Limits,
    sampling: Sampling,
    first: int,
    on_token: OnToken | None,
) -> None:
    """Write until every row has stopped; rows that have are taken out of the cache."""
    started = time.perf_counter()
    longest = max(len(row.prompt) for row in rows)
    cache = backend.start(len(rows), min(limits.max_seq_len, longest + limits.max_new_tokens))
    active = list(range(len(rows)))
    tokens = np.zeros((len(rows), longest), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row.prompt)] = row.prompt
    lengths = np.array([len(row.prompt) for row in rows], np.int32)
    while True:
        logits = backend.decode(tokens, lengths, cache)
        chosen = _choose(logits, [rows[i] for i in active], limits, sampling)
        for i, token in zip(active, chosen, strict=True):
            _append(rows[i], token, limits)
            if rows[i].stop_reason is not None:
                rows[i].seconds = time.perf_counter() - started
            if on_token is not None and rows[i].stop_reason != "stop":
                on_token(first + i, token)
        kept = [b for b, i in enumerate(active) if rows[i].stop_reason is None]
        if not kept:
            return
        if len(kept) < len(active):
            cache.keep(kept)
            active = [active[b] for b in kept]
        tokens = np.array([[rows[i].tokens[-1]] for i in active], np.int32)  # [B, 1]
        lengths = np.ones(len(active), np.int32)


def _choose(
    logits: Float32, rows: Sequence[_Row], limits: _Limits, sampling: Sampling
) -> list[int]:
    # A model may have more rows than the tokenizer has ids; those mean nothing.
    legal = logits[:, : limits.vocab_size]
    positions = [row.length for row in rows]
    chosen = sample(legal, sampling, [row.number for row in rows], positions)
    return [int(token) for token in chosen]


def _append(row: _Row, token: int, limits: _Limits) -> None:
    """Add a token, and find out whether the row ends by it."""
    if token in limits.stop_ids:
        row.stop_reason = "stop"
        return
    row.tokens.append(token)
    if len(row.tokens) >= limits.max_new_tokens:
        row.stop_reason = "length"
    elif row.length > limits.max_seq_len:  # the token just written has no place in the context
        row.stop_reason = "context"


def _result(tokenizer: BytesDecoder, row: _Row) -> Generation:
    return Generation(
        prompt_tokens=row.prompt,
        tokens=tuple(row.tokens),
        text=decode_tokens(tokenizer, row.tokens),
        seconds=row.seconds,
        stop_reason=row.stop_reason or "length",
    )
