"""tools/parity.py: it passes where backends agree, and each of its checks can fail.

Run: python -m pytest tests/cli/test_parity_tool.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoint import initial_checkpoint
from core.errors import PippinError
from core.params import param_specs
from tools import parity
from tools.parities import compare as cmp
from tools.parities import experiment, plot
from tools.parities.worker import FAULTY_TENSOR, FaultyCheckpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def run_tool(folder: Path, *args: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON on stdout, and stderr, run as a user does, from another folder."""
    command = [sys.executable, str(ROOT / "tools" / "parity.py"), "--json", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parity")
    code, report, errors = run_tool(
        folder, "--backends", "cpu,mlx", "--steps", str(STEPS), "--out", "plots/p.png"
    )
    assert code == 0, errors
    return folder, report


def test_both_frameworks_run_the_same_experiment(agreeing: tuple[Path, dict[str, Any]]) -> None:
    _, report = agreeing
    assert report["ok"]
    (pair,) = report["pairs"]
    assert (pair["reference"], pair["backend"]) == ("cpu", "mlx")
    names = [c["quantity"] for c in pair["checks"]]
    assert len(names) == len(set(names)) == 8
    assert all(c["ok"] and c["measured"] <= c["tolerance"] for c in pair["checks"])
    # Two frameworks, not one compared with itself.
    assert sum(c["measured"] > 0 for c in pair["checks"]) >= 4
    found = report["backends"]
    assert found["cpu"]["framework"].startswith("torch ")
    assert found["mlx"]["framework"].startswith("mlx ")
    assert {f["checkpoint"] for f in found.values()} == {"half-cpu.pt", "half-mlx.npz"}
    assert found["cpu"]["tokens"] == found["mlx"]["tokens"]


def test_the_experiment_learns_and_is_awkward(agreeing: tuple[Path, dict[str, Any]]) -> None:
    _, report = agreeing
    model, train = report["config"]["model"], report["config"]["train"]
    losses, norms = (report["backends"]["cpu"][k] for k in ("losses", "grad_norms"))
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1
    assert model["n_kv_heads"] < model["n_heads"] and model["qk_norm"]
    assert train["weight_decay"] > 0 and train["grad_accum_steps"] > 1
    assert max(norms) > min(norms) > train["max_grad_norm"] > 0, "the clip is active"
    assert train["momentum_start"] < train["momentum"] and train["momentum_warmup_steps"] > STEPS
    seq_len = report["config"]["data"]["seq_len"]
    assert seq_len & (seq_len - 1), "no power of two"
    assert (train["precision"], train["tf32"]) == ("float32", False)


def test_runs_are_handed_over_both_ways(agreeing: tuple[Path, dict[str, Any]]) -> None:
    _, report = agreeing
    ways = {(h["from"], h["to"]): h for h in report["handovers"]}
    assert set(ways) == {("cpu", "mlx"), ("mlx", "cpu")}
    for (source, _), handover in ways.items():
        assert handover["first_step"] == STEPS // 2 + 1
        own = report["backends"][source]["losses"][STEPS // 2 :]
        np.testing.assert_allclose(handover["losses"], own, atol=cmp.TOL_LOSS)


def test_the_plot_is_where_it_says(agreeing: tuple[Path, dict[str, Any]]) -> None:
    folder, report = agreeing
    data = (folder / report["plot"]).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_an_injected_fault_is_found(tmp_path: Path) -> None:
    code, report, errors = run_tool(
        tmp_path, "--backends", "cpu,mlx", "--steps", str(STEPS), "--inject-fault", "1e-3"
    )
    assert code == 1 and "beyond tolerance" in errors and not report["ok"]
    checks = {c["quantity"].split(" (")[0]: c for c in report["pairs"][0]["checks"]}
    assert checks["initial logits"]["measured"] == pytest.approx(1e-3, rel=0.01)
    missed = {name for name, c in checks.items() if c["ok"]}
    # Of 1e-3, tokens need not change; and what mlx saved, the sound cpu continues soundly.
    assert missed <= {"greedy tokens", f"mlx -> cpu after step {STEPS // 2}"}


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--backends", "cpu,tpu"], "P501", "no backend is called 'tpu'"),
        (["--backends", "cpu"], "P012", "needs two backends; there is cpu"),
        (["--backends", "cpu,cpu"], "P012", "needs two backends"),
        (["--backends", "cpu,mlx", "--steps", "1"], "P012", "--steps is 1"),
        (["--backends", "cpu,mlx", "--step", "3"], "P012", "unknown flag --step"),
        (["--backends", "cpu,mlx", "--out", "plot.jpg"], "P012", "plot.jpg is no .png"),
        (["--backends", "cpu,mlx", "train.precision=bfloat16"], "P012", "in float32"),
        (["--backends", "cpu,mlx", "train.tf32=true"], "P012", "train.tf32=true"),
        (["--backends", "cpu,mlx", "model.d_mode=8"], "P010", "did you mean model.d_model"),
        (["--backends", "cpu,mlx", "--config", "nothing"], "P011", "nothing"),
    ],
)
def test_a_wrong_command_line_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    code: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was started"))
    assert parity.main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(code) and words in captured.err
    assert "Traceback" not in captured.err and not list(tmp_path.iterdir())


