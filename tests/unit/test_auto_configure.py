"""`auto_configure()` as seed guide 000 writes it, on recorded machines and on this one.

Run: python -m pytest tests/unit/test_auto_configure.py
"""

import io
import json
import subprocess
import sys

import pytest

import auto_config
from core.config.schema import ModelConfig, RunConfig
from core.errors import PippinError
from core.machine import AutoConfigurator, auto_configure, configurator
from core.machine.configurator import installed
from core.machine.detect import machine_facts
from core.machine.memory import predict_training_memory
from core.machine.speed import flops_per_token
from core.params import num_parameters, param_specs
from core.paths import PROJECT_ROOT
from tests.machines.recorded import NAMES, recorded

TIERS = {
    "m1_air_8gb": ("mlx", "Small"),
    "m2_air_16gb": ("mlx", "Medium"),
    "m4_air_24gb": ("mlx", "Medium"),
    "m3_max_36gb": ("mlx", "Medium"),
    "m4_max_64gb": ("mlx", "Large"),
    "m4_max_128gb": ("mlx", "Large"),
    "m3_ultra_512gb": ("mlx", "XL"),
    "t4": ("cuda", "Medium"),
    "rtx_4090": ("cuda", "Medium"),
    "a100_80gb": ("cuda", "Large"),
    "h100": ("cuda", "Large"),
    "h100_x8": ("cuda", "Large"),  # 640 GB together; one replica has 80
    "rtx_3090_x2_pcie": ("cuda", "Medium"),
}


@pytest.fixture(autouse=True)
def all_packages(monkeypatch):
    versions = {"torch": "2.13.0", "mlx": "0.32.4"}
    monkeypatch.setattr(configurator, "_version", versions.get)


def at(flops):
    def measure(config):
        return flops / flops_per_token(config.model, param_specs(config.model), config.data.seq_len)

    return measure


@pytest.mark.parametrize("name", TIERS)
def test_machines_have_their_backend_and_tier_of_one_replica(name):
    found = auto_configure(probe=recorded(name), measure=at(1e16), time_budget="20h")
    assert (found.device.backend, found.tier.name) == TIERS[name]
    model = found.get_model_config()
    assert (model.d_model, model.n_layers, model.n_heads) == (
        found.tier.d_model,
        found.tier.n_layers,
        found.tier.n_heads,
    )
    needed = predict_training_memory(found.config, param_specs(model)).total
    assert needed <= 0.8 * found.device.budget_bytes


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_machine_is_configured_and_explained(name):
    found = auto_configure(probe=recorded(name))
    assert isinstance(found, AutoConfigurator) and isinstance(found.config, RunConfig)
    assert isinstance(found.get_model_config(), ModelConfig)
    stream = io.StringIO()
    found.print_config(stream)
    text = stream.getvalue()
    heads = [line.partition(":")[0] for line in text.splitlines()]
    for word in ("Mode", "Memory", "Model", "Experts", "Batch", "Sequence", "Mixed Precision"):
        assert word in heads
    m = found.config.model
    assert f"{m.d_model}d x {m.n_layers}L x {m.n_heads}H" in text
    assert "estimated from" in text and "measured" not in text
    shown = json.loads(json.dumps(found.as_object()))
    assert shown["parameters"] == num_parameters(param_specs(m))
    silent = [k for k, s in found.draft.sources.items() if s.kind == "auto" and not s.reason]
    assert not silent


def test_depth_time_and_overrides_are_those_of_train():
    probe = recorded("m4_max_64gb")
    found = auto_configure(probe=probe, measure=at(5e12), depth=6)
    assert found.config.model.d_model == 384 and found.draft.sources["train.lr"].kind == "flag"
    assert auto_configure(probe=probe, overrides=["model.d_model=96"]).config.model.d_model == 96
    short = auto_configure(probe=probe, measure=at(5e12), time_budget="2m")
    long = auto_configure(probe=probe, measure=at(5e12), time_budget="8h")
    assert long.config.model.d_model > short.config.model.d_model
    assert long.draft.sources["train.minutes"].where == "--time-budget 8h"
    with pytest.raises(PippinError):
        auto_configure(probe=probe, time_budget="soon")


SIZE = ("model.d_model=256", "model.n_layers=4", "train.micro_batch_size=4")


