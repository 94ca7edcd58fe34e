"""`profile_step`: a real step in parts, on every backend.

Run: python -m pytest tests/contract/test_profile.py
"""

import time

import numpy as np
import pytest

from tests.helpers import random_batch, split_batch, step_hyper

PARTS = {"transfer", "forward", "backward", "optimizer"}


def weights(backend):
    return {name: np.array(value) for name, value in backend.tensors()}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_profiled_step_is_the_same_step(make, parts):
    plain, profiled = make(), make()
    config = plain.config
    batches = split_batch(random_batch(config, rows=4), parts)
    for step in (1, 2):
        hyper = step_hyper(config, step, batches)
        plain.train_step(batches, hyper)
        seconds = profiled.profile_step(batches, hyper)
        assert set(seconds) == PARTS and all(s > 0 for s in seconds.values())
    expected, found = weights(plain), weights(profiled)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_parts_are_the_whole_and_nothing_is_timed_afterwards(make):
    backend = make(model__d_model=96, model__head_dim=24, model__d_ff=192)
    config = backend.config
    batch = [random_batch(config, rows=16)]
    hyper = step_hyper(config, 1, batch)
    backend.profile_step(batch, hyper)
    begin = time.perf_counter()
    seconds = backend.profile_step(batch, hyper)
    spent = time.perf_counter() - begin
    assert 0.5 * spent <= sum(seconds.values()) <= spent
    before = dict(seconds)
    backend.train_step(batch, hyper)
    assert seconds == before


def test_more_rows_lengthen_forward_and_backward_and_not_the_optimizer(make):
    """What would show parts that are timed without waiting: work that moves into the next part."""
    backend = make(model__d_model=64, model__head_dim=16, model__d_ff=128)
    config = backend.config

    def best(rows):
        batch = [random_batch(config, rows=rows)]
        hyper = step_hyper(config, 1, batch)
        backend.profile_step(batch, hyper)
        runs = [backend.profile_step(batch, hyper) for _ in range(4)]
        return {part: min(r[part] for r in runs) for part in PARTS}

    few, many = best(2), best(384)
    growth = {part: many[part] / few[part] for part in PARTS}
    assert growth["forward"] > 2 and growth["backward"] > 2
    assert growth["optimizer"] < min(growth["forward"], growth["backward"])


def test_a_failed_step_leaves_no_clock_behind(make):
    backend = make()
    config = backend.config
    bad = random_batch(config, rows=2)
    bad.tokens[0, 0] = 10_000
    with pytest.raises(Exception, match="vocabulary"):
        backend.profile_step([bad], step_hyper(config, 1, [bad]))
    good = [random_batch(config, rows=2)]
    assert float(backend.train_step(good, step_hyper(config, 1, good))["loss"]) > 0
