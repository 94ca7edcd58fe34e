"""train.py as a user types it: a run, its files, and every bad input.

Run: python -m pytest tests/cli/test_train_cli.py
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from core.config.schema import key_names
from core.training.console import Console
from core.training.loop import Loop
from tests.cli.runs import (
    PROJECT_ROOT,
    TINY,
    losses,
    rows,
    start,
    train_here,
    train_process,
    write_text,
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_writes_its_folder_and_says_what_to_type_next(here, capsys):
    text = write_text(here)
    assert train_here("--input_file", text, "--backend", "cpu", "--max-steps", 6, *TINY) == 0
    out = capsys.readouterr().out
    run = here / "checkpoints" / "words-1"
    assert "pippin" in out.splitlines()[0] and "\x1b" not in out
    assert "python generate.py --model_name words-1" in out
    assert "python train.py --resume checkpoints/words-1" in out
    assert "--max-steps 6 is the length of the run" in out
    summary = json.loads((run / "logs" / "final_training_summary.json").read_text())
    metrics = rows(run)
    assert [r["step"] for r in metrics] == [1, 2, 3, 4, 5, 6]
    assert summary["total_steps"] == 6 and summary["final_loss"] == metrics[-1]["loss"]
    assert summary["total_tokens_processed"] == 6 * 2 * 24 == metrics[-1]["tokens_processed"]
    for name in (
        "config.json",
        "training_report.md",
        "best.pt",
        "step_000006.pt",
        "plots/loss.png",
    ):
        assert (run / name).is_file(), name
    assert json.loads((run / "config.json").read_text())["model"]["d_model"] == 16
    assert max(len(line) for line in out.splitlines() if "checkpoints/" not in line) <= 110


def test_the_same_command_twice_takes_the_next_name_and_never_overwrites(here, capsys):
    text = write_text(here)
    args = ("--input_file", text, "--backend", "cpu", "--max-steps", 2, *TINY)
    assert train_here(*args) == 0
    before = (here / "checkpoints" / "words-1" / "step_000002.pt").read_bytes()
    assert train_here(*args) == 0
    assert (here / "checkpoints" / "words-2" / "step_000002.pt").is_file()
    assert (here / "checkpoints" / "words-1" / "step_000002.pt").read_bytes() == before
    assert train_here(*args, "--save-dir", "checkpoints/words-1") == 2
    err = capsys.readouterr().err
    assert "P311" in err and "--resume" in err and "--overwrite" in err
    assert train_here(*args, "--save_dir", "checkpoints/words-1", "--overwrite") == 0


def test_json_mode_prints_json_lines_only(here, capsys):
    text = write_text(here)
    assert (
        train_here("--input_file", text, "--backend", "cpu", "--max-steps", 2, "--json", *TINY) == 0
    )
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["row", "row", "summary"]


def test_print_config_and_dry_run_train_nothing(here, capsys):
    text = write_text(here)
    assert train_here("--input_file", text, "--backend", "cpu", "--print-config", *TINY) == 0
    out = capsys.readouterr().out
    assert "model.d_model" in out and "flag" in out and "preset" in out and "auto" in out
    assert [line.split()[0] for line in out.splitlines()] == list(key_names())  # and nothing else
    assert train_here("--input_file", text, "--backend", "cpu", "--dry-run", *TINY) == 0
    assert "will take" in capsys.readouterr().out
    assert not (here / "checkpoints").exists()


def test_max_steps_stops_there_where_a_length_was_given(here, capsys):
    text = write_text(here)
    args = ("--input_file", text, "--backend", "cpu", *TINY, "train.total_steps=50")
    assert train_here(*args, "--max-steps", 3) == 0
    out = capsys.readouterr().out
    assert "the schedule stays 50" in out
    config = json.loads((here / "checkpoints" / "words-1" / "config.json").read_text())
    assert config["train"]["total_steps"] == 50


BAD = {
    "unknown flag": (("--batch-sice", "3"), "P012", "did you mean --batch-size?"),
    "a flag like none": (("--xyzzyx",), "P012", "--help"),
    "no name of a config": (("--config", ""), "P012", "--config has no value"),
    "not an override": (("hello",), "P012", "section.key=value"),
    "unknown key": (("train.learning_rat=1",), "P010", "did you mean"),
    "two problems": (("train.lrr=1", "model.d_model=x"), "P010", "model.d_model"),
    "heads": (("model.d_model=64", "model.n_heads=3"), "P010", "does not divide"),
    "warm-up": (("train.total_steps=5", "train.warmup_steps=9"), "P010", "before it is warm"),
    "no such text": (("--input_file", "nothing.txt"), "P201", "nothing.txt"),
    "no such config": (("--config", "nano"), "P011", "quickstart"),
    "no such run": (("--resume", "nobody"), "P302", "nobody"),
    "nothing to resume": (("--resume",), "P302", "no run"),
    "zero steps": (("--max-steps", "0"), "P012", "1 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message_and_exit_code_2(here, capsys, name):
    args, code, words = BAD[name]
    assert train_here("--backend", "cpu", *args) == 2
    err = capsys.readouterr().err
    assert err.startswith(code) and words in err and "Traceback" not in err
    assert not (here / "checkpoints").exists() and not (here / "pippin-error.log").exists()


def test_a_wrong_choice_of_a_flag_is_one_clear_message(here, capsys):
    assert train_here("--backend", "tpu") == 2
    err = capsys.readouterr().err
    assert err.startswith("P012") and "mlx" in err


def test_texts_that_cannot_be_trained_on(here, capsys):
    cases = {
        "empty.txt": (b"", "P201"),
        "tiny.txt": (b"one two", "P201"),
        "latin.txt": ("caf\u00e9 ol\u00e9 ".encode("latin-1") * 500, "P202"),
        "bad.jsonl": (b'{"text": "fine"}\n{"text": oops}\n', "P202"),
        "field.jsonl": (b'{"content": "fine"}\n' * 50, "P202"),
    }
    for name, (content, code) in cases.items():
        (here / name).write_bytes(content)
        assert train_here("--backend", "cpu", "--input_file", name, *TINY) == 2
        err = capsys.readouterr().err
        assert err.startswith(code) and name.split(".")[0] in err, err
    assert not (here / "checkpoints").exists()


def test_a_backend_that_is_not_here_names_those_that_are(here, capsys):
    assert train_here("--backend", "mps", *TINY) in (0, 2)
    err = capsys.readouterr().err
    if sys.platform != "darwin":
        assert err.startswith("P501") and "cpu" in err and "nothing was started" in err


def test_a_forecast_that_does_not_fit_is_refused_with_what_does(here, capsys):
    text = write_text(here)
    args = ["--input_file", text, "--backend", "cpu", *TINY, "train.total_steps=5"]
    args.append("train.micro_batch_size=60000")
    args.append("data.seq_len=24")
    args.append("model.d_ff=100000")
    assert train_here(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("P101") and "train.micro_batch_size=" in err and "--force" in err


def test_manual_config_decides_nothing(here, capsys):
    text = write_text(here)
    assert train_here("--manual-config", "--backend", "cpu", "--input_file", text) == 2
    err = capsys.readouterr().err
    assert "model.d_model" in err and "train.total_steps" in err


def test_the_first_line_comes_before_a_framework_is_imported(here):
    for name in ("torch", "mlx"):  # stand-ins that tell when they are imported
        (here / "shadow" / name).mkdir(parents=True)
        (here / "shadow" / name / "__init__.py").write_text(
            "import os\nos.write(1, b'a framework\\n')\nos._exit(9)\n"
        )
    env = {**os.environ, "PYTHONPATH": str(here / "shadow")}
    arguments = ["--input_file", write_text(here), "--backend", "cpu", *TINY]
    command = [sys.executable, str(PROJECT_ROOT / "train.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    lines = done.stdout.splitlines()
    assert "pippin" in lines[0] and lines[-1] == "a framework"


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_finishes_the_step_saves_and_leaves(here, number, code, word):
    text = write_text(here)
    process = train_process(
        "--input_file", text, "--backend", "cpu", *TINY, "train.total_steps=1000000", cwd=here
    )
    log = here / "checkpoints" / "words-1" / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size > 500):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "stopping after step" in out and ("Ctrl-C" in out) == (number == signal.SIGINT)
    assert word in out and "saved" in out and "--resume" in out and "Traceback" not in err
    step = rows(here / "checkpoints" / "words-1")[-1]["step"]
    assert (here / "checkpoints" / "words-1" / f"step_{step:06d}.pt").is_file()


@pytest.mark.parametrize("during", ["_evaluate", "_save"])
def test_a_signal_during_validation_or_saving_waits_for_no_other_step(
    here, capsys, monkeypatch, during
):
    real = getattr(Loop, during)

    def signalled(self, *args):
        if self.r.state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        real(self, *args)

    monkeypatch.setattr(Loop, during, signalled)
    text = write_text(here)
    every = ("train.eval_interval=2", "train.ckpt_interval=4")
    code = train_here("--input_file", text, "--backend", "cpu", "--max-steps", 12, *TINY, *every)
    assert code == 143
    run = here / "checkpoints" / "words-1"
    assert max(run.glob("step_*.pt")).name == "step_000004.pt"
    assert rows(run)[-1]["step"] == 4
    out = capsys.readouterr().out
    assert "python train.py --resume checkpoints/words-1" in out
    assert "stopping after step 4, " in out and "at step 4 of 12 by SIGTERM" in out
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_here("--resume", "checkpoints/words-1") == 0
    assert [r["step"] for r in rows(run)] == list(range(1, 13))


def test_the_time_of_a_step_is_measured_not_made_of_windows(here):
    """Where rows are documents and mostly padding, tokens a second times seconds is tokens a step."""
    text = here / "docs.jsonl"
    lines = [json.dumps({"text": "abc " * (1 + i % 5)}) for i in range(300)]
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    args = (*start(here), "--save-dir", "checkpoints/d", "data.sampling=document")
    assert train_here(*args, "--input_file", text) == 0
    found = rows(here / "checkpoints" / "d")
    for before, row in itertools.pairwise(found[1:]):
        tokens = row["tokens_processed"] - before["tokens_processed"]
        assert row["throughput_tokens_per_sec"] * row["step_time_sec"] == pytest.approx(tokens)


def test_rows_for_the_clock_are_shown_and_change_nothing_of_the_log(here, capsys, monkeypatch):
    """Steps that are not logged have a row where it was silent for long, and only in the terminal."""
    args = (*start(here), "train.total_steps=19", "train.log_interval=15")
    seen = {}
    for name, silent in (("a", False), ("b", True)):
        monkeypatch.setattr(Console, "wants_plain_row", lambda self, step_s, x=silent: x)
        assert train_here(*args, "--save-dir", f"checkpoints/{name}") == 0
        out = capsys.readouterr().out.splitlines()
        found = {int(w[0]): float(w[1]) for x in out if (w := x.split()) and w[0].isdigit()}
        seen[name] = found
    assert losses(here / "checkpoints" / "a") == losses(here / "checkpoints" / "b")
    assert {3, 7, 9} & seen["a"].keys() == set() and set(range(1, 20)) == seen["b"].keys()
    assert seen["a"].items() <= seen["b"].items()  # averages of logged steps are the same
