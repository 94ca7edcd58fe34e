"""Both frameworks compute the same mixture of experts, and train it alike.

A choice between two experts of nearly the same probability could fall otherwise on each; the smallest
gap of the tokens here is far above the rounding of a probability.

Run: pytest tests/parity/test_experts.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import backends
from core.chunks import NS_ELEMENTS
from tests.parity import tolerances
from tests.parity.compare import (
    STEPS,
    Gained,
    Scaled,
    curve,
    curve_difference,
    decode_difference,
    gradients_difference,
    greedy,
    logits_difference,
    make,
    setting,
    update_difference,
)
from tests.parity.faults import FACTOR, Fault, faulty

# The coefficient is large, so that an error of the load-balancing loss is seen.
EXPERTS: dict[str, Any] = {
    "model__n_experts": 5,
    "model__top_k": 2,
    "train__router_aux_loss_coef": 1.0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "top-2": {},
    "top-1-untied": {"model__top_k": 1, "model__tie_embeddings": False},
    "all-gelu-plain": {
        "model__top_k": 5,
        "model__ffn_activation": "gelu",
        "model__qk_norm": False,
    },
}


def mixed(backend: str, **overrides: Any) -> Any:
    return setting(backend, **(EXPERTS | overrides))


def _shares() -> Any:
    """Shares of the chosen experts that do not add up to 1."""
    from backends.mlx import experts

    healthy = experts.collect
    return mock.patch.object(experts, "collect", lambda rows, plan: healthy(rows, plan) * FACTOR)


def _balance() -> Any:
    from backends.mlx import experts

    healthy = experts.balance_sum
    return mock.patch.object(experts, "balance_sum", lambda *args: healthy(*args) * FACTOR)


FORWARD = {
    "router": Fault(tensor="layers.1.mlp.gate.weight"),
    "experts": Fault(tensor="layers.1.mlp.experts.down_proj.weight"),
    "shares": Fault(patch=_shares),
}
BALANCE = Fault(patch=_balance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_decoding_agree(name: str) -> None:
    mlx, torch = (mixed(b, **ARCHITECTURES[name]) for b in ("mlx", "cpu"))
    a, b = make(mlx, mode="infer"), make(torch, mode="infer")
    assert logits_difference(a, b, torch) <= tolerances.LOGITS
    assert decode_difference(a, b, torch) <= tolerances.LOGITS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_agree(name: str, checkpointing: bool) -> None:
    """With dropout; recomputing blocks on one side alone."""
    torch = mixed("cpu", **ARCHITECTURES[name])
    mlx = mixed("mlx", train__gradient_checkpointing=checkpointing, **ARCHITECTURES[name])
    assert gradients_difference(make(mlx), make(torch), torch) <= tolerances.GRADIENTS


def test_greedy_tokens_are_equal() -> None:
    untied = {"model__tie_embeddings": False}
    mlx, torch = (mixed(b, **untied) for b in ("mlx", "cpu"))
    tokens = greedy(make(torch, mode="infer"), torch, rows=64)
    assert len(np.unique(tokens)) > 20  # no constant text
    np.testing.assert_array_equal(greedy(make(mlx, mode="infer"), mlx, rows=64), tokens)


@pytest.mark.parametrize("name", FORWARD)
def test_faults_in_the_forward_pass_are_seen(name: str) -> None:
    torch = mixed("cpu")
    with faulty(FORWARD[name], **EXPERTS) as mlx:
        healthy = make(torch)
        assert logits_difference(mlx, healthy, torch) > tolerances.LOGITS
        assert gradients_difference(mlx, healthy, torch) > tolerances.GRADIENTS


def test_a_fault_of_the_balance_is_seen() -> None:
    torch = mixed("cpu")
    with faulty(BALANCE, **EXPERTS) as mlx:
        assert gradients_difference(mlx, make(torch), torch) > tolerances.GRADIENTS


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    config = mixed("cpu")
    return curve(make(config), config)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_losses_of_20_steps_agree(parts: int, reference: np.ndarray) -> None:
    config = mixed("mlx")
    assert reference[-1, 0] < 0.8 * reference[0, 0]  # it learned
    loss, norm = curve_difference(curve(make(config), config, parts=parts), reference)
    assert loss <= tolerances.EXPERTS_LOSS_CURVE
    assert norm <= tolerances.EXPERTS_NORM_CURVE


@pytest.mark.parametrize("name", [*FORWARD, "balance"])
def test_faults_change_the_curve(name: str, reference: np.ndarray) -> None:
    fault = {**FORWARD, "balance": BALANCE}[name]
    with faulty(fault, **EXPERTS) as backend:
        loss, norm = curve_difference(curve(backend, mixed("mlx")), reference)
    assert loss > tolerances.EXPERTS_LOSS_CURVE or norm > tolerances.EXPERTS_NORM_CURVE


@pytest.mark.parametrize(
    ("first", "second", "suffix"), [("cpu", "mlx", ".npz"), ("mlx", "cpu", ".pt")]
)
def test_a_run_goes_on_on_the_other_backend(
    first: str, second: str, suffix: str, tmp_path: Path, reference: np.ndarray
) -> None:
    half = STEPS // 2
    configs = {name: mixed(name) for name in (first, second)}
    backend = make(configs[first])
    begun = curve(backend, configs[first], end=half)
    meta = replace(Gained(configs[first]).meta, step=half)
    path = backend.save(tmp_path / f"step{suffix}", meta).result()
    ckpt = backends.open_checkpoint(path)
    rest = curve(make(configs[second], ckpt), configs[second], start=half + 1)
    loss, norm = curve_difference(np.concatenate([begun, rest]), reference)
    assert loss <= tolerances.EXPERTS_LOSS_CURVE and norm <= tolerances.EXPERTS_NORM_CURVE
    wrong = Scaled(ckpt, "optim/momentum/layers.0.mlp.experts.", FACTOR)
    rest = curve(make(configs[second], wrong), configs[second], start=half + 1)
    loss, norm = curve_difference(np.concatenate([begun, rest]), reference)
    assert loss > tolerances.EXPERTS_LOSS_CURVE or norm > tolerances.EXPERTS_NORM_CURVE
    ckpt.close()


# As in test_optimizer.py.
RATES = {"train__lr_vector": 0.1, "train__adam_eps": 1e-3}


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
@pytest.mark.parametrize("variant", [{}, {"train__muon_scale": "spectral"}])
def test_the_update_is_that_of_float64(backend: str, variant: dict[str, Any]) -> None:
    """Each expert is made orthogonal by itself."""
    config = mixed(backend, **(RATES | variant))
    found = update_difference(make(config, Gained(config, scale=1.0)), config)
    assert found.adamw <= tolerances.ADAMW_UPDATE
    assert found.muon <= tolerances.MUON_UPDATE
    assert found.state <= tolerances.STATE


def test_newton_schulz_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer elements at a time than one layer's experts have."""
    for device in NS_ELEMENTS:
        monkeypatch.setitem(NS_ELEMENTS, device, 2000)
    for name in ("cpu", "mlx"):
        config = mixed(name, **RATES)
        found = update_difference(make(config, Gained(config, scale=1.0)), config, steps=3)
        assert found.muon <= tolerances.MUON_UPDATE


def test_experts_that_are_flattened_into_one_matrix_are_seen() -> None:
    """What mlx.optimizers.Muon does to a stack."""
    import mlx.core as mx

    from backends.mlx import optim

    def flattened(x: mx.array, steps: int, dtype: mx.Dtype, _: int) -> mx.array:
        if x.ndim == 3:
            return optim.newton_schulz(x, steps, dtype)
        rows = x.reshape(*x.shape[:2], -1)
        return optim.newton_schulz(rows, steps, dtype).reshape(x.shape)

    config = mixed("mlx", **RATES)
    with mock.patch.object(optim, "_orthogonal", flattened):
        found = update_difference(make(config, Gained(config, scale=1.0)), config, steps=3)
    assert found.muon > tolerances.MUON_UPDATE
