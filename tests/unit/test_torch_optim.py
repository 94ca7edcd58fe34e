"""The torch optimizer against float64 numpy: reductions, Newton-Schulz, updates, loss scaler."""

import numpy as np
import pytest
import torch

from backends.torch_common.layers import fsum
from backends.torch_common.optim import (
    LossScaler,
    Optimizer,
    global_norm,
    newton_schulz,
)
from core.backend import StepHyper
from core.params import Init, ParamSpec
from tests.helpers import tiny_config
from tests.reference import optim_np

# Error of ten float32 updates over their length. Measured: AdamW 3e-7, Muon 1.3e-6 of full rank, and
# 7e-6 where gradients have rank 2, since Newton-Schulz lifts the rounding in the other directions.
ADAMW_TOLERANCE, MUON_TOLERANCE, LOW_RANK_TOLERANCE = 1e-5, 2e-5, 2e-4
SHAPES = {"tall": (15, 6), "wide": (7, 18), "wide2": (7, 18), "square": (9, 9)}


def make_specs():
    init = Init("zeros")
    specs = [ParamSpec(name, shape, "matrix", init) for name, shape in SHAPES.items()]
    specs.append(ParamSpec("embed", (23, 5), "embed", init))
    specs.append(ParamSpec("gain", (5,), "vector", init))
    specs.append(ParamSpec("gain2", (5,), "vector", init))
    return specs


def make_hyper(step, *, momentum=0.9, max_grad_norm=2.0):
    return StepHyper(
        step=step,
        lr={"matrix": 0.05 / step, "embed": 0.03, "vector": 0.02},
        weight_decay={"matrix": 0.1, "embed": 0.2, "vector": 0.0},
        momentum=momentum - 0.01 * step,
        normalizer=1.0,
        max_grad_norm=max_grad_norm,
    )


def apply_step(optimizer, grads, hyper):
    """What the backend does between the gradients and the update, at loss scale 1."""
    stacks = optimizer.gather({n: torch.from_numpy(g.copy()) for n, g in grads.items()})
    numbers = torch.from_numpy(optimizer.numbers(hyper))
    norm = global_norm(stacks)
    factor = (numbers[0, 1] / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step(stacks, numbers, torch.tensor(True), factor)
    return float(norm)


def draw(rng, shape, rank):
    if rank and len(shape) == 2:
        return (
            rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        ) / rank
    return rng.standard_normal(shape)


@pytest.mark.parametrize("shape", [(2, 15, 6), (2, 6, 15), (2, 9, 9)])
def test_updates_are_contiguous(shape):
    assert newton_schulz(torch.randn(shape), 5, torch.float32).is_contiguous()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        {"train__optimizer": "adamw"},
        {"train__optimizer": "muon"},
        {"train__optimizer": "muon", "train__muon_scale": "spectral", "train__ns_steps": 3},
        {"train__optimizer": "adamw", "train__beta1": 0.7, "train__beta2": 0.99},
    ],
)
def test_ten_updates_equal_the_reference(overrides, rank):
    config = tiny_config(**overrides).train
    rng, specs = np.random.default_rng(1), make_specs()
    start = {s.name: rng.standard_normal(s.shape).astype(np.float32) * 0.1 for s in specs}
    params = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in start.items()}
    optimizer = Optimizer(config, params, specs)
    reference = optim_np.Optimizer(start, specs, config)
    for step in range(1, 11):
        grads = {s.name: draw(rng, s.shape, rank).astype(np.float32) for s in specs}
        hyper = make_hyper(step, max_grad_norm=0.0 if step == 5 else 2.0)
        norm = apply_step(optimizer, grads, hyper)
        assert abs(norm - reference.step(grads, hyper)) < 1e-6 * norm
    for s in specs:
        wanted = reference.params[s.name]
        error = np.linalg.norm(params[s.name].detach().numpy() - wanted)
        muon = config.optimizer == "muon" and s.group == "matrix"
        tolerance = (LOW_RANK_TOLERANCE if rank else MUON_TOLERANCE) if muon else ADAMW_TOLERANCE
        assert error < tolerance * np.linalg.norm(wanted - start[s.name]), s.name
    for key, value in optimizer.state():
        wanted = reference.state[key]
        assert np.allclose(value.numpy(), wanted, rtol=1e-5, atol=1e-6 * abs(wanted).max()), key