def test_a_backend_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process of a backend ends with an error: its words come through, with its exit code."""
    (tmp_path / "job.json").write_text('{"config": {"train": {}}}')
    console = parity.Console(stderr=True)
    with pytest.raises(PippinError, match="backend cpu failed") as error:
        parity.Comparison(tmp_path, ["cpu", "mlx"], console).run()
    assert error.value.exit_code == 1 and "validation error" in error.value.found


# The comparison itself, on made-up results.

WEIGHT = "layers.0.mlp.up_proj.weight"


def made_up(name: str, **changes: Any) -> cmp.Found:
    rng = np.random.default_rng(3)
    arrays = {
        "logits": rng.normal(size=(2, 3, 5)).astype(np.float32),
        f"update/{WEIGHT}": rng.normal(size=(4, 3)).astype(np.float32),
        f"final/{WEIGHT}": rng.normal(size=(4, 3)).astype(np.float32),
    }
    values: dict[str, Any] = {
        "losses": [3.0, 2.0, 1.0, 0.5],
        "grad_norms": [1.0, 2.0, 1.0, 1.0],
        "tokens": [[1, 2, 3], [4, 5, 6]],
        "leads": [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
    }
    for key, change in changes.items():
        target = arrays if key in arrays else values
        target[key] = change(np.array(target[key]))
    return cmp.Found(name, values, arrays)


def verdicts(b: cmp.Found, handed: list[float] | None = None) -> dict[str, bool]:
    a = made_up("a")
    initial = {WEIGHT: np.zeros((4, 3), np.float32)}
    losses = np.array([1.0, 0.5] if handed is None else handed)
    way = cmp.Handover("a", "b", 3, losses)
    checks = cmp.compare(a, b, initial, [(way, a)])
    return {c.quantity.split(" (")[0]: c.ok for c in checks}


def add(where: Any, gap: float) -> Any:
    def change(x: np.ndarray[Any, Any]) -> Any:
        x = x.astype(x.dtype if x.dtype.kind == "f" else int)
        x[where] += gap
        return x

    return change


def test_equal_results_pass() -> None:
    assert all(verdicts(made_up("b")).values())


@pytest.mark.parametrize(
    ("changes", "caught"),
    [
        ({"logits": add((1, 2, 4), 1e-3)}, "initial logits"),
        ({"losses": add(2, 2e-4)}, "losses of 4 steps"),
        ({"losses": add(2, np.nan)}, "losses of 4 steps"),
        ({"grad_norms": add(1, 1e-3)}, "gradient norms"),
        ({f"update/{WEIGHT}": lambda x: x * 1.001}, "update of step 1"),
        ({f"final/{WEIGHT}": lambda x: x * 1.001}, "final weights"),
        ({"tokens": add((1, 2), 1)}, "greedy tokens"),
    ],
)
def test_each_check_fails_alone(changes: dict[str, Any], caught: str) -> None:
    assert [name for name, ok in verdicts(made_up("b", **changes)).items() if not ok] == [caught]


def test_a_wrong_handover_fails_alone() -> None:
    found = verdicts(made_up("b"), handed=[1.0, 0.5002])
    assert [name for name, ok in found.items() if not ok] == ["a -> b after step 2"]


def test_tokens_after_a_tie_are_not_compared() -> None:
    different = {"tokens": add((1, 2), 1)}
    tie = {"leads": add((1, 1), -1.0 + 1e-6)}
    later_tie = {"leads": add((1, 2), -1.0 + 1e-3)}
    assert verdicts(made_up("b", **different, **tie))["greedy tokens"]
    assert not verdicts(made_up("b", **different, **later_tie))["greedy tokens"]


def test_relative_differences_by_hand() -> None:
    a, b = np.array([3.0, -4.0], np.float32), np.array([3.0, -4.1], np.float32)
    assert cmp.relative_max(a, b) == pytest.approx(0.1 / 4, rel=1e-5)
    assert cmp.relative_max(np.zeros(2), np.array([0.0, 0.5])) == 0.5
    x = {"final/norm.weight": a, WEIGHT: np.array([12.0])}
    y = {"final/norm.weight": b, WEIGHT: np.array([12.0])}
    overall, worst = cmp.relative_norm(x, y, x)
    assert overall == pytest.approx(0.1 / 13, rel=1e-5) and worst == "norm 2e-02"


# The experiment.

GOLDEN = [0, 60, 210, 120, 230, 190, 220, 110]


def test_the_stream_is_a_markov_chain_of_fixed_integers() -> None:
    ids = experiment.markov_tokens(5000, 257, seed=1)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < 257
    assert ids[:8].tolist() == GOLDEN, "another stream is another experiment"
    followers: dict[int, set[int]] = {}
    for one, two in zip(ids.tolist(), ids[1:].tolist()):
        followers.setdefault(one, set()).add(two)
    assert 8 <= len(followers) <= experiment.NUM_STATES
    assert max(map(len, followers.values())) <= 3
    assert experiment.markov_tokens(50, 2, seed=1).max() < 2


def test_a_preset_keeps_its_values_and_is_filled_in_small() -> None:
    config, notes = experiment.resolve_experiment("quickstart", ["train.lr=0.001"], 20)
    assert not config.model.tie_embeddings and config.train.lr == 0.001
    assert (config.model.d_model, config.model.n_layers, config.data.seq_len) == (64, 2, 48)
    assert config.train.total_steps == 20 and config.train.grad_accum_steps == 1
    assert config.train.precision == "float32" and not notes


def test_half_precision_of_a_file_becomes_float32_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("model: {d_model: 96}\ntrain: {precision: bfloat16}\n")
    config, notes = experiment.resolve_experiment(str(path), [], 20)
    assert config.train.precision == "float32" and "bfloat16" in notes[0]
    assert config.model.d_model == 96 and config.model.n_heads * config.model.head_dim == 96


def test_a_partial_window_is_among_the_batches() -> None:
    config, _ = experiment.resolve_experiment(None, [], STEPS)
    rows = config.train.micro_batch_size * config.train.grad_accum_steps
    with experiment.open_loader(config, STEPS, start_step=1) as loader:
        normalizers = [next(loader).normalizer for _ in range(STEPS)]
    assert min(normalizers) < max(normalizers) == rows * config.data.seq_len


def test_the_plot_stands_numbers_that_are_not_finite(tmp_path: Path) -> None:
    losses = {"a": np.array([3.0, 2.0, np.nan]), "b": np.array([3.0, np.inf, 1.0])}
    way = cmp.Handover("a", "b", 3, np.array([np.nan]))
    path = plot.draw(tmp_path / "new" / "p.png", losses, [way], title="x")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_json_holds_no_numbers_that_json_does_not_know() -> None:
    assert parity.strict({"a": [float("nan"), 1.0]}) == {"a": ["nan", 1.0]}


def test_a_fault_scales_one_tensor_alone() -> None:
    config, _ = experiment.resolve_experiment(None, [], STEPS)
    sound = initial_checkpoint(config, param_specs(config.model))
    faulty = FaultyCheckpoint(sound, 1.25)
    assert faulty.names == sound.names
    for name in sound.names:
        factor = 1.25 if name == FAULTY_TENSOR else 1.0
        np.testing.assert_array_equal(faulty.read(name), sound.read(name) * factor)


def test_errors_name_the_tools_own_flags(capsys):
    from tools import parity

    assert parity.main(["model.d_model=34"]) == 2
    err = capsys.readouterr().err
    assert "the built-in experiment: model.n_heads = 4" in err and "--n_heads" not in err
    assert parity.main(["--backends", "cpu,nothing"]) == 2
    err = capsys.readouterr().err
    assert "python tools/parity.py --backends " in err and "--backend " not in err
