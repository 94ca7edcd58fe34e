"""What a forecast expects of a step before it has seen one, by hand.

Run: python -m pytest tests/unit/test_rate.py
"""

import pytest

from core.machine.autoconfig import DeviceFacts
from core.machine.detect import machine_facts
from core.machine.rate import SLOW_PROBE_S, UTILISATION, Rate, slow_speed, step_seconds
from core.machine.speed import flops_per_token, newton_schulz_flops
from core.params import Init, ParamSpec, num_parameters, param_specs
from tests.helpers import tiny_config
from tests.machines.recorded import recorded


def test_newton_schulz_by_hand():
    """Of 3 x 5: X X^T is 2 x 3 x 3 x 5, its square 2 x 3^3, their product with X as the first."""
    dense = ParamSpec("a", (3, 5), "matrix", Init("zeros"))
    experts = ParamSpec("b", (4, 5, 3), "matrix", Init("zeros"))
    others = ParamSpec("c", (7, 3), "embed", Init("zeros"))
    each = 90 + 54 + 90
    assert newton_schulz_flops((dense, experts, others), 2) == 2 * 5 * each


def test_a_slow_step_counts_initial_values_and_newton_schulz(monkeypatch):
    config = tiny_config(train__optimizer="adamw")
    specs = param_specs(config.model)
    rate = Rate(1e6, "given")
    rows = config.train.micro_batch_size * config.train.grad_accum_steps
    tokens = rows * 7 * flops_per_token(config.model, specs, config.data.seq_len)
    assert step_seconds(config, rate, 7) == pytest.approx(tokens / 1e6)
    muon = tiny_config(train__optimizer="muon")
    products = newton_schulz_flops(specs, muon.train.ns_steps)
    expected = tokens / 1e6 + products * UTILISATION / 1e6
    assert step_seconds(muon, rate, 7) == pytest.approx(expected)
    monkeypatch.setattr("core.machine.rate.matmul_flops", lambda: 1e18)
    machine = machine_facts(recorded("xeon_amx_cpu"))
    cpu = DeviceFacts("cpu", "", False, False, 10**10)
    assert slow_speed(muon, cpu, machine, 7) is None
    initial = num_parameters(specs) / (SLOW_PROBE_S + 1)
    monkeypatch.setattr("core.machine.rate.INITIALISED_PER_S", initial)
    assert slow_speed(muon, cpu, machine, 7) is not None
