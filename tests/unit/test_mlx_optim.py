"""The MLX loss scaler, clip and Newton-Schulz; updates are compared in tests/parity.

Run: pytest tests/unit/test_mlx_optim.py
"""

import mlx.core as mx
import numpy as np
import pytest

from backends.mlx import optim
from tests.reference import optim_np

NAN, INF = float("nan"), float("inf")


def advance(scaler: optim.LossScaler, state: dict, loss: float, norm: float, normalizer: float = 1):
    ok, state = scaler.update(state, *(mx.array(float(x)) for x in (loss, norm, normalizer)))
    return bool(ok), state


def values(state: dict) -> dict[str, float]:
    return {name: float(value) for name, value in state.items()}


def test_an_overflow_halves_the_scale_and_is_no_skip() -> None:
    scaler = optim.LossScaler("float16")
    state = scaler.load({"good_steps": 7, "skipped_in_a_row": 2})
    ok, state = advance(scaler, state, 3.0, INF)
    assert not ok
    assert values(state) == {
        "loss_scale": 32_768,
        "good_steps": 0,
        "overflows_total": 1,
        "skipped_total": 0,
        "skipped_in_a_row": 2,
    }


def test_an_overflow_at_scale_1_is_a_skip() -> None:
    scaler = optim.LossScaler("float16")
    _, state = advance(scaler, scaler.load({"loss_scale": 1.5}), 3.0, NAN)
    assert values(state)["loss_scale"] == 1
    _, state = advance(scaler, state, 3.0, NAN)
    assert values(state)["loss_scale"] == 1
    assert values(state)["overflows_total"] == 1
    assert values(state)["skipped_total"] == values(state)["skipped_in_a_row"] == 1


def test_the_scale_doubles_after_2000_good_steps_up_to_its_limit() -> None:
    scaler = optim.LossScaler("float16")
    state = scaler.load({"good_steps": 1_998})
    _, state = advance(scaler, state, 3.0, 1.0)
    assert values(state)["loss_scale"] == 65_536
    _, state = advance(scaler, state, 3.0, 1.0)
    assert (values(state)["loss_scale"], values(state)["good_steps"]) == (131_072, 0)
    state = scaler.load({"good_steps": 1_999, "loss_scale": 2.0**24})
    _, state = advance(scaler, state, 3.0, 1.0)
    assert values(state)["loss_scale"] == 2.0**24


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("loss", "norm", "normalizer"), [(NAN, 1, 1), (INF, INF, 1)])
def test_steps_that_do_not_count(
    precision: str, loss: float, norm: float, normalizer: float
) -> None:
    scaler = optim.LossScaler(precision)
    state = scaler.load({})
    for expected in (1, 2):
        ok, state = advance(scaler, state, loss, norm, normalizer)
        assert not ok
        assert values(state)["skipped_in_a_row"] == expected
    ok, state = advance(scaler, state, 1.0, 1.0)
    assert ok
    assert (values(state)["skipped_total"], values(state)["skipped_in_a_row"]) == (2, 0)
    assert values(state)["overflows_total"] == 0


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_without_any_weight_is_neither_taken_nor_skipped(precision: str) -> None:
    scaler = optim.LossScaler(precision)
    before = scaler.load({"good_steps": 7, "skipped_total": 3, "skipped_in_a_row": 2})
    ok, state = advance(scaler, before, 0.0, 0.0, normalizer=0)
    assert not ok and values(state) == values(before)


def test_without_float16_there_is_no_scale() -> None:
    scaler = optim.LossScaler("bfloat16")
    state = scaler.load({"loss_scale": 512.0, "skipped_total": 3})
    _, state = advance(scaler, state, 3.0, INF)
    assert values(state)["loss_scale"] == 1
    assert values(state)["skipped_total"] == 4


def test_clip_scale() -> None:
    def clip(norm: float, limit: float) -> float:
        return float(optim.clip_scale(mx.array(norm), mx.array(limit)))

    assert clip(4.0, 0.0) == 1
    assert clip(0.5, 1.0) == 1
    assert abs(clip(4.0, 1.0) - 0.25) < 1e-6
    assert clip(0.0, 1.0) == 1


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 9, 4), (1, 5, 5)])
def test_newton_schulz_of_a_stack(shape: tuple[int, ...]) -> None:
    """Each matrix has a normaliser of its own."""
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    x *= (10.0 ** -np.arange(shape[0]))[:, None, None].astype(np.float32)
    found = np.array(optim.newton_schulz(mx.array(x), 5, mx.float32))
    for i in range(shape[0]):
        expected = optim_np.newton_schulz(x[i].astype(np.float64), 5)
        np.testing.assert_allclose(found[i], expected, atol=2e-5)
    rough = optim.newton_schulz(mx.array(x), 5, mx.bfloat16)
    assert rough.dtype == mx.float32
    assert 1e-4 < np.abs(np.array(rough) - found).max() < 0.2
    assert (np.array(optim.newton_schulz(mx.zeros(shape), 5, mx.float32)) == 0).all()


def test_stacks_that_are_too_large_are_cut() -> None:
    rng = np.random.default_rng(4)
    ws, gs, bufs = (
        [mx.array(rng.standard_normal((4, 6)).astype(np.float32)) for _ in range(5)]
        for _ in range(3)
    )
    numbers = [mx.array(x) for x in (0.99, 0.9, 0.1, 0.02)]

    def update(many: int) -> list[np.ndarray]:
        new, held = optim.muon_update(
            ws, gs, bufs, numbers=numbers, steps=5, dtype=mx.float32, ns_elements=many
        )
        return [np.array(x) for x in (*new, *held)]

    for a, b in zip(update(2 * 24), update(1 << 20), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
