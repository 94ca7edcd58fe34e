"""Forecasts against real steps, the benchmark's command, and a refusal that imports no framework."""

import json
import os
import re
import subprocess
import sys

import pytest

from core.paths import PROJECT_ROOT
from tools import benchmark
from tools.benchmarks import memory

SMALL = [
    "model.d_model=128",
    "model.n_layers=4",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.vocab_size=512",
    "data.seq_len=128",
    "train.micro_batch_size=8",
]


@pytest.mark.skipif(sys.platform != "linux", reason="the constants are those of Linux")
@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_one_setting_is_predicted(backend, capsys):
    pytest.importorskip("torch" if backend == "cpu" else "mlx.core")
    assert benchmark.main(["memory", "--backend", backend, "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    ratio = found["predicted_bytes"] / found["measured_bytes"]
    assert 0.95 <= ratio <= 1.10, found
    assert found["ok"] and found["ratio"] == pytest.approx(ratio, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_the_grid(backend, tmp_path):
    args = ["memory", "--backend", backend, "--output", str(tmp_path)]
    assert benchmark.main(args) == 0
    assert (tmp_path / "memory.png").is_file()


def test_the_grid_is_large_enough_and_the_random_settings_are_fixed():
    settings = [memory.settings_of(changes) for changes in memory.GRID]
    assert len(set(settings)) == len(settings) >= 24
    assert memory.held_out() == memory.held_out()
    assert not set(memory.held_out()) & set(settings)


def test_the_record_of_the_grid_is_true():
    """docs/memory.json holds what was measured; the forecast of today must still agree with it."""
    path = PROJECT_ROOT / "docs" / "memory.json"
    rows = memory.from_rows(json.loads(path.read_text())["settings"])
    again = memory.predicted_again(rows)
    assert {row.backend for row in again} == {"cpu", "mlx"}
    for before, after in zip(rows, again):
        assert abs(after.predicted_bytes - before.predicted_bytes) <= 0.001 * after.measured_bytes
        assert after.ok, (after.backend, after.settings, after.ratio)
    held = {row.settings for row in rows if row.backend == "mlx"}
    assert {memory.settings_of(changes) for changes in memory.GRID} <= held


def test_a_wrong_command_line(capsys):
    assert benchmark.main(["memory", "--limit", "0"]) == 2
    assert capsys.readouterr().err.startswith("P012")
    assert benchmark.main(["memory", "--backend", "cpu", "model.d_modle=8"]) == 2
    assert "model.d_model" in capsys.readouterr().err


TOO_LARGE = [
    "--backend",
    "cpu",
    "--dry-run",
    "train.total_steps=5",
    "train.micro_batch_size=1024",
    "data.seq_len=128",
    "data.tokenizer=byte",
    "model.d_model=128",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.d_ff=200000",
]


def dry_run(folder, *more):
    """train.py --dry-run, and whether a framework was imported when it ended."""
    code = (
        "import sys; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "import train; rc = train.main()\n"
        "print('IMPORTED', sorted({'torch', 'mlx', 'mlx.core'} & set(sys.modules)))\n"
        "sys.exit(rc)"
    )
    (folder / "text.txt").write_text("The cat sat on the mat. " * 4000)
    return subprocess.run(
        [sys.executable, "-c", code, "--input_file", "text.txt", *TOO_LARGE, *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_cannot_fit_is_refused_before_a_framework_is_there_and_the_advice_works(tmp_path):
    done = dry_run(tmp_path, "train.memory_fraction=0.1")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("P101") and "nothing was started" in done.stderr
    assert "IMPORTED []" in done.stdout
    for part in ("activations", "weights", "framework", "samples, between steps: KV cache", "disk"):
        assert part in done.stdout, done.stdout
    typed = re.findall(r"((?:(?:train|data|model)\.\w+=\w+ )+)  \(", done.stderr)
    assert typed, done.stderr
    mended = dry_run(tmp_path, "train.memory_fraction=0.1", *typed[0].split())
    assert mended.returncode == 0, mended.stderr


def test_the_devices_own_figure_counts_once_it_is_known():
    from core.backend import DeviceInfo
    from core.errors import PippinError
    from core.params import param_specs
    from core.training.forecast import check_device
    from tests.helpers import tiny_config

    config = tiny_config()
    specs = param_specs(config.model)
    small = DeviceInfo("cuda", "torch", "a small card", 100_000_000, True)
    with pytest.raises(PippinError, match="a small card"):
        check_device(config, specs, small, force=False)
    check_device(config, specs, small, force=True)
    check_device(config, specs, DeviceInfo("cpu", "torch", "CPU", None, True), force=False)
