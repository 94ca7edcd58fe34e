"""A run that was stopped or killed goes on as if nothing had happened, bit for bit.

Run: python -m pytest tests/resume/test_resume.py
"""

import math
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest

from core.checkpoint import list_checkpoints
from core.training.execute import resumed
from core.training.resume import ResumePoint
from core.training.schedule import step_hyper
from tests.cli.runs import (
    TINY,
    assert_same_checkpoint,
    losses,
    rows,
    train_here,
    train_process,
    write_text,
)
from tests.conftest import BACKENDS

SUFFIX = {"cpu": ".pt", "mlx": ".npz"}
# Dropout on, two micro-batches, Muon with momentum warm-up, validation and saves on the way.
SETTINGS = (
    *TINY,
    "model.dropout=0.1",
    "train.grad_accum_steps=2",
    "train.total_steps=12",
    "train.ckpt_interval=4",
    "train.eval_interval=3",
    "train.ckpt_keep=9",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def straight(here, backend, *more):
    text = write_text(here)
    args = ("--input_file", text, "--backend", backend, *SETTINGS, *more)
    assert train_here(*args, "--save-dir", "checkpoints/straight") == 0
    return args, here / "checkpoints" / "straight"


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err


@pytest.mark.parametrize("backend", BACKENDS)
def test_stopped_and_resumed_equals_uninterrupted(here, backend):
    args, whole = straight(here, backend)
    assert train_here(*args, "--save-dir", "checkpoints/parts", "--max-steps", 5) == 0
    assert train_here("--resume", "checkpoints/parts") == 0
    parts = here / "checkpoints" / "parts"
    assert losses(parts) == losses(whole)
    name = f"step_000012{SUFFIX[backend]}"
    assert_same_checkpoint(whole / name, parts / name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_and_resumed_equals_uninterrupted(here, backend):
    """Each part in a process of its own, as a user runs it: with the same BLAS under MLX."""
    text = write_text(here)
    lengths = ("train.total_steps=60", "train.ckpt_interval=10")
    args = ("--input_file", text, "--backend", backend, *SETTINGS, *lengths)
    whole = here / "checkpoints" / "straight"
    finish(train_process(*args, "--save-dir", whole, cwd=here))
    process = train_process(*args, "--save-dir", "checkpoints/killed", cwd=here)
    killed = here / "checkpoints" / "killed"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if list(killed.glob("step_000020*")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    finish(train_process("--resume", killed, cwd=here))
    assert losses(killed) == losses(whole)
    assert [r["step"] for r in rows(killed)] == list(range(1, 61))
    name = f"step_000060{SUFFIX[backend]}"
    assert_same_checkpoint(whole / name, killed / name)


def test_resume_takes_the_newest_that_is_intact_and_says_what_it_skipped(here, capsys):
    _, whole = straight(here, "cpu")
    newest = whole / "step_000012.pt"
    expected = shutil.copy(newest, here / "expected.pt")
    newest.write_bytes(newest.read_bytes()[:-2000])
    (whole / "best.pt").unlink()
    assert train_here("--resume", whole) == 0
    out = capsys.readouterr().out
    assert "step_000012.pt was skipped" in out and "resumed    step_000008.pt" in out
    assert re.search(r"at step 8 of 12 \(straight, cpu, saved \d+ \w+ ago\) · same data", out), out
    assert_same_checkpoint(here / "expected.pt", newest)
    assert expected is not None


def test_resume_refuses_another_experiment_and_shows_both_values(here, capsys):
    _, whole = straight(here, "cpu")
    before = {p.name: p.stat().st_mtime_ns for p in whole.iterdir() if p.is_file()}
    assert train_here("--resume", whole, "model.d_model=32", "train.seed=5") == 2
    err = capsys.readouterr().err
    assert "P302" in err and "has 16" in err and "asks for 32" in err and "train.seed" in err
    assert {p.name: p.stat().st_mtime_ns for p in whole.iterdir() if p.is_file()} == before


def test_resume_refuses_a_changed_text(here, capsys):
    _, whole = straight(here, "cpu")
    with (here / "words.txt").open("a") as handle:
        handle.write("and one more line\n")
    assert train_here("--resume", whole) == 2
    assert "the text has changed" in capsys.readouterr().err


def test_an_earlier_checkpoint_is_refused_while_later_ones_lie_there(here, capsys):
    _, whole = straight(here, "cpu")
    assert train_here("--resume", whole / "step_000004.pt") == 2
    assert "--overwrite" in capsys.readouterr().err
    whole_losses = losses(whole)
    assert train_here("--resume", whole / "step_000004.pt", "--overwrite") == 0
    assert losses(whole) == whole_losses


def test_a_longer_run_goes_on_with_a_new_length(here):
    _, whole = straight(here, "cpu")
    assert train_here("--resume", whole, "train.total_steps=15") == 0
    assert [r["step"] for r in rows(whole)] == list(range(1, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_that_are_not_finite_stop_the_run_with_its_last_good_state(
    here, capsys, monkeypatch, backend
):
    args, whole = straight(here, backend)

    def poisoned(step, train, normalizer):
        return step_hyper(step, train, math.nan if step > 7 else normalizer)

    monkeypatch.setattr("core.training.loop.step_hyper", poisoned)
    ill = here / "checkpoints" / "ill"
    assert train_here(*args, "--save-dir", ill, "train.max_skipped_steps=3") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("P401") and "train.lr=" in captured.err
    assert "not finite, skipped" in captured.out
    newest = list_checkpoints(ill)[0]
    assert newest.name.startswith("step_000007") and str(newest.name) in captured.err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_here("--resume", ill) == 0  # the trouble is gone: the same curve as without it
    assert losses(ill) == losses(whole)


def averaged(found, beta=0.9):
    """The moving average of losses, its bias taken out as in Adam, in a formula of its own."""
    total = sum((1 - beta) * beta**i * x for i, x in enumerate(reversed(found)))
    return total / (1 - beta ** len(found))


def test_the_average_of_the_summary_is_that_of_an_uninterrupted_run(here, capsys):
    """Step 7 is logged only because the run stopped there; the average does not know it."""
    every = ("train.log_interval=2", "train.eval_interval=4", "train.total_steps=24")

    def figure():
        return re.search(r" loss +train (\S+)", capsys.readouterr().out)[1]

    args, whole = straight(here, "cpu", *every)
    expected = figure()
    assert float(expected) == pytest.approx(averaged([x for _, x in losses(whole)]), abs=6e-4)
    assert train_here(*args, "--save-dir", "checkpoints/parts", "--max-steps", 7) == 0
    parts = here / "checkpoints" / "parts"
    assert losses(parts)[-1][0] == 7 and figure() != expected
    assert train_here("--resume", parts) == 0
    assert figure() == expected
    assert [x for x in losses(parts) if x[0] != 7] == losses(whole)


def test_the_line_of_a_resumed_run_says_source_step_and_age(tmp_path):
    path = tmp_path / "stories-1" / "step_000617.npz"
    meta = SimpleNamespace(step=617, backend={"name": "mlx"})
    start = ResumePoint(path, path.parent, meta)
    line = "step_000617.npz at step 617 of 1,400 (stories-1, mlx, saved 2 h 0 m ago)"
    assert resumed(start, 1400, 7200) == line
    alone = ResumePoint(path, None, meta)
    assert resumed(alone, 1400, 12) == "step_000617.npz at step 617 of 1,400 (mlx, saved 12 s ago)"
