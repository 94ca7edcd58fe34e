"""Both frameworks train alike: 20 steps, split or not, and a run that goes on on the other one.

Run: pytest tests/parity/test_training.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from tests.parity import tolerances
from tests.parity.compare import STEPS, Gained, Scaled, curve, curve_difference, make, setting
from tests.parity.faults import DROPOUT, FACTOR, FORWARD, OPTIMIZER, faulty

ARCHITECTURES: dict[tuple[bool, bool], dict[str, Any]] = {
    (tied, qk_norm): {"model__tie_embeddings": tied, "model__qk_norm": qk_norm}
    for tied in (True, False)
    for qk_norm in (True, False)
}
_REFERENCE: dict[tuple[bool, bool], np.ndarray] = {}


def reference(key: tuple[bool, bool]) -> np.ndarray:
    """The curve of torch on undivided steps."""
    if key not in _REFERENCE:
        config = setting("cpu", **ARCHITECTURES[key])
        _REFERENCE[key] = curve(make(config), config)
    return _REFERENCE[key]


def agrees(found: np.ndarray, expected: np.ndarray) -> bool:
    loss, norm = curve_difference(found, expected)
    return loss <= tolerances.LOSS_CURVE and norm <= tolerances.NORM_CURVE


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("key", ARCHITECTURES, ids=lambda k: f"tied{k[0]:d}-qknorm{k[1]:d}")
def test_losses_of_20_steps_agree(key: tuple[bool, bool], parts: int) -> None:
    """1 x 4, 2 x 2 and 4 x 1 on MLX against 1 x 4 on torch."""
    config = setting("mlx", **ARCHITECTURES[key])
    expected = reference(key)
    assert expected[-1, 0] < 0.8 * expected[0, 0]  # it learned
    loss, norm = curve_difference(curve(make(config), config, parts=parts), expected)
    assert loss <= tolerances.LOSS_CURVE
    assert norm <= tolerances.NORM_CURVE


@pytest.mark.parametrize("name", {**FORWARD, **DROPOUT, **OPTIMIZER})
def test_faults_change_the_curve(name: str) -> None:
    fault = {**FORWARD, **DROPOUT, **OPTIMIZER}[name]
    with faulty(fault) as backend:
        found = curve(backend, setting("mlx", **fault.overrides))
    assert not agrees(found, reference((True, True)))


def test_a_compiled_step_is_the_same_step() -> None:
    """Rates and momentum change from step to step. Split steps: tests/unit/test_mlx_backend.py."""
    small = {"model__n_layers": 1, "model__qk_norm": False, "model__dropout": 0.0}
    torch, mlx = setting("cpu", **small), setting("mlx", train__compile=True, **small)
    found = curve(make(mlx), mlx)
    assert curve_difference(found, curve(make(torch), torch))[0] <= tolerances.COMPILED_CURVE


@pytest.mark.parametrize(("first", "second"), [("cpu", "mlx"), ("mlx", "cpu")])
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_a_run_goes_on_on_the_other_backend(
    first: str, second: str, suffix: str, tmp_path: Path
) -> None:
    half = STEPS // 2
    configs = {name: setting(name) for name in (first, second)}
    backend = make(configs[first])
    begun = curve(backend, configs[first], end=half)
    meta = replace(Gained(configs[first]).meta, step=half)
    path = backend.save(tmp_path / f"step{suffix}", meta).result()
    ckpt = backends.open_checkpoint(path)
    resumed = make(configs[second], ckpt)
    rest = curve(resumed, configs[second], start=half + 1)
    assert agrees(np.concatenate([begun, rest]), reference((True, True)))
    for slot in ("optim/exp_avg_sq/", "optim/momentum/"):
        wrong = make(configs[second], Scaled(ckpt, slot, 1.01 if "sq" in slot else FACTOR))
        rest = curve(wrong, configs[second], start=half + 1)
        assert not agrees(np.concatenate([begun, rest]), reference((True, True)))
    ckpt.close()
