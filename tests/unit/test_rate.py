"""What a forecast expects of a step before it has seen one, by hand.

Run: python -m pytest tests/unit/test_rate.py
"""

from dataclasses import replace

import pytest

from core.machine.autoconfig import DeviceFacts
from core.machine.detect import machine_facts
from core.machine.rate import (
    CPU_UTILISATION,
    SLOW_PROBE_S,
    UTILISATION,
    Rate,
    core_flops,
    predicted_speed,
    sizing_rate,
    slow_speed,
    speed_at,
    step_seconds,
)
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
    assert step_seconds(muon, rate, 7) == pytest.approx((tokens + products) / 1e6)
    both = Rate(1e6, "given", products=4e6)
    assert step_seconds(muon, both, 7) == pytest.approx(tokens / 1e6 + products / 4e6)
    monkeypatch.setattr("core.machine.rate.matmul_flops", lambda: 1e18)
    machine = machine_facts(recorded("xeon_amx_cpu"))
    cpu = DeviceFacts("cpu", "", False, False, 10**10)
    assert slow_speed(muon, cpu, machine, 7) is None
    initial = num_parameters(specs) / (SLOW_PROBE_S + 1)
    monkeypatch.setattr("core.machine.rate.INITIALISED_PER_S", initial)
    assert slow_speed(muon, cpu, machine, 7) is not None


def gpu_of(name, native_bf16=True):
    machine = machine_facts(recorded(name))
    backend = "mlx" if machine.apple is not None else "cuda"
    return DeviceFacts(backend, "", True, native_bf16, 10**10), machine


def test_a_known_gpu_is_taken_at_its_published_rate():
    cases = [("m4_max_64gb", True, 14.8e12), ("h100", True, 784e12), ("t4", False, 4e12)]
    for name, native, peak in cases:
        rate = sizing_rate(*gpu_of(name, native), "bfloat16")
        assert rate.flops == pytest.approx(UTILISATION * peak), name
        assert "published rate" in rate.how


@pytest.mark.parametrize(
    ("name", "precision", "tflops", "words"),
    [
        # The data sheet at the RTX 4090's shares of its own: 55 of 82.6, and 170 of 165.2.
        ("rtx_5090", "float32", 55 / 82.6 * 104.8, "data sheet"),
        ("rtx_5090", "bfloat16", 170 / 165.2 * 209.5, "data sheet"),
        ("rtx_3090_x2_pcie", "bfloat16", 170 / 165.2 * 71.2, "data sheet"),
        # 80 cores, each as one of the 40 of an M3 Max: 11.5 and 12.8.
        ("m3_ultra_512gb", "float32", 2 * 11.5, "its 80 GPU cores"),
        ("m3_ultra_512gb", "bfloat16", 2 * 12.8, "Apple M3 Max"),
        ("t400", "float32", 4.0, "the slowest GPU of its kind"),
    ],
)
def test_an_unmeasured_gpu_is_estimated_by_what_is_known_of_it(name, precision, tflops, words):
    rate = sizing_rate(*gpu_of(name), precision)
    assert rate.flops == pytest.approx(UTILISATION * tflops * 1e12, rel=0.01)
    assert rate.how.startswith("estimated from") and words in rate.how


def test_newer_and_larger_gpus_are_not_taken_for_slower_ones():
    def flops(name, precision="bfloat16"):
        return sizing_rate(*gpu_of(name), precision).flops

    assert flops("t4") < flops("rtx_3090_x2_pcie") < flops("rtx_4090") <= flops("rtx_5090")
    assert flops("m1_air_8gb") < flops("m2_air_16gb") < flops("m3_pro_18gb") < flops("m3_max_36gb")
    assert flops("m3_max_36gb") < flops("m3_ultra_512gb")


def test_a_geforce_that_is_in_no_table_is_estimated_by_its_memory():
    """An RTX 4090 Laptop GPU: 16 GB of Ada, at 1.38 TFLOP/s a GB; a slice of a card is not."""
    device, machine = gpu_of("rtx_4090")
    card = machine.nvidia.gpus[0]
    laptop = replace(card, name="NVIDIA GeForce RTX 4090 Laptop GPU", memory_bytes=16 * 10**9)

    def rate(gpu):
        there = replace(machine, nvidia=replace(machine.nvidia, gpus=(gpu,)))
        return sizing_rate(device, there, "float32")

    assert rate(laptop).flops == pytest.approx(UTILISATION * 0.67 * 1.38 * 16 * 1e12)
    assert "memory" in rate(laptop).how and "Ada" in rate(laptop).how
    assert "slowest GPU" in rate(replace(laptop, is_mig=True)).how


def test_a_dry_run_and_auto_configure_expect_the_same_of_known_devices(monkeypatch):
    monkeypatch.setattr("core.machine.rate.matmul_flops", lambda: 1e11)
    config = tiny_config()
    cpu = DeviceFacts("cpu", "", False, False, 10**10)
    for device, machine in (gpu_of("h100"), (cpu, machine_facts(recorded("xeon_amx_cpu")))):
        rate = sizing_rate(device, machine, config.train.precision)
        expected, _ = predicted_speed(config, device, machine, 7)
        assert speed_at(config, rate, 7) == pytest.approx(expected)
    assert rate.flops == pytest.approx(CPU_UTILISATION * 1e11)
    assert rate.how == "estimated from a matrix product"


def test_a_core_is_judged_by_the_best_of_its_products():
    """Ten products of 64 x 64 x 64 in a clock of our own: 2 x 64^3 x 10 FLOPs in 1 ms, then slower."""
    ticks = iter([0.0, 0.0, 0.001, 0.001, 0.011, 0.011, 0.021, 9.0])
    assert core_flops(0.2, clock=lambda: next(ticks)) == pytest.approx(10 * 2 * 64**3 / 0.001)
