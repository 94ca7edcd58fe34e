"""From logits to the next token: one place for every backend.

The random numbers are a stateless hash of (seed, row, position), so a row's text depends neither on
the rows beside it nor on what was drawn before, and a text that is continued later continues as it
would have. Probabilities are float64; the draw inverts the cumulative distribution in the order of
the token ids, so that a rounding difference between two backends almost never changes the token.

Legend: B rows, V vocab_size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.backend import Float32, Int32
from core.errors import EXIT_FAULT, PippinError, all_problems

Float64 = NDArray[np.float64]

_U64 = (1 << 64) - 1
_UINT53 = float(1 << 53)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token, the lowest id of equals.
        top_k: Keep only the `top_k` most likely tokens; 0 is off. Lower ids win between equals.
        top_p: Of those, keep the smallest set whose probability reaches `top_p`; 1 is off.
        seed: Seed of the draws.

    Raises:
        PippinError: P601 listing every setting that cannot be used.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature}; it must be a number from 0 up")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed <= _U64:
            problems.append(f"seed is {self.seed}; it must be from 0 to 2^64 - 1")
        if problems:
            raise all_problems(
                "P601",
                problems,
                what="a sampling setting cannot be used.",
                remedy="leave the setting out: each has a default that can be used",
                kept="nothing was written.",
            )


def sample(
    logits: Float32, sampling: Sampling, rows: Sequence[int], positions: Sequence[int]
) -> Int32:
    """Choose one token for every row.

    Args:
        logits: float32 `[B, V]`; -inf forbids a token.
        sampling: Settings.
        rows: `[B]`, which text of the request each row is; part of its seed.
        positions: `[B]`, position of the token that is chosen; part of its seed.

    Returns:
        int32 `[B]`.

    Raises:
        PippinError: P601 where a row has NaN or +inf, or forbids every token.
    """
    _check_logits(logits, rows)
    if sampling.temperature == 0:
        best: Int32 = logits.argmax(axis=1).astype(np.int32)
        return best
    cumulative = np.cumsum(probabilities(logits, sampling), axis=1)  # [B, V]
    total = cumulative[:, -1]
    draws = np.minimum(
        uniform(sampling.seed, rows, positions) * total, np.nextafter(total, 0.0)
    )  # the product may round up to the total
    # The first id whose cumulative probability exceeds the draw; one of probability 0 never does.
    chosen: Int32 = (cumulative > draws[:, None]).argmax(axis=1).astype(np.int32)
    return chosen


def probabilities(logits: Float32, sampling: Sampling) -> Float64:
    """The distribution that `sample` draws from, at a temperature above 0.

    Returns:
        float64 `[B, V]`, each row sums to 1.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, rightly
        scaled /= sampling.temperature
    if 0 < sampling.top_k < scaled.shape[1]:
        scaled = _keep_top_k(scaled, sampling.top_k)
    p = np.exp(scaled)
    p /= p.sum(axis=1, keepdims=True)
    return _keep_top_p(p, sampling.top_p) if sampling.top_p < 1 else p


def uniform(seed: int, rows: Sequence[int], positions: Sequence[int]) -> Float64:
    """Numbers in [0, 1), float64 `[B]`: a hash of (seed, row, position), 53 bits each."""
    key = _mix64(np.array([seed], np.uint64))
    key = _mix64(key + np.asarray(rows, np.uint64))
    key = _mix64(key + np.asarray(positions, np.uint64))
    draws: Float64 = (key >> np.uint64(11)).astype(np.float64) / _UINT53
    return draws


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 (Steele, Lea and Flood, 2014), elementwise, wrapping."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _keep_top_k(scaled: Float64, k: int) -> Float64:
    """Exactly `k` of each row stay, the others become -inf; of equals the lower ids stay."""
    edge = np.partition(scaled, -k, axis=1)[:, -k, None]  # [B, 1], the k-th largest
    above = scaled > edge
    equal = scaled == edge
    room = k - above.sum(axis=1, keepdims=True)
    kept = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return np.where(kept, scaled, -np.inf)


def _keep_top_p(p: Float64, top_p: float) -> Float64:
    """The most likely tokens stay, up to and with the one that reaches `top_p`; renormalised."""
    order = np.argsort(-p, axis=1, kind="stable")  # [B, V], lower ids first between equals
    ranked = np.take_along_axis(p, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked  # probability of the more likely ones
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, before < top_p, axis=1)
    kept[np.arange(len(p)), order[:, 0]] = True
    rest: Float64 = np.where(kept, p, 0.0)
    rest /= rest.sum(axis=1, keepdims=True)
    return rest


def _check_logits(logits: Float32, rows: Sequence[int]) -> None:
    bad = np.isnan(logits) | np.isposinf(logits)  # [B, V]
    hopeless = bad.any(axis=1) | np.isneginf(logits).all(axis=1)
    if hopeless.any():
        b = int(hopeless.argmax())
        number = int(bad[b].sum())
        found = f"{number} of {logits.shape[1]} are NaN or +inf" if number else "all are -inf"
        raise PippinError(
            "P601",
            f"the model's logits for text {rows[b]} cannot be sampled: {found}.",
            found="Its weights are damaged, or train.precision is too small for them.",
            remedy="an earlier checkpoint of the run, or train.precision=float32",
            exit_code=EXIT_FAULT,
        )
