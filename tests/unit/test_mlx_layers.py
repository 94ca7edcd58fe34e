"""The MLX layers and loss against float64 numpy, one at a time.

Run: pytest tests/unit/test_mlx_layers.py
"""

import mlx.core as mx
import numpy as np
import pytest

from backends.mlx import layers, losses
from core.dropout import dropout_row_keys, dropout_site_salt
from core.rope import rope_tables
from tests.reference import model_np

RNG = np.random.default_rng(2)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(2))


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 * 4096 + 5, 4096 * 4097 + 3])
def test_fsum_is_exact_to_rounding(size: int) -> None:
    """MLX on a CPU sums naively: a plain sum of the largest is off by 1e-2."""
    x = np.abs(normal(size)) + 0.1
    assert abs(float(layers.fsum(mx.array(x))) / x.astype(np.float64).sum() - 1) < 2e-6


def test_fsum_keeps_leading_dims_and_counts_in_float32() -> None:
    x = normal(3, 2, 5000)
    found = np.array(layers.fsum(mx.array(x), batch_dims=2))
    np.testing.assert_allclose(found, x.astype(np.float64).sum(-1), rtol=1e-5, atol=1e-4)
    ones = mx.ones((100, 300), mx.bfloat16)  # bfloat16 would stop counting at 256
    assert float(layers.fsum(ones)) == 30_000


@pytest.mark.parametrize("size", [6, 24, 768, 4096])
def test_rms_norm(size: int) -> None:
    """The mean over the last axis is naive too: 4.2e-6 was measured at 4096."""
    norm = layers.RMSNorm(size, 1e-5)
    weight, x = 1 + 0.3 * normal(size), normal(5, size)
    norm.weight = mx.array(weight)
    expected = model_np.rms_norm(x.astype(np.float64), weight, 1e-5)
    np.testing.assert_allclose(np.array(norm(mx.array(x))), expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    norm = layers.RMSNorm(768, 1e-5)
    weight = 1 + 0.3 * normal(768)
    norm.weight = mx.array(weight)
    x = mx.array(normal(5, 768)).astype(mx.bfloat16)
    wide = np.array(x.astype(mx.float32)).astype(np.float64)
    y = norm(x)
    assert y.dtype == mx.bfloat16
    expected = mx.array(model_np.rms_norm(wide, weight, 1e-5).astype(np.float32))
    assert (y == expected.astype(mx.bfloat16)).mean() > 0.999  # but for ties of the last rounding


def test_rope_is_half_split() -> None:
    x = normal(2, 3, 7, 6)
    cos, sin = map(mx.array, rope_tables(7, 6, 100.0))
    expected = model_np.rope(x.astype(np.float64), 100.0)
    np.testing.assert_allclose(
        np.array(layers.apply_rope(mx.array(x), cos, sin)), expected, atol=1e-6
    )


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_activations(name: str) -> None:
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    function = layers._silu if name == "silu" else layers._gelu
    expected = model_np.activation(name, x.astype(np.float64))
    np.testing.assert_allclose(np.array(function(mx.array(x))), expected, atol=2e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_the_hash_bit_for_bit(compiled: bool) -> None:
    x = normal(3, 7, 10)
    keys, salt = dropout_row_keys(2**31 - 1, 9, 5, 3), dropout_site_salt(3, 1)

    def drop(x: mx.array, keys: mx.array) -> mx.array:
        return layers.dropout(x, keys, salt, 0.3)

    function = mx.compile(drop) if compiled else drop
    found = np.array(function(mx.array(x), mx.array(keys)))
    expected = model_np.dropout(x.astype(np.float64), keys, salt, 0.3)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=2e-7)
    assert 0.2 < (found == 0).mean() < 0.4


def test_dropout_none_changes_nothing() -> None:
    x = mx.array(normal(2, 3, 4))
    assert layers.dropout(x, None, 1, 0.5) is x
    assert layers.dropout(x, mx.array([1, 2], mx.uint32), 1, 0.0) is x


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 64), (4, 33)])
def test_gradient_of_a_lookup_sums_repeated_ids(shape: tuple[int, int]) -> None:
    tokens = RNG.integers(0, 5, shape, dtype=np.int32) * 2
    grads = normal(*shape, 6)
    expected = np.zeros((11, 6))
    np.add.at(expected, tokens, grads.astype(np.float64))
    found = np.array(layers.scatter_rows(mx.array(tokens), mx.array(grads), 11))
    np.testing.assert_allclose(found, expected, atol=2e-6)

    table = layers.Embedding(11, 6)

    def scalar(weight: mx.array) -> mx.array:
        table.weight = weight
        return (table(mx.array(tokens), mx.float32) * mx.array(grads)).sum()

    np.testing.assert_array_equal(np.array(mx.grad(scalar)(mx.zeros((11, 6)))), found)


@pytest.mark.parametrize("vocab_size", [61, 4097, 32_003])
def test_token_nll(vocab_size: int) -> None:
    logits, targets = 3 * normal(2, 3, vocab_size), RNG.integers(0, vocab_size, (2, 3)).astype("i4")
    expected = model_np.token_nll(logits.astype(np.float64), targets)
    found = np.array(losses.token_nll(mx.array(logits), mx.array(targets)))
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_token_nll_does_not_overflow() -> None:
    logits = mx.array([[1e4, -1e4, 0.0]])
    assert float(losses.token_nll(logits, mx.array([1]))[0]) == 2e4


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_loss_of_chunks_and_its_gradients(chunk: int) -> None:
    """Against the analytic gradient, softmax minus one, in float64."""
    n, d, v = 14, 5, 11
    hidden, head, weights = normal(n, d), normal(v, d), RNG.random(n).astype(np.float32)
    targets = RNG.integers(0, v, n).astype(np.int32)

    def loss(hidden: mx.array, head: mx.array) -> mx.array:
        return losses._head_loss(
            hidden, head, mx.array(targets), mx.array(weights), mx.array(0.25), chunk
        )

    found, grads = mx.value_and_grad(loss, argnums=(0, 1))(mx.array(hidden), mx.array(head))
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T
    nll = model_np.token_nll(logits, targets)
    np.testing.assert_allclose(float(found), 0.25 * (weights * nll).sum(), rtol=5e-7)
    slope = 0.25 * weights[:, None] * (model_np.softmax(logits) - np.eye(v)[targets])
    np.testing.assert_allclose(np.array(grads[0]), slope @ head, atol=1e-6)
    np.testing.assert_allclose(np.array(grads[1]), slope.T @ hidden, atol=1e-6)


def test_attention_reads_the_key_head_of_its_group() -> None:
    q, k, v = normal(1, 4, 5, 6), normal(1, 2, 5, 6), normal(1, 2, 5, 6)
    found = np.array(layers.attention(*map(mx.array, (q, k, v)), "causal"))
    visible = np.tril(np.ones((5, 5), bool))
    for h in range(4):
        scores = q[0, h].astype(np.float64) @ k[0, h // 2].T / np.sqrt(6)
        expected = model_np.softmax(np.where(visible, scores, -np.inf)) @ v[0, h // 2]
        np.testing.assert_allclose(found[0, h], expected, atol=1e-6)
