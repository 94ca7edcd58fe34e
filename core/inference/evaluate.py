"""How good a model is: loss, bits per byte, and what it can do.

A backend returns each token's loss; everything is reduced here, in float64, so that a figure means
the same on every backend. Bits per byte compares models with different tokenizers, the loss cannot.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.backend import Backend, Batch, Float32
from core.errors import PippinError
from core.inference.generate import TextCodec

# Rows are padded to a multiple of this, so that few different shapes are compiled.
_LENGTH_MULTIPLE = 32


@dataclass(frozen=True)
class Evaluation:
    """Means over the targets, by their weights.

    Attributes:
        loss: Nats a token.
        bits_per_byte: Bits for each byte of UTF-8 text, or None where bytes were not given.
        perplexity: exp(loss).
        accuracy: Share of the targets that were the most likely token.
        tokens: Number of targets with a weight.
    """

    loss: float
    bits_per_byte: float | None
    perplexity: float
    accuracy: float
    tokens: int


class _Probe(Protocol):
    """A question: does the model prefer `answer` to every distractor after `context`?"""

    @property
    def context(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def distractors(self) -> Sequence[str]: ...
    @property
    def skill(self) -> str: ...


def evaluate(
    backend: Backend, batches: Iterable[Batch], *, token_bytes: NDArray[np.int64] | None = None
) -> Evaluation:
    """Score batches and reduce, over all ranks.

    Args:
        backend: Backend with weights loaded.
        batches: Batches of this rank; a weight of 0 leaves a target out.
        token_bytes: int64 `[V]`, the tokenizer's `token_bytes()`, for bits per byte.

    Raises:
        PippinError: P201 where no target has a weight.
    """
    sums = np.zeros(5, np.float64)  # nats, weight, hits, bytes, targets
    for batch in batches:
        scores = backend.score(batch)
        used = batch.weights > 0
        weights = batch.weights[used].astype(np.float64)
        text = 0.0 if token_bytes is None else weights @ token_bytes[batch.targets[used]]
        sums += [
            weights @ scores.nll[used].astype(np.float64),
            weights.sum(),
            weights @ scores.hit[used],
            text,
            used.sum(),
        ]
    nats, weight, hits, num_bytes, tokens = backend.sum_across(sums).tolist()
    if weight == 0:
        raise PippinError("P201", "there is no text to evaluate: no target has a weight.")
    loss = nats / weight
    return Evaluation(
        loss=loss,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes > 0 else None,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        accuracy=hits / weight,
        tokens=int(tokens),
    )


@dataclass(frozen=True)
class _Candidate:
    """One continuation: `ids[start:]` is scored."""

    probe: int
    ids: list[int]
    start: int


def probe_skills(
    backend: Backend,
    tokenizer: TextCodec,
    probes: Sequence[_Probe],
    *,
    max_seq_len: int,
    batch_size: int = 16,
) -> dict[str, tuple[int, int]]:
    """Multiple choice: how often the answer is likelier than every distractor.

    The likelihood is that of all tokens after those that the candidates and the context have in
    common, so that every candidate of a probe is measured from the same text, wherever the
    tokenizer cuts. A tie is not correct. A context that is too long loses its beginning, the same
    for every candidate.

    Args:
        backend: Backend with weights loaded.
        tokenizer: The run's tokenizer.
        probes: Questions, each with at least one distractor; contexts begin documents.
        max_seq_len: The most tokens of a row, `config.data.seq_len` or the model's context.
        batch_size: Rows of one call; every call has the same shape.

    Returns:
        skill -> (correct, total), in the order in which the skills appear.

    Raises:
        PippinError: P601 for an answer that is empty or longer than `max_seq_len`.
    """
    candidates: list[_Candidate] = []
    for number, probe in enumerate(probes):
        candidates += _candidates(tokenizer, number, probe, max_seq_len)
    scores: list[list[float]] = [[] for _ in probes]
    for candidate, score in _log_likelihoods(backend, candidates, batch_size, max_seq_len):
        scores[candidate.probe].append(score)
    result: dict[str, tuple[int, int]] = {}
    for probe, (answer, *others) in zip(probes, scores, strict=True):
        correct, total = result.get(probe.skill, (0, 0))
        result[probe.skill] = (correct + all(answer > other for other in others), total + 1)
    return result


def _candidates(
    tokenizer: TextCodec, number: int, probe: _Probe, max_seq_len: int
) -> list[_Candidate]:
    """The answer and the distractors, in this order."""
    texts = [probe.context + c for c in (probe.answer, *probe.distractors)]
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in (probe.context, *texts)]
    shared = _common_prefix(rows)
    rows = rows[1:]
    longest = max(map(len, rows))
    cut = max(0, longest - 1 - max_seq_len)  # the last token is a target only
    if cut >= shared or min(map(len, rows)) == shared:
        raise PippinError(
            "P601",
            f"a probe of skill {probe.skill!r} cannot be scored: answer {probe.answer!r}.",
            found=f"{longest - shared:,} tokens, of which 1 to {max_seq_len:,} can be scored",
        )
    return [_Candidate(number, row[cut:], shared - cut) for row in rows]


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    shared = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def _log_likelihoods(
    backend: Backend, candidates: Sequence[_Candidate], batch_size: int, max_seq_len: int
) -> Iterator[tuple[_Candidate, float]]:
    """Log-likelihood of each candidate's scored tokens, in nats, through batches of one shape."""
    longest = max((len(c.ids) - 1 for c in candidates), default=1)
    rounded = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    length = max(longest, min(rounded, max_seq_len))
    for first in range(0, len(candidates), batch_size):
        part = candidates[first : first + batch_size]
        tokens = np.zeros((batch_size, length), np.int32)
        targets = np.zeros((batch_size, length), np.int32)
        weights: Float32 = np.zeros((batch_size, length), np.float32)
        for b, candidate in enumerate(part):
            n = len(candidate.ids) - 1
            tokens[b, :n], targets[b, :n] = candidate.ids[:-1], candidate.ids[1:]
            weights[b, candidate.start - 1 : n] = 1
        scores = backend.score(Batch(tokens, targets, weights))
        nll = np.where(weights > 0, scores.nll.astype(np.float64), 0.0).sum(axis=1)  # [B]
        for candidate, nats in zip(part, nll.tolist()):
            yield candidate, -nats
