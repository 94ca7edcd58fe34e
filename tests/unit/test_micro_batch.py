"""`train.micro_batch_size: auto`: the rule, the probe, and what is never changed.

Run: python -m pytest tests/unit/test_micro_batch.py
"""

import sys
from types import SimpleNamespace

import pytest

from backends.probe import probe_step
from core.config.load import build, load
from core.machine import micro_batch
from core.machine.micro_batch import Probed, divisors, fit_micro_batch, settle_micro_batch, split
from core.params import param_specs
from tests.helpers import tiny_config

GB = 10**9


@pytest.fixture
def linear(monkeypatch):
    """A forecast of 1 GB and half a GB a row."""

    def predict(config, specs):
        return SimpleNamespace(total=GB + config.train.micro_batch_size * GB // 2)

    monkeypatch.setattr(micro_batch, "predict_training_memory", predict)


class Probe:
    """Answers in turn; remembers the rows it was asked for."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, config, limit_bytes):
        t = config.train
        self.asked.append((t.micro_batch_size, t.grad_accum_steps, limit_bytes))
        return self.answers.pop(0)


def fit(rows, budget_gb, *, probe=None, parts=1, most=None):
    config = tiny_config(train__micro_batch_size=rows, train__grad_accum_steps=parts)
    found = fit_micro_batch(
        config,
        param_specs(config.model),
        budget_bytes=int(budget_gb * GB),
        most_rows=most,
        probe=probe,
    )
    return (found.micro_batch_size, found.grad_accum_steps), found


def test_divisors_by_trial():
    assert divisors(24, 24) == [24, 12, 8, 6, 4, 3, 2, 1]
    assert divisors(24, 7) == [6, 4, 3, 2, 1]
    assert divisors(13, 12) == [1]


@pytest.mark.parametrize(
    ("rows", "parts", "budget_gb", "wanted"),
    [
        (16, 1, 100, (16, 1)),
        (16, 1, 9.0, (16, 1)),  # exactly
        (16, 1, 8.9, (8, 2)),
        (24, 1, 8.0, (12, 2)),  # of 14 that would fit, the largest divisor
        (6, 4, 5.2, (8, 3)),  # all 24 rows of the step are shared out anew
        (16, 1, 1.5, (1, 16)),
        (16, 1, 1.4, (1, 16)),  # nothing fits: the least, for the forecast to refuse
    ],
)
def test_the_largest_that_fits_and_the_rows_of_a_step_stay(linear, rows, parts, budget_gb, wanted):
    found, _ = fit(rows, budget_gb, parts=parts)
    assert found == wanted and found[0] * found[1] == rows * parts


def test_far_below_the_budget_nothing_is_tried(linear):
    found, why = fit(16, 18.1, probe=Probe())  # 9 of 18.1 GB: an answer would be missing
    assert found == (16, 1) and why.reason == "fits: forecast 9.0 of 18.1 GB"


def test_near_the_budget_a_real_step_confirms_it(linear):
    probe = Probe(Probed("fits", 8_100_000_000))
    found, why = fit(16, 10, probe=probe)
    assert found == (16, 1) and probe.asked == [(16, 1, 10 * GB)]
    assert why.reason == "fits: a probe step used 8.1 of 10.0 GB" and why.notes == ()


def test_what_a_real_step_refutes_is_made_smaller_and_told(linear):
    no = Probed("too large", 11 * GB, "it used more than 10.0 GB")
    probe = Probe(no, Probed("fits", 6 * GB))
    found, why = fit(16, 9.5, probe=probe)
    assert found == (8, 2) and [a[:2] for a in probe.asked] == [(16, 1), (8, 2)]
    assert "16 rows do not fit" in why.notes[0] and "more than 10.0 GB" in why.notes[0]


def test_a_probe_that_fails_for_another_reason_says_so_and_the_forecast_stands(linear):
    found, why = fit(16, 10, probe=Probe(Probed("failed", None, "no module")))
    assert found == (16, 1) and why.reason == "not probed: forecast 9.0 of 10.0 GB"
    assert "no module" in why.notes[0]


def test_probing_comes_to_an_end(linear, monkeypatch):
    monkeypatch.setattr(micro_batch, "SURE_FRACTION", 0.0)
    probe = Probe(*[Probed("too large")] * 4)
    found, why = fit(64, 40, probe=probe)
    assert [a[0] for a in probe.asked] == [64, 32, 16, 8] and found == (4, 16)
    assert "4 probe steps did not fit" in why.notes[-1]


def test_a_split_that_does_not_divide_is_refused():
    config = tiny_config(train__micro_batch_size=6)
    assert split(config, 3).train.grad_accum_steps == 2
    with pytest.raises(ValueError, match="does not divide"):
        split(config, 4)


def settled(budget_gb, *overrides, rows=16, kind="auto"):
    from core.config.draft import Source

    config = tiny_config()
    values = [f"{s}.{k}={v}" for s, body in config for k, v in body if v is not None]
    draft = load(overrides=[*values, *overrides])
    if kind == "auto":
        draft.set("train.micro_batch_size", rows, Source("auto", reason="about 208 tokens a step"))
        if not any("grad_accum_steps" in o for o in overrides):
            draft.set("train.grad_accum_steps", 1, Source("default"))
    told = []
    settle_micro_batch(draft, budget_bytes=int(budget_gb * GB), probe=None, warn=told.append)
    t = build(draft).train
    return (t.micro_batch_size, t.grad_accum_steps), draft, told


def test_an_automatic_size_is_settled_with_its_reason(linear):
    found, draft, told = settled(8)
    assert found == (8, 2) and told == []
    why = draft.sources["train.micro_batch_size"]
    assert why.kind == "auto" and why.reason.startswith("fits: forecast 5.0 of 8.0 GB; about 208")
    why = draft.sources["train.grad_accum_steps"]
    assert (why.kind, why.reason) == ("auto", "16 rows a step, 8 at once")


def test_a_given_size_is_never_changed(linear):
    found, draft, told = settled(2, "train.micro_batch_size=16", kind="flag")
    assert found == (16, 1) and told == []
    assert draft.sources["train.micro_batch_size"].kind == "flag"


def test_a_given_accumulation_is_the_least_and_more_is_told(linear):
    assert settled(100, "train.grad_accum_steps=2")[0] == (16, 2)
    found, _, told = settled(8, "train.grad_accum_steps=2")
    assert found == (8, 4)
    assert "is 4, not 2: only 8 of the 32 rows" in told[0]


# The process of a probe


def python(code):
    return (sys.executable, "-c", f"import sys, json; sys.stdin.read(); {code}")


@pytest.mark.parametrize(
    ("code", "verdict", "reason"),
    [
        ("print(json.dumps({'peak_bytes': 1000}))", "fits", ""),
        ("print('noise'); print(json.dumps({'peak_bytes': 5 * 10**9}))", "too large", "5.0 GB"),
        (
            "print(json.dumps({'out_of_memory': 'Insufficient Memory'}))",
            "too large",
            "Insufficient",
        ),
        ("import os; os.abort()", "too large", "signal 6"),
        ("import os; os.kill(os.getpid(), 9)", "too large", "signal 9"),
        ("print('bad thing', file=sys.stderr); sys.exit(3)", "failed", "bad thing"),
        ("sys.exit(0)", "failed", "exit code 0"),
        ("print('{')", "failed", "exit code 0"),
    ],
)
def test_how_a_probe_ends(code, verdict, reason):
    found = probe_step(tiny_config(), GB, command=python(code))
    assert found.verdict == verdict and reason in found.reason


def test_a_probe_above_its_limit_or_time_is_killed():
    hungry = python("import time; x = bytearray(400_000_000); time.sleep(60)")
    found = probe_step(tiny_config(), 200_000_000, command=hungry)
    assert found.verdict == "too large" and "more than 0.2 GB" in found.reason
    assert found.peak_bytes > 200_000_000
    slow = python("import time; time.sleep(60)")
    found = probe_step(tiny_config(), GB, command=slow, timeout_s=0.5)
    assert found.verdict == "too large" and "took more than" in found.reason


def test_a_probe_that_cannot_start_reading_is_no_crash():
    found = probe_step(tiny_config(), GB, command=(sys.executable, "-c", "raise SystemExit(4)"))
    assert found.verdict == "failed" and "exit code 4" in found.reason


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_real_probe_takes_real_steps(backend):
    config = tiny_config(train__backend=backend, train__grad_accum_steps=3)
    found = probe_step(config, 4 * GB)
    assert found.verdict == "fits", found.reason
    assert 20_000_000 < found.peak_bytes < 2 * GB
