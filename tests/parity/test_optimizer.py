"""Both optimizers make the same of the same gradients: what float64 makes of them.

Matrices are tall (gate_proj), wide (down_proj) and square (q_proj). The gradients are given, so that
nothing but the optimizer is compared; clip and decay are active.

Run: pytest tests/parity/test_optimizer.py
"""

from typing import Any

import numpy as np
import pytest

from tests.parity import tolerances
from tests.parity.compare import Gained, difference, make, setting, update_difference
from tests.parity.faults import CLIPPING, FACTOR, NAIVE_SUM, OPTIMIZER, Fault, faulty

# A gain is about 1, so its rounding is not small beside a small change. With the default epsilon an
# error of 1e-3 in it could not be seen.
RATES = {"train__lr_vector": 0.1, "train__adam_eps": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "muon": {},
    "spectral": {"train__muon_scale": "spectral", "model__tie_embeddings": False},
    "adamw": {"train__optimizer": "adamw"},
}


def small(config: Any) -> Gained:
    """Matrices of the size that they start with."""
    return Gained(config, scale=1.0)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_update_is_that_of_float64(variant: str, rank: int | None, backend: str) -> None:
    config = setting(backend, **(RATES | VARIANTS[variant]))
    found = update_difference(make(config, small(config)), config, rank=rank)
    muon = tolerances.MUON_UPDATE if rank is None else tolerances.MUON_UPDATE_LOW_RANK
    assert found.adamw <= tolerances.ADAMW_UPDATE
    assert found.muon <= muon
    assert found.state <= tolerances.STATE


@pytest.mark.parametrize("name", OPTIMIZER)
def test_faults_of_the_optimizer_are_seen(name: str) -> None:
    fault = OPTIMIZER[name]
    wrong = setting("mlx", **(RATES | fault.overrides))
    with faulty(fault, scale=1.0, **RATES) as backend:
        found = update_difference(backend, setting("cpu", **RATES), given=wrong)
    assert found.muon > tolerances.MUON_UPDATE or found.adamw > tolerances.ADAMW_UPDATE


def test_a_fault_of_epsilon_is_seen() -> None:
    with faulty(Fault({"train__adam_eps": 1e-3 * FACTOR}), scale=1.0, **RATES) as backend:
        found = update_difference(backend, setting("cpu", **RATES))
    assert found.adamw > tolerances.ADAMW_UPDATE


def test_a_fault_of_the_clip_is_seen_in_the_state() -> None:
    config = setting("mlx", **RATES)
    wrong = setting("mlx", **(RATES | CLIPPING.overrides))
    found = update_difference(make(config, small(config)), config, given=wrong)
    assert found.state > tolerances.STATE


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((32_000, 768), np.float32)


def mlx_norm(x: np.ndarray) -> float:
    import mlx.core as mx

    from backends.mlx.optim import global_norm

    return float(global_norm({"x": mx.array(x), "y": mx.ones((3,))}))


def test_the_norm_of_a_large_gradient(large: np.ndarray) -> None:
    import torch

    from backends.torch_common.optim import global_norm

    exact = np.sqrt((large.astype(np.float64) ** 2).sum() + 3)
    found = float(global_norm([torch.from_numpy(large)[None], torch.ones(1, 3)]))
    assert difference(np.array(found), exact) <= tolerances.NORM
    assert difference(np.array(mlx_norm(large)), exact) <= tolerances.NORM
    assert difference(np.array(mlx_norm(large * np.float32(FACTOR))), exact) > tolerances.NORM


def test_a_naive_sum_is_seen(large: np.ndarray) -> None:
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("a GPU sums in parallel: a naive sum is not this wrong there")
    exact = np.sqrt((large.astype(np.float64) ** 2).sum() + 3)
    with NAIVE_SUM.patch():
        assert difference(np.array(mlx_norm(large)), exact) > tolerances.NORM
