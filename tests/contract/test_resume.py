"""Saving and loading on every backend: bits, counters, and an uninterrupted run."""

import numpy as np
import pytest

import backends
from core.checkpoint import initial_checkpoint, verify
from core.errors import PippinError
from core.params import param_specs, slot_specs
from tests.contract.test_training import run
from tests.helpers import ArrayCheckpoint, assert_same_bits, snapshot


def save(backend, folder, step, *, optimizer=True):
    specs = param_specs(backend.config.model)
    meta = ArrayCheckpoint(
        backend.config, {s.name: np.zeros(s.shape) for s in specs}, step=step
    ).meta
    path = folder / f"step_{step}{backend.suffix}"
    assert backend.save(path, meta, optimizer=optimizer).result() == path
    return path


def reopen(path):
    return backends.checkpoint_format(path.suffix).open(path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_saved_bits_come_back(make, tmp_path, precision):
    backend = make(train__precision=precision)
    run(backend, 3)
    ckpt = reopen(save(backend, tmp_path, 3))
    verify(ckpt)
    wanted = snapshot(backend)
    assert_same_bits(wanted, {name: ckpt.read(name) for name in ckpt.names})
    assert ckpt.meta.step == 3
    assert ckpt.meta.backend["name"] == backend.name
    assert ckpt.meta.backend_state == backend.backend_state()
    other = make(train__precision=precision)
    other.load(ckpt)
    assert_same_bits(wanted, snapshot(other))
    assert other.backend_state() == backend.backend_state()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_resumed_run_equals_an_uninterrupted_one(make, tmp_path, optimizer, precision):
    overrides = {
        "train__optimizer": optimizer,
        "train__precision": precision,
        "model__dropout": 0.2,
        "train__gradient_checkpointing": True,
    }
    whole, first = make(**overrides), make(**overrides)
    a = run(whole, 5)
    run(first, 3)
    ckpt = reopen(save(first, tmp_path, 3))
    second = make(**overrides)
    second.load(ckpt)
    b = run(second, 2, first=4)
    assert a == b
    assert_same_bits(snapshot(whole), snapshot(second))


def test_fresh_start_has_empty_state(make):
    """Loading step 0 forgets what the optimizer held."""
    used, fresh = make(), make()
    run(used, 2)
    for backend in (used, fresh):
        backend.load(initial_checkpoint(backend.config, param_specs(backend.config.model)))
    assert_same_bits(snapshot(fresh), snapshot(used))
    assert not any(v.any() for n, v in snapshot(used).items() if n.startswith("optim/"))
    assert run(used, 2) == run(fresh, 2)


def test_weights_alone_can_be_saved_and_not_resumed(make, tmp_path):
    backend = make()
    run(backend, 2)
    ckpt = reopen(save(backend, tmp_path, 2, optimizer=False))
    specs = param_specs(backend.config.model)
    assert set(ckpt.names) == {s.name for s in specs}
    with pytest.raises(PippinError) as caught:
        make().load(ckpt)
    assert caught.value.code == "P302"
    other = make(mode="infer")
    other.load(ckpt, optimizer=False)
    assert_same_bits({n: ckpt.read(n) for n in ckpt.names}, snapshot(other))


def test_state_of_another_optimizer_is_refused(make, tmp_path):
    backend = make(train__optimizer="adamw")
    run(backend, 1)
    ckpt = reopen(save(backend, tmp_path, 1))
    with pytest.raises(PippinError) as caught:
        make(train__optimizer="muon").load(ckpt)
    assert caught.value.code == "P304"
    make(train__optimizer="muon").load(ckpt, optimizer=False)


def test_slots_are_those_of_the_table(make):
    for optimizer in ("muon", "adamw"):
        backend = make(train__optimizer=optimizer)
        keys = {s.key for s in slot_specs(optimizer, param_specs(backend.config.model))}
        assert {n for n in snapshot(backend) if n.startswith("optim/")} == keys