def test_idle_numbers_change_no_bit():
    specs, rng = make_specs(), np.random.default_rng(0)
    params = {
        s.name: torch.nn.Parameter(torch.from_numpy(rng.standard_normal(s.shape)).float())
        for s in specs
    }
    optimizer = Optimizer(tiny_config().train, params, specs)
    grads = {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in specs}
    apply_step(optimizer, grads, make_hyper(1))
    before = [p.detach().clone() for p in params.values()]
    before += [v.clone() for _, v in optimizer.state()]
    grads["wide"][1, 2], grads["gain"][0] = np.nan, np.inf
    stacks = optimizer.gather({n: torch.from_numpy(g) for n, g in grads.items()})
    numbers = torch.from_numpy(optimizer.numbers(make_hyper(2)))
    nothing = torch.tensor(float("nan"))
    optimizer.step(stacks, numbers, torch.tensor(False), nothing)
    after = [*params.values(), *(v for _, v in optimizer.state())]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_newton_schulz_works_on_each_matrix_of_a_stack():
    rng = np.random.default_rng(3)
    for shape in ((5, 11), (11, 5), (8, 8)):
        stack = rng.standard_normal((3, *shape)) * np.array([1e-6, 1.0, 1e6])[:, None, None]
        found = newton_schulz(torch.from_numpy(stack).float(), 5, torch.float32)
        for x, y in zip(stack, found.numpy()):
            wanted = optim_np.newton_schulz(x, 5)
            assert np.linalg.norm(y - wanted) < 2e-5 * np.linalg.norm(wanted)
        rough = newton_schulz(torch.from_numpy(stack[1:2]).float(), 5, torch.bfloat16).float()
        error = np.linalg.norm(rough[0].numpy() - optim_np.newton_schulz(stack[1], 5))
        assert 0 < error < 0.1 * np.linalg.norm(rough[0].numpy())


def test_newton_schulz_of_zeros_is_zeros():
    assert not newton_schulz(torch.zeros(2, 4, 6), 5, torch.float32).any()


@pytest.mark.parametrize("shape", [(), (1,), (4096,), (4097,), (3, 4096), (700, 768), (5000, 4100)])
def test_fsum_is_exact_to_rounding(shape):
    x = (np.random.default_rng(0).random(shape) + 0.5).astype(np.float32)
    wanted = float(x.astype(np.float64).sum())
    assert abs(float(fsum(torch.from_numpy(np.asarray(x)))) - wanted) < 3e-7 * wanted
    assert fsum(torch.from_numpy(np.asarray(x)).half()).dtype == torch.float32


def test_fsum_keeps_leading_dimensions():
    x = np.random.default_rng(0).random((3, 70, 80)).astype(np.float32)
    found = fsum(torch.from_numpy(x), batch_dims=1).numpy()
    assert np.allclose(found, x.astype(np.float64).sum((1, 2)), rtol=3e-7)


def test_global_norm_of_a_large_gradient():
    """A naive float32 sum over 32000 x 768 is off by 6%."""
    x = np.random.default_rng(0).standard_normal((1, 32000, 768), dtype=np.float32)
    wanted = np.sqrt((x.astype(np.float64) ** 2).sum() + 7.0)
    found = float(global_norm([torch.from_numpy(x), torch.ones(7, 1)]))
    assert abs(found - wanted) < 3e-7 * wanted


def update(scaler, loss, norm, normalizer=1.0):
    return bool(scaler.update(*(torch.tensor(x) for x in (loss, norm, normalizer))))


def test_scaler_off_counts_skips_alone():
    scaler = LossScaler("bfloat16", torch.device("cpu"))
    inf = float("inf")
    assert update(scaler, 1.0, 1.0)
    assert not update(scaler, 1.0, inf)
    assert not update(scaler, inf, 1.0)
    assert not update(scaler, 0.0, 0.0, normalizer=0.0)  # Nothing to skip.
    assert scaler.values() == {
        "loss_scale": 1.0,
        "good_steps": 0.0,
        "overflows_total": 0.0,
        "skipped_total": 2.0,
        "skipped_in_a_row": 2.0,
    }
    assert update(scaler, 1.0, 1.0)
    assert scaler.values()["skipped_in_a_row"] == 0


def test_a_step_without_any_weight_is_neither_taken_nor_skipped():
    scaler = LossScaler("float16", torch.device("cpu"))
    scaler.load({"good_steps": 7.0, "skipped_total": 3.0, "skipped_in_a_row": 2.0})
    before = scaler.values()
    assert not update(scaler, 0.0, 0.0, normalizer=0.0)
    assert scaler.values() == before


def test_scaler_on_keeps_its_limits():
    scaler = LossScaler("float16", torch.device("cpu"))
    assert scaler.values()["loss_scale"] == 65_536
    scaler.load({"loss_scale": 2.0**24, "good_steps": 1999.0})
    assert update(scaler, 1.0, 1.0)
    assert scaler.values()["loss_scale"] == 2.0**24 and scaler.values()["good_steps"] == 0
    scaler.load({"loss_scale": 2.0, "skipped_in_a_row": 2.0})
    inf = float("inf")
    assert not update(scaler, 1.0, inf) and not update(scaler, 1.0, inf)
    values = scaler.values()
    assert values["loss_scale"] == 1 and values["overflows_total"] == 1
    # The first was an overflow, which neither counts as a skip nor ends a row of skips.
    assert values["skipped_total"] == 1 and values["skipped_in_a_row"] == 3
