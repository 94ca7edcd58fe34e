"""--depth, --time-budget and the remembered backend, as a user meets them in train.py.

Run: python -m pytest tests/cli/test_scaling_cli.py
"""

import io
import json

import pytest

from core.backend import Availability
from core.config.load import load
from core.machine import remembered
from core.machine.detect import machine_facts
from core.training import session as session_module
from core.training.console import Console
from core.training.options import Options
from core.training.session import Session
from tests.cli.runs import TINY, start, train_here, write_text

TEXT = ("data.seq_len=24", "data.tokenizer=byte", "data.val_fraction=0.1", "train.eval_tokens=96")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session_module, "PROBE_SECONDS", 0.05)
    monkeypatch.setenv("PIPPIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def printed(capsys, here, *args):
    """Configuration and sources of a command line."""
    text = write_text(here)
    assert (
        train_here("--input_file", text, "--backend", "cpu", "--print-config", "--json", *args) == 0
    )
    captured = capsys.readouterr()
    return json.loads(captured.out.strip().splitlines()[-1])


def test_one_dial_sets_everything_and_every_decision_has_a_reason(here, capsys):
    found = printed(capsys, here, *TEXT, "--depth", "1")
    config, sources = found["config"], found["sources"]
    assert (config["model"]["d_model"], config["model"]["n_layers"]) == (64, 1)
    assert sources["model.d_model"] == {
        "kind": "flag",
        "where": "--depth 1",
        "reason": "--depth 1: 64 x depth",
    }
    silent = [k for k, s in sources.items() if s["kind"] == "auto" and not s["reason"]]
    assert not silent
    # 200 lines of a text are read 20 times at most, and it is said.
    assert "by heart" in sources["train.total_steps"]["reason"]


def test_every_automatic_value_of_the_quick_start_has_a_reason(here, capsys):
    found = printed(capsys, here, *TEXT, "--time-budget", "20s")
    silent = [k for k, s in found["sources"].items() if s["kind"] == "auto" and not s["reason"]]
    assert not silent
    assert found["sources"]["train.minutes"]["where"] == "--time-budget 20s"
    assert found["config"]["train"]["minutes"] == pytest.approx(1 / 3)


def test_a_time_budget_beats_the_length_of_a_file(here, capsys, monkeypatch):
    monkeypatch.setattr(Session, "_measure", lambda self, *a, **k: 2_000.0)
    path = here / "ten.yaml"
    path.write_text("train: {total_steps: 10, warmup_steps: 8, micro_batch_size: 2}\n")
    args = ("--config", path, *TEXT, "model.d_model=32", "model.n_layers=1")
    found = printed(capsys, here, *args, "--time-budget", "15s")
    train, length = found["config"]["train"], found["sources"]["train.total_steps"]
    # 15 s, of which 95 % go to steps, at 2,000 positions a second and 48 a step.
    by_hand = 2_000 * 15 * 0.95 / 48
    assert train["total_steps"] == pytest.approx(by_hand, abs=1) and length["kind"] == "auto"
    assert train["warmup_steps"] == train["total_steps"] // 20
    args = ("--input_file", write_text(here), "--backend", "cpu", *args, "--dry-run")
    assert train_here(*args, "--time-budget", "15s") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--time-budget 15s decides the length" in out
    assert "train.total_steps = 10, train.warmup_steps = 8" in out
    assert train_here(*args, "--minutes", "3") == 0
    assert "--minutes 3 has no effect: train.total_steps = 10" in capsys.readouterr().out


def test_max_steps_stops_within_the_length_of_a_time_budget(here, capsys, monkeypatch):
    monkeypatch.setattr(Session, "_measure", lambda self, *a, **k: 2_000.0)
    args = ("--backend", "cpu", *TEXT, "--dry-run", "--time-budget", "15s", "--max-steps", "7")
    assert train_here("--input_file", write_text(here), *args) == 0
    assert "--max-steps 7: stop there; the schedule stays" in capsys.readouterr().out


def test_a_width_alone_says_which_sizes_of_the_preset_stay(here, capsys, monkeypatch):
    monkeypatch.setattr(Session, "_measure", lambda self, *a, **k: 2_000.0)
    args = ("--input_file", write_text(here), "--backend", "cpu", *TEXT, "--dry-run")
    assert train_here("--config", "dev", *args, "--d-model", "64") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "model.d_model is 64, and the file's other sizes were made for 256 and stay" in out
    assert "model.d_ff = 680" in out and "model.d_ff=auto" in out
    assert train_here("--config", "dev", *args, "--d-model", "256") == 0
    assert "were made for" not in capsys.readouterr().out


def test_the_dial_is_told_with_its_tokens_a_parameter(here, capsys):
    args = ("--backend", "cpu", *TEXT, "--depth", "1", "--dry-run", "model.d_model=32")
    assert train_here("--input_file", write_text(here), *args) == 0
    out = capsys.readouterr().out
    assert "model.d_model = 32 is given and stands; --depth 1 alone would set 64" in out
    assert "a parameter" in out and "would read 20 tokens a parameter" in out
    assert "--depth 1: the depth" in out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--depth", "0"), "P012", "1 to 128"),
        (("--depth", "many"), "P012", "depth"),
        (("--depth", "4", "--manual-config"), "P012", "leave one out"),
        (("--time-budget", "30"), "P012", "30m is 30 minutes"),
        (("--time-budget", "soon"), "P012", "1h30m"),
        (("--time-budget", "30m", "--minutes", "5"), "P012", "two times"),
        (("--time-budget", "30m", "train.minutes=5"), "P012", "train.minutes=5 are two times"),
        (("--time-budget", "30m", "train.total_steps=20"), "P012", "train.total_steps=20"),
        (("--time-budget", "30m", "--max-iters", "20"), "P012", "--max_iters"),
        (("--time-budget", "30m", "--manual-config"), "P012", "leave one out"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(here, capsys, args, code, words):
    assert train_here("--input_file", write_text(here), *args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(code) and words in captured.err
    assert not (here / "shards").exists() and not (here / "checkpoints").exists()


def test_a_run_that_goes_on_keeps_its_size(here, capsys):
    assert train_here(*start(here, "--max-steps", 2, "train.save_dir=checkpoints/a")) == 0
    capsys.readouterr()
    assert train_here("--resume", "checkpoints/a", "--depth", 3) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("P302") and "2 layers of width 16" in shown


def test_what_is_too_large_for_memory_is_refused_without_a_probe(here, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model that does not fit was tried")

    monkeypatch.setattr(Session, "_measure", never)
    args = ("--backend", "cpu", *TEXT, "--depth", "100", "--dry-run")
    assert train_here("--input_file", write_text(here), *args) != 0
    assert capsys.readouterr().err.startswith("P101")


@pytest.mark.parametrize("looks", ["--dry-run", "--print-config"])
@pytest.mark.parametrize("more", [(), ("--time-budget", "30m")])
def test_a_depth_that_is_only_looked_at_trains_no_slow_step(here, capsys, monkeypatch, looks, more):
    """8 layers of width 512 take over a minute on a processor of 10 MFLOP/s."""

    def never(*args, **kwargs):
        raise AssertionError("a slow step was trained")

    monkeypatch.setattr(Session, "_measure_once", never)
    monkeypatch.setattr("core.machine.rate.matmul_flops", lambda: 1e7)
    args = ("--backend", "cpu", *TEXT, "--depth", "8", looks, *more)
    assert train_here("--input_file", write_text(here), *args) == 0
    out = capsys.readouterr().out
    assert looks == "--print-config" or "predicted: 65% of 0 GFLOP/s" in out


def test_a_plain_depth_needs_no_speed_and_a_quick_one_is_measured(here, capsys, monkeypatch):
    monkeypatch.setattr("core.machine.rate.matmul_flops", lambda: 1e15)
    calls = []
    monkeypatch.setattr(Session, "_measure_once", lambda self, *a: calls.append(a) or 1234.0)
    args = ("--input_file", write_text(here), "--backend", "cpu", *TEXT, "--depth", "1")
    assert train_here(*args, "--print-config") == 0 and not calls
    assert train_here(*args, "--dry-run") == 0 and len(calls) == 1
    assert "1.2k tok/s, measured" in capsys.readouterr().out


# backend: auto


class Backends:
    """What a Mac with all of them would offer."""

    def available(self):
        return {n: Availability(n, True, versions={n: "1"}) for n in ("mlx", "mps", "cpu")}


def device(options=None):
    """What `backend: auto` takes, and what is told."""
    stream = io.StringIO()
    found = Session(options or Options(), Backends(), Console(stream=stream))  # type: ignore[arg-type]
    draft = load(config="quickstart")
    return found._device(draft), stream.getvalue()


@pytest.fixture
def mac(here, monkeypatch):
    monkeypatch.setattr(remembered, "on_apple_silicon", lambda: True)
    return remembered.machine_of(machine_facts(), Backends().available())


def test_auto_takes_what_was_measured_and_says_when(mac):
    remembered.remember(mac, {"mlx": 100.0, "mps": 140.0, "cpu": 900.0}, date="2026-11-20")
    found, told = device()
    assert found.backend == "mps"
    assert f"auto: measured 1.4x mlx on this {mac.word}, 2026-11-20" in " ".join(told.split())


def test_another_version_or_a_broken_file_changes_nothing_and_is_told(mac, here):
    plain, silent = device()
    assert "!" not in silent
    remembered.remember(mac, {"mlx": 100.0, "mps": 140.0}, date="2026-11-20")
    path = here / "cache" / remembered.FILE_NAME
    path.write_text(path.read_text().replace('"mps": "1"', '"mps": "2"'))
    found, told = device()
    assert found == plain and "versions have changed" in told
    path.write_text("{")
    found, told = device()
    assert found == plain and "not what Pippin writes" in told
    path.unlink()
    path.mkdir()
    assert device()[0] == plain


def test_a_backend_that_is_asked_for_needs_no_memory(mac, here):
    remembered.remember(mac, {"mlx": 100.0, "mps": 140.0}, date="2026-11-20")
    draft = load(config="quickstart", flags={"train.backend": "mlx"})
    found = Session(Options(), Backends(), Console(stream=io.StringIO()))._device(draft)  # type: ignore[arg-type]
    assert found.backend == "mlx" and not found.reason


def test_the_tiny_runs_of_other_tests_are_not_touched(here, capsys):
    found = printed(capsys, here, *TINY, "train.total_steps=6")
    assert found["config"]["model"]["d_model"] == 16


def test_many_stories_are_told_before_they_are_written(here, monkeypatch, capsys):
    monkeypatch.setattr("core.training.textdata.MANY_STORIES_BYTES", 100_000)
    args = ("--backend", "cpu", "--minutes", "0.01", "--dry-run", "data.corpus_bytes=100000", *TINY)
    assert train_here(*args) == 0
    assert "writing 0.1 MB of stories first, once" in capsys.readouterr().out
    assert train_here(*args) == 0
    assert "of stories first" not in capsys.readouterr().out
