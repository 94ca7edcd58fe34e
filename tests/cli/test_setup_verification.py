"""The verification as a command: exit codes, the printed report, JSON, and faults that must be seen.

Run: python -m pytest tests/cli/test_setup_verification.py
"""

import json
import subprocess
import sys

import pytest

import train
from core.paths import PROJECT_ROOT
from core.training.verification import command
from tools import setup_verification

TOOL = PROJECT_ROOT / "tools" / "setup_verification.py"
QUICK = ["--backend", "cpu", "--quick", "--in-process"]


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A folder of its own to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def break_attention(monkeypatch):
    """Every query sees every key, as where `is_causal` is lost."""
    import torch.nn.functional as F

    from backends.torch_common.device import CpuPolicy

    monkeypatch.setattr(
        CpuPolicy,
        "attention",
        lambda self, q, k, v, mask, *, from_start: F.scaled_dot_product_attention(
            q, k, v, enable_gqa=True
        ),
    )


def break_optimizer(monkeypatch):
    """AdamW without the correction of its first moment."""
    from backends.torch_common import optim

    healthy = optim.Optimizer._columns

    def columns(self, stack, hyper):
        active, idle = healthy(self, stack, hyper)
        if len(active) == 7:
            active[-1] *= 1 - self.config.beta1**hyper.step
        return active, idle

    monkeypatch.setattr(optim.Optimizer, "_columns", columns)


def test_a_sound_machine_passes(at, capsys):
    assert setup_verification.main(QUICK) == 0
    out = capsys.readouterr().out
    assert "ok   no leak in training, float32" in out and "0 failed" in out
    assert not list(at.iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (break_attention, "no leak without gradients, float32"),
        (break_optimizer, "AdamW's update against float64"),
    ],
)
def test_a_broken_backend_fails_with_exit_code_1(fault, name, at, monkeypatch, capsys):
    fault(monkeypatch)
    assert setup_verification.main([*QUICK, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    failed = {c["name"]: c for c in report["checks"] if c["status"] == "fail"}
    assert name in failed and failed[name]["value"] > failed[name]["tolerance"]
    assert failed[name]["remedy"]


def test_train_py_runs_the_same_checks(at, monkeypatch, capsys):
    seen = []

    def record(request, backends, *, as_json):
        seen.append((request, as_json))
        return 1

    monkeypatch.setattr(command, "run_verification", record)
    assert train.main(["--validate-setup", "--config", "quickstart", "--backend", "cpu"]) == 1
    ((request, as_json),) = seen
    assert (request.config, request.backend, as_json) == ("quickstart", "cpu", False)
    assert request.flags["train.backend"] == "cpu"
    assert train.main(["--validate-setup", "--json", "train.lr=0.1"]) == 1
    assert seen[1][0].overrides == ("train.lr=0.1",) and seen[1][1] is True


@pytest.mark.parametrize(
    "args",
    [
        ["--bakend", "cpu"],
        ["--backend", "tpu"],
        ["--config", "no-such-preset"],
        ["model.n_layers"],
    ],
)
def test_bad_usage_is_exit_code_2_with_one_message(args, at, capsys):
    assert setup_verification.main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("P01") and "Traceback" not in captured.err
    assert captured.out == ""


def test_a_wrong_name_is_answered_with_the_program_that_was_called(at, capsys):
    assert setup_verification.main(["--config", "quickstrat"]) == 2
    assert "try: python tools/setup_verification.py --config quickstart" in capsys.readouterr().err
    assert train.main(["--validate-setup", "--config", "quickstrat"]) == 2
    assert "try: python train.py --validate-setup --config quickstart" in capsys.readouterr().err


def test_a_backend_that_was_asked_for_and_is_not_here_fails(at, capsys):
    missing = "mps" if sys.platform != "darwin" else "cuda"
    assert setup_verification.main(["--backend", missing, "--quick", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in report["checks"] if c["status"] == "fail"] == [missing]


def test_a_named_configuration_is_checked_even_when_it_is_quick(at, capsys):
    (at / "big.yaml").write_text(
        "model: {n_layers: 200, d_model: 8192}\ntrain: {micro_batch_size: 64}\n"
    )
    assert setup_verification.main([*QUICK, "--config", "big.yaml", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    failed = {c["name"]: c for c in report["checks"] if c["status"] == "fail"}
    assert "one step on cpu" in failed
    assert "a smaller model" in failed["one step on cpu"]["remedy"]


def test_from_another_folder_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "--quick", "--backend", "cpu", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["counts"]["pass"] >= 8
    assert report["facts"]["cpu"]["logical_cores"] > 0
    assert not list(tmp_path.iterdir())
