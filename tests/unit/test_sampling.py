"""Sampling draws exactly the stated distribution, and from (seed, row, position) alone.

Run: pytest tests/unit/test_sampling.py
"""

import math
from collections import Counter

import numpy as np
import pytest

from core.errors import PippinError
from core.inference.sampling import Sampling, probabilities, sample, uniform


def reference(row, temperature, top_k, top_p):
    """The distribution of one row, token by token in plain Python."""
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if top_k:
        ranked = ranked[:top_k]
    best = max(row)
    mass = {i: math.exp((row[i] - best) / temperature) for i in ranked}
    total = sum(mass.values())
    kept, reached = {}, 0.0
    for i in ranked:
        if kept and reached >= top_p:
            break
        kept[i] = mass[i] / total
        reached += kept[i]
    total = sum(kept.values())
    return [kept.get(i, 0.0) / total for i in range(len(row))]


SETTINGS = [
    (0.8, 0, 1.0),
    (1.7, 3, 1.0),
    (0.5, 0, 0.6),
    (1.0, 5, 0.55),
    (2.5, 1, 1.0),
    (1.0, 0, 1e-6),
    (1.0, 99, 0.999999),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_probabilities_equal_brute_force(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(0, 2, (5, 11)).astype(np.float32)
    logits[1, 4] = -np.inf
    found = probabilities(logits, Sampling(temperature, top_k, top_p))
    for b in range(5):
        expected = reference(logits[b].tolist(), temperature, top_k, top_p)
        np.testing.assert_allclose(found[b], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.8, 0, 1.0), (1.3, 4, 0.9)])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square over 20,000 draws; the bound is passed by a right sampler but for 1 in 10^6."""
    row = np.array([0.3, -1.2, 2.0, 1.1, 0.0, 1.9, -3.0], np.float32)
    n = 20_000
    logits = np.tile(row, (n, 1))
    chosen = sample(logits, Sampling(temperature, top_k, top_p, seed=5), [0] * n, range(n))
    expected = reference(row.tolist(), temperature, top_k, top_p)
    counts = Counter(chosen.tolist())
    assert all(counts[i] == 0 for i in range(7) if expected[i] == 0)
    kept = [i for i in range(7) if expected[i] > 0]
    statistic = sum((counts[i] - n * expected[i]) ** 2 / (n * expected[i]) for i in kept)
    assert statistic < 40.0  # chi-square with at most 6 degrees: P(> 40) = 5e-7


def test_top_k_keeps_exactly_k_and_the_lower_ids_of_equals():
    logits = np.array([[1.0, 2.0, 1.0, 1.0, 1.0]], np.float32)
    p = probabilities(logits, Sampling(1.0, top_k=3))
    assert (p[0] > 0).tolist() == [True, True, True, False, False]


def test_top_p_of_equals_keeps_the_lower_ids():
    p = probabilities(np.zeros((1, 4), np.float32), Sampling(1.0, top_p=0.5))
    np.testing.assert_allclose(p[0], [0.5, 0.5, 0, 0])


def test_greedy_is_the_likeliest_and_the_lowest_of_equals():
    logits = np.array([[0.0, 3.0, 3.0], [-np.inf, -5.0, -9.0]], np.float32)
    out = sample(logits, Sampling(0.0), [0, 1], [0, 0])
    assert out.dtype == np.int32 and out.tolist() == [1, 1]


def test_tiny_temperature_is_greedy_without_overflow():
    logits = np.array([[1.0, 2.0, 30.0, 29.99]], np.float32)
    assert sample(logits, Sampling(1e-300), [0], [0]).tolist() == [2]


def test_a_row_depends_neither_on_its_batch_nor_on_earlier_draws():
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    settings = Sampling(1.0, seed=9)
    rows, positions = [4, 0, 7, 2, 9, 1], [3, 3, 8, 1, 0, 3]
    together = sample(logits, settings, rows, positions)
    alone = [
        int(sample(logits[[b]], settings, [rows[b]], [positions[b]])[0]) for b in (5, 2, 0, 1, 3, 4)
    ]
    assert [int(together[b]) for b in (5, 2, 0, 1, 3, 4)] == alone


def test_draws_differ_between_seeds_rows_and_positions():
    base = uniform(1, [0], [0])[0]
    assert (
        len({base, uniform(2, [0], [0])[0], uniform(1, [1], [0])[0], uniform(1, [0], [1])[0]}) == 4
    )


def test_uniform_is_uniform_over_rows_and_over_positions():
    """Mean, variance and neighbours' correlation of 40,000 draws within 5 standard errors."""
    n = 40_000
    for rows, positions in ((range(n), [7] * n), ([3] * n, range(n))):
        u = uniform(11, rows, positions)
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
        assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(n)
    assert uniform(2**64 - 1, [0], [2**40])[0] < 1


def test_draws_are_splitmix64_in_plain_integers():
    """Texts of a seed are the same in every version and on every machine."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    cases = [(1, 0, 0), (1, 3, 5), (2**64 - 1, 7, 1000)]
    for seed, row, position in cases:
        expected = (mix(mix(mix(seed) + row) + position) >> 11) / 2**53
        assert uniform(seed, [row], [position]).tolist() == [expected]
    assert uniform(1, [0], [0])[0].hex() == "0x1.631405e8db1b0p-1"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([0.0, np.nan, 1.0], "1 of 3 are NaN"),
        ([0.0, np.inf, 1.0], "1 of 3 are NaN or +inf"),
        ([-np.inf] * 3, "all are -inf"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error_that_names_the_row(row, words, temperature):
    logits = np.array([[0.0, 1.0, 2.0], row], np.float32)
    with pytest.raises(PippinError, match="text 5") as caught:
        sample(logits, Sampling(temperature), [4, 5], [0, 0])
    assert caught.value.code == "P601" and words in caught.value.what


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(PippinError) as caught:
        Sampling(**bad)
    assert caught.value.code == "P601" and next(iter(bad)) in caught.value.found


def test_all_bad_settings_are_listed_at_once():
    with pytest.raises(PippinError) as caught:
        Sampling(-1, -1, 2.0)
    assert len(caught.value.found.splitlines()) == 3