def test_a_newer_card_gets_no_smaller_model_than_an_older_one():
    sizes = {
        name: num_parameters(param_specs(auto_configure(probe=recorded(name)).get_model_config()))
        for name in ("rtx_3090_x2_pcie", "rtx_4090", "rtx_5090", "m1_air_8gb", "m3_ultra_512gb")
    }
    assert sizes["rtx_3090_x2_pcie"] <= sizes["rtx_4090"] <= sizes["rtx_5090"]
    assert sizes["m1_air_8gb"] < sizes["m3_ultra_512gb"]


def test_a_misspelt_flag_names_the_nearest(capsys):
    assert auto_config.main(["--jsn"]) == 2
    assert "did you mean --json?" in capsys.readouterr().err


def test_a_depth_has_a_speed_and_a_slow_one_is_predicted(monkeypatch):
    """Nothing depends on the speed of a plain depth, so a slow step is not trained for it."""

    class Backends:
        def available(self):
            return installed(machine_facts(recorded("xeon_amx_cpu")))

        def load(self, name):
            return None

    def never(*args):
        raise AssertionError("a slow step was trained")

    monkeypatch.setattr(configurator, "_measure", never)
    monkeypatch.setattr("core.machine.rate.matmul_flops", lambda: 1e7)
    found = auto_configure(Backends(), probe=recorded("xeon_amx_cpu"), depth=8)
    assert found.tokens_per_s > 0 and found.speed_source.startswith("predicted")
    quick = auto_configure(probe=recorded("h100"), measure=at(1e15), depth=4)
    assert quick.tokens_per_s == at(1e15)(quick.config) and "does not fit" not in quick.lines()[-1]


def test_an_estimate_is_of_the_precision_that_is_given():
    """The published rates of an H100: 784 TFLOP/s in bfloat16 and 52 in float32."""
    speeds = [
        auto_configure(
            probe=recorded("h100"),
            overrides=["train.backend=cuda", f"train.precision={precision}", *SIZE],
        ).tokens_per_s
        for precision in ("bfloat16", "float32")
    ]
    assert speeds[0] / speeds[1] == pytest.approx(784 / 52)


def test_a_time_budget_beats_the_length_of_a_preset():
    found = auto_configure(
        probe=recorded("h100"), measure=at(5e12), config="150M", time_budget="8h"
    )
    assert found.draft.sources["train.total_steps"].kind == "auto"
    assert any("train.total_steps = 10,000" in note for note in found.notes)
    with pytest.raises(PippinError, match="both give the length"):
        auto_configure(probe=recorded("h100"), time_budget="8h", overrides=["train.total_steps=20"])


def test_what_is_installed_decides_without_an_import(monkeypatch):
    mac, pc = machine_facts(recorded("m3_max_36gb")), machine_facts(recorded("t4"))
    assert {n for n, a in installed(mac).items() if a.ok} == {"mlx", "mps", "cpu"}
    assert {n for n, a in installed(pc).items() if a.ok} == {"mlx", "cuda", "cpu"}
    rosetta = installed(machine_facts(recorded("m1_rosetta")))
    assert not rosetta["mps"].ok
    monkeypatch.setattr(configurator, "_version", {"mlx": "0.32.4"}.get)
    assert not installed(mac)["cpu"].ok and "torch is missing" in installed(mac)["cpu"].reason


def test_importing_and_asking_loads_no_framework():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import core.machine\n"
        "light = not {'numpy', 'pydantic', 'psutil'} & set(sys.modules)\n"
        "from core.machine import auto_configure\n"
        "c = auto_configure(); c.print_config(); c.get_model_config()\n"
        "print(light, sorted({'torch', 'mlx'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROJECT_ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "True []" and lines[0].startswith("Machine: ")


def test_an_unknown_name_is_an_ordinary_error():
    import core.machine

    with pytest.raises(AttributeError, match="auto_config"):
        _ = core.machine.auto_config  # type: ignore[attr-defined]


# The script


def test_the_script_measures_and_prints(capsys):
    assert auto_config.main(["model.d_model=32", "model.n_layers=1", "model.n_heads=1"]) == 0
    out = capsys.readouterr().out
    assert "Model: 32d x 1L x 1H" in out and ", measured" in out


def test_the_script_refuses_nonsense(capsys):
    assert auto_config.main(["--time-budget", "soon", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("P012") and not captured.out
