"""The order of windows is a bijection in each epoch, for every size, and depends on nothing else.

Run: pytest tests/unit/test_data_order.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.sampling.order import WindowOrder, permute

M64 = (1 << 64) - 1


def reference_mix64(x: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def reference_permute(index: int, n: int, seed: int, epoch: int) -> int:
    """The Feistel network one number at a time, as docs/data-format.md writes it."""
    golden = 0x9E3779B97F4A7C15
    if n == 1:
        return 0
    key = reference_mix64((reference_mix64(seed) + epoch * golden) & M64)
    bits = max(2, (n - 1).bit_length())
    x = index
    while True:
        a, b = bits // 2, bits - bits // 2
        left, right = x >> b, x & ((1 << b) - 1)
        for i in range(1, 9):
            f = reference_mix64((right + key + i * golden) & M64)
            left, right = right, left ^ (f & ((1 << a) - 1))
            a, b = b, a
        x = (left << b) | right
        if x < n:
            return x


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 400), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6))
def test_every_index_once(n: int, seed: int, epoch: int) -> None:
    index = np.arange(n, dtype=np.uint64)
    out = permute(index, n, seed, np.full(n, epoch, np.uint64))
    assert sorted(out.tolist()) == list(range(n))
    some = [0, n // 2, n - 1]
    assert [int(out[i]) for i in some] == [reference_permute(i, n, seed, epoch) for i in some]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 65_537, 1_000_003])
def test_sizes_at_powers_of_two(n: int) -> None:
    out = permute(np.arange(n, dtype=np.uint64), n, 3, np.zeros(n, np.uint64))
    assert np.array_equal(np.bincount(out.astype(np.int64), minlength=n), np.ones(n, np.int64))


def test_rows_are_a_function_of_their_number() -> None:
    order = WindowOrder(37, seed=5)
    whole = order.windows(0, 200)
    for first, count in ((0, 1), (36, 2), (37, 37), (73, 90), (199, 1)):
        assert np.array_equal(order.windows(first, count), whole[first : first + count])
    for epoch in range(5):
        assert sorted(whole[epoch * 37 : (epoch + 1) * 37].tolist()) == list(range(37))


def test_epochs_and_seeds_differ() -> None:
    n = 1000
    first = WindowOrder(n, 1).windows(0, 2 * n)
    other = WindowOrder(n, 2).windows(0, n)
    # Two random permutations agree in one place on average.
    assert np.count_nonzero(first[:n] == first[n:]) < 12
    assert np.count_nonzero(first[:n] == other) < 12


def test_order_looks_random() -> None:
    """Neighbours are far apart, and the mean position of the first half is the middle."""
    n = 4096
    out = WindowOrder(n, 9).windows(0, n).astype(np.float64)
    assert abs(out[: n // 2].mean() / n - 0.5) < 0.02
    assert abs(np.abs(np.diff(out)).mean() / n - 1 / 3) < 0.02
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.06


def test_golden_order() -> None:
    """The order is part of an experiment: it must never change."""
    assert WindowOrder(11, 7).windows(0, 13).tolist() == [
        reference_permute(i % 11, 11, 7, i // 11) for i in range(13)
    ]
    assert WindowOrder(11, 7).windows(0, 13).tolist() == [10, 6, 0, 9, 3, 4, 2, 5, 1, 7, 8, 4, 6]


def test_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="below n=3"):
        permute(np.array([3], np.uint64), 3, 0, np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match="at least 1"):
        WindowOrder(0, 1)
