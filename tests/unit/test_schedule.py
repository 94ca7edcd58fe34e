"""Schedules against numbers worked out by hand.

Run: python -m pytest tests/unit/test_schedule.py
"""

import math

import pytest

from core.training.schedule import lr_scale, momentum, step_hyper
from tests.helpers import tiny_config


def scale(step, schedule, *, total=100, warmup=10, final=0.1, decay=0.5):
    return lr_scale(
        step,
        total_steps=total,
        warmup_steps=warmup,
        schedule=schedule,
        decay_fraction=decay,
        final_scale=final,
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_from_the_first_step(schedule):
    assert [scale(s, schedule) for s in (1, 5, 9, 10)] == pytest.approx([0.1, 0.5, 0.9, 1.0])


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("constant", {50: 1.0, 100: 1.0, 200: 1.0}),
        ("linear", {55: 0.55, 100: 0.1, 200: 0.1}),
        ("cosine", {55: 0.55, 100: 0.1, 32: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 90))}),
        ("wsd", {49: 1.0, 50: 1.0, 75: 0.55, 100: 0.1, 101: 0.1}),
    ],
)
def test_shape_after_warm_up(schedule, points):
    for step, value in points.items():
        assert scale(step, schedule) == pytest.approx(value), step


def test_no_warm_up_starts_at_the_peak():
    assert scale(1, "linear", warmup=0, total=1) == pytest.approx(0.1)
    assert scale(1, "wsd", warmup=0) == 1.0


def test_wsd_does_not_begin_to_decay_before_it_is_warm():
    assert scale(60, "wsd", warmup=60, decay=1.0) == 1.0
    assert scale(100, "wsd", warmup=60, decay=1.0) == pytest.approx(0.1)


def test_momentum_warms_up_linearly():
    at = [momentum(s, start=0.85, end=0.95, warmup_steps=300) for s in (1, 151, 301, 999)]
    assert at == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momentum(1, start=0.85, end=0.95, warmup_steps=0) == 0.95


def test_each_group_has_its_rate_and_shrinks_as_much_as_the_others():
    train = tiny_config(
        train__lr=0.01,
        train__min_lr=0.0,
        train__lr_matrix=0.02,
        train__lr_embed=0.5,
        train__lr_head=0.0,
        train__lr_vector=0.03,
        train__lr_router=0.04,
        train__weight_decay=0.1,
        train__warmup_steps=4,
        train__total_steps=20,
    ).train
    hyper = step_hyper(2, train, 7.0)
    rates = {"matrix": 0.01, "embed": 0.25, "head": 0.0, "vector": 0.015, "router": 0.02}
    assert hyper.lr == pytest.approx(rates)
    assert hyper.weight_decay["vector"] == 0.0 and hyper.weight_decay["head"] == 0.0
    for group in ("matrix", "embed", "router"):
        assert hyper.lr[group] * hyper.weight_decay[group] == pytest.approx(0.5 * 0.01 * 0.1)
    assert hyper.normalizer == 7.0 and hyper.step == 2
