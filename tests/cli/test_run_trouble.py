"""Trouble in the middle of a run: it is told, the run is saved, and what can go on goes on.

Run: python -m pytest tests/cli/test_run_trouble.py
"""

import errno
import json
import math
import shlex
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

import backends
from backends.torch_common.backend import TorchBackend
from core.checkpoint import list_checkpoints
from core.data.sampling.loader import EvalBatches, TrainLoader
from core.errors import PippinError
from core.inference import evaluate as evaluation
from core.training import runlog, summary
from core.training.console import Console
from core.training.schedule import step_hyper
from tests.cli.runs import TINY, losses, rows, start, train_here, train_process


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def meta_of(path):
    ckpt = backends.open_checkpoint(path)
    try:
        return ckpt.meta
    finally:
        ckpt.close()


def poison(monkeypatch, steps):
    """Make these steps not finite."""

    def poisoned(step, train, normalizer):
        return step_hyper(step, train, math.nan if step in steps else normalizer)

    monkeypatch.setattr("core.training.loop.step_hyper", poisoned)


def test_a_last_step_that_is_not_finite_does_not_overshoot(here, capsys, monkeypatch):
    poison(monkeypatch, {5, 6})
    assert train_here(*start(here, "train.max_skipped_steps=4")) == 0
    run = here / "checkpoints" / "words-1"
    assert [r["step"] for r in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert list_checkpoints(run)[0].name == "step_000006.pt"
    assert " done     6 steps" in capsys.readouterr().out
    assert meta_of(run / "step_000006.pt").tokens_seen == rows(run)[-1]["tokens_processed"]


def test_a_stop_at_a_skipped_step_goes_on_as_if_there_had_been_none(here, monkeypatch):
    poison(monkeypatch, {3})
    assert train_here(*start(here), "--save-dir", "a") == 0
    assert train_here(*start(here), "--save-dir", "b", "--max-steps", 3) == 0
    assert train_here("--resume", "b") == 0
    assert losses(here / "a") == losses(here / "b")
    ends = [meta_of(here / n / "step_000006.pt") for n in "ab"]
    assert ends[0].backend_state == ends[1].backend_state
    assert ends[0].tokens_seen == ends[1].tokens_seen


def test_steps_taken_back_are_counted_anew_and_never_before_the_start(here, capsys, monkeypatch):
    poison(monkeypatch, {3, 4, 5, 6, 7, 8, 9})
    # No checkpoint lies at step 2 yet, so the one that is taken back to is written, counters and all.
    longer = ("train.total_steps=12", "train.max_skipped_steps=4", "train.ckpt_interval=5")
    assert train_here(*start(here, *longer, "--save-dir", "r")) == 1
    first = meta_of(list_checkpoints(here / "r")[0])
    assert (first.step, first.tokens_seen) == (2, rows(here / "r")[1]["tokens_processed"])
    for _ in range(2):  # each time four steps are tried, and the same step is the last good one
        assert train_here("--resume", "r") == 1
        assert [r["step"] for r in rows(here / "r")] == [1, 2, 3, 4, 5]
        again = meta_of(list_checkpoints(here / "r")[0])
        assert (again.step, again.tokens_seen) == (2, first.tokens_seen)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    capsys.readouterr()
    assert train_here("--resume", "r") == 0
    assert "not finite" not in capsys.readouterr().out.split("notes")[0]
    assert (
        meta_of(here / "r" / "step_000012.pt").tokens_seen
        == rows(here / "r")[-1]["tokens_processed"]
    )


def test_skipped_steps_are_not_told_again_by_a_resume(here, capsys, monkeypatch):
    poison(monkeypatch, {2})
    assert train_here(*start(here, "--max-steps", 4)) == 0
    assert "skipped (1 so far)" in capsys.readouterr().out
    assert train_here("--resume", "checkpoints/words-1") == 0
    assert "so far" not in capsys.readouterr().out


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_is_told_and_saved_over(here, capsys, monkeypatch, bad):
    real, calls = evaluation.evaluate, []

    def broken(*args, **kwargs):
        calls.append(1)
        found = real(*args, **kwargs)
        return replace(found, loss=bad) if len(calls) in (1, 3) else found

    monkeypatch.setattr("core.training.loop.evaluate", broken)
    assert train_here(*start(here)) == 0
    out = capsys.readouterr().out
    assert out.count("the validation loss is not finite") == 2
    run = here / "checkpoints" / "words-1"
    loop = meta_of(run / "step_000006.pt").loop
    assert loop["best_step"] == loop["saved_best_step"] == 4 and math.isfinite(
        loop["best_val_loss"]
    )
    assert meta_of(run / "step_000002.pt").loop["best_val_loss"] is None
    assert meta_of(run / "best.pt").step == 4


def test_the_best_loss_and_its_step_belong_together(here):
    args = start(here, "train.eval_interval=1", "train.ckpt_interval=4")
    assert train_here(*args) == 0
    run = here / "checkpoints" / "words-1"
    vals = {r["step"]: r["val_loss"] for r in rows(run) if "val_loss" in r}
    for path in list_checkpoints(run):
        loop, step = meta_of(path).loop, meta_of(path).step
        seen = {s: v for s, v in vals.items() if s <= step}
        assert loop["best_val_loss"] == min(seen.values()) == vals[loop["best_step"]]
        assert loop["saved_best_val_loss"] == vals[loop["saved_best_step"]]


def test_a_short_context_gets_short_samples(here, capsys):
    more = ("train.samples=3", "train.sample_tokens=4", "model.max_seq_len=24")
    args = [*start(here, *more)]
    del args[:2]  # the stories, whose prompts are longer than 24 bytes
    assert train_here(*args, "data.corpus_bytes=100000") == 0
    out = capsys.readouterr().out
    run = here / "checkpoints" / "stories-1"
    found = [json.loads(x) for x in (run / "samples" / "samples.jsonl").read_text().splitlines()]
    assert found and all(0 < len(row["prompt"]) <= 12 for row in found)
    assert "samples were left out" not in out and " done     6 steps" in out


def test_samples_and_an_exam_that_fail_are_warnings(here, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("core.training.samples.generate", full)
    monkeypatch.setattr(summary, "probe_skills", out_of_memory)
    args = [*start(here, "train.samples=2")]
    del args[:2]
    assert train_here(*args, "data.corpus_bytes=100000") == 0
    out = capsys.readouterr().out
    assert "the samples were left out" in out and "the exam could not be made" in out
    assert "python generate.py" in out


def test_a_full_disk_for_the_log_saves_the_step_first(here, capsys, monkeypatch):
    real = runlog.RunLog.row

    def full(self, step, values):
        if step == 3:
            with runlog.writing(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        real(self, step, values)

    monkeypatch.setattr(runlog.RunLog, "row", full)
    assert train_here(*start(here)) == 2
    err = capsys.readouterr().err
    assert err.startswith("P312") and "No space left" in err and "step_000003.pt" in err
    assert "--resume checkpoints/words-1" in err and not (here / "pippin-error.log").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_here("--resume", "checkpoints/words-1") == 0


def test_a_full_disk_for_a_checkpoint_names_the_one_before(here, capsys, monkeypatch):
    def full(path):
        if path.name.startswith("step_000004"):
            raise PippinError("P307", f"{path} could not be written.", remedy="free space")

    real = TorchBackend.save
    monkeypatch.setattr(
        TorchBackend, "save", lambda self, path, *a, **k: full(path) or real(self, path, *a, **k)
    )
    assert train_here(*start(here)) == 2
    err = capsys.readouterr().err
    assert err.startswith("P307") and "saved: checkpoints/words-1/step_000002.pt" in err
    assert "go on with python train.py --resume checkpoints/words-1" in err


def test_a_slow_first_step_counts_as_a_warning(here, capsys, monkeypatch):
    monkeypatch.setattr("core.training.console.SLOW_STEP_S", 0.01)
    told = threading.Event()
    healthy, warn = Console.slow_step, Console.warn

    @contextmanager
    def slow(self, explain):
        with healthy(self, explain):
            assert told.wait(60)
            yield

    def telling(self, text):
        warn(self, text)
        told.set()

    monkeypatch.setattr(Console, "slow_step", slow)
    monkeypatch.setattr(Console, "warn", telling)
    assert train_here(*start(here)) == 0
    done = json.loads((here / "checkpoints/words-1/logs" / summary.SUMMARY_NAME).read_text())
    assert any("still in the first step" in text for text in done["warnings"])


def test_a_full_disk_for_the_state_beside_a_checkpoint_is_no_fault(here, capsys, monkeypatch):
    real = runlog.replace_file

    def full(path, content):
        if path.name == "training_state.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(runlog, "replace_file", full)
    assert train_here(*start(here)) == 2
    err = capsys.readouterr().err
    assert err.startswith("P312") and "saved: checkpoints/words-1/step_000002.pt" in err


@pytest.mark.parametrize("what", ["loss_plot", "report", "write_json"])
def test_a_finished_run_whose_report_fails_is_finished(here, capsys, monkeypatch, what):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(summary, what, full)
    assert train_here(*start(here)) == 0
    out = capsys.readouterr().out
    assert "could not be made" in out and "No space left" in out and "python generate.py" in out


def test_ctrl_c_in_the_exam_says_that_the_run_is_saved(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "loss_plot", interrupted)
    assert train_here(*start(here)) == 130
    captured = capsys.readouterr()
    assert "the run is saved: checkpoints/words-1/step_000006.pt" in captured.out
    assert "nothing was saved" not in captured.err


@pytest.mark.parametrize("mode", [(), ("--json",)])
def test_a_reader_that_goes_away_does_not_end_the_run(here, mode):
    args = start(here, "train.total_steps=40", "train.log_interval=1", *mode)
    process = train_process(*args, cwd=here)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 0, err
    assert "Traceback" not in err and "Exception ignored" not in err
    assert (here / "checkpoints" / "words-1" / "step_000040.pt").is_file()
    assert (here / "checkpoints" / "words-1" / "training_report.md").is_file()


def test_many_signals_at_once_stop_the_run_in_order(here):
    args = start(here, "train.total_steps=1000000")
    process = train_process(*args, cwd=here)
    log = here / "checkpoints" / "words-1" / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size > 500):
        time.sleep(0.05)
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "SIGTERM: saving step" in out and "Traceback" not in err and "P001" not in err


def test_the_remedy_of_a_run_that_diverges_halves_every_rate(here, capsys, monkeypatch):
    poison(monkeypatch, {3, 4, 5, 6})
    assert train_here(*start(here, "train.max_skipped_steps=2", "--save-dir", "my run")) == 1
    err = capsys.readouterr().err
    before = json.loads((here / "my run" / "config.json").read_text())["train"]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    command = shlex.split(next(x for x in err.splitlines() if "try: " in x).partition("try: ")[2])
    assert train_here(*command[2:]) == 0
    after = json.loads((here / "my run" / "config.json").read_text())["train"]
    assert "same curve" not in capsys.readouterr().out
    for name in ("lr", "min_lr", "lr_matrix", "lr_embed", "lr_head", "lr_vector"):
        assert after[name] == pytest.approx(before[name] / 2), name


def test_a_shard_that_cannot_be_read_ends_a_run_with_its_last_step_saved(here, capsys, monkeypatch):
    real = TrainLoader.__next__

    def broken(loader):
        batch = real(loader)
        if batch.step == 4:
            raise PippinError("P204", "a token id is outside the vocabulary.")
        return batch

    monkeypatch.setattr(TrainLoader, "__next__", broken)
    assert train_here(*start(here, "train.ckpt_interval=6", "--save-dir", "a")) == 2
    said = capsys.readouterr().err
    assert "P204" in said and "step_000003.pt; go on with python" in said
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_here("--resume", "a") == 0
    assert train_here(*start(here, "train.ckpt_interval=6", "--save-dir", "b")) == 0
    assert losses(here / "a") == losses(here / "b")


def write_chats(folder, questions):
    """Chats of a question of so many words and an answer of one."""
    turns = [
        [
            {"role": "user", "content": f"{i} " + "word " * n},
            {"role": "assistant", "content": "yes"},
        ]
        for i, n in enumerate(questions)
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))
    return path


CHATS = (*TINY, "data.seq_len=32", "train.micro_batch_size=1", "train.total_steps=12")


def test_steps_and_batches_without_an_answer_are_no_fault(here, capsys):
    """Where a question is longer than the context, none of a row's targets is trained on."""
    chats = write_chats(here, [40, 40, 1] * 30)
    args = ("--input_file", chats, "--backend", "cpu", *CHATS)
    assert train_here(*args, "--save-dir", "r", "train.max_skipped_steps=2") == 0
    out = capsys.readouterr().out
    assert "no target of its rows is trained on" in out and "nan" not in out
    found = rows(here / "r")
    seen = [0, *(r["tokens_processed"] for r in found)]
    empty = [r for r, before in zip(found, seen) if r["tokens_processed"] == before]
    assert 2 < len(empty) < len(found)
    assert all(r.get("loss") is None and r["grad_norm"] == 0 for r in empty)
    assert all(r["skipped_total"] == 0 for r in found)
    told = json.loads((here / "r" / "logs" / "final_training_summary.json").read_text())
    assert told["final_loss"] > 1


def test_a_validation_without_an_answer_is_told_before_the_run(here, capsys, monkeypatch):
    real = EvalBatches.__iter__

    def untrained(batches):
        for batch in real(batches):
            yield replace(batch, weights=np.zeros_like(batch.weights))

    monkeypatch.setattr(EvalBatches, "__iter__", untrained)
    assert train_here(*start(here), "--save-dir", "r") == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert not (here / "r" / "logs" / "metrics.jsonl").exists()


def summary_of(run):
    return json.loads((run / "logs" / summary.SUMMARY_NAME).read_text())


def test_a_run_that_fails_has_a_summary_of_its_end_and_none_of_an_earlier_one(
    here, capsys, monkeypatch
):
    run = here / "checkpoints" / "words-1"
    assert train_here(*start(here)) == 0
    assert (summary_of(run)["reason"], summary_of(run)["total_steps"]) == ("done", 6)
    poison(monkeypatch, {9, 10})
    longer = ("--resume", run, "train.total_steps=12", "train.max_skipped_steps=2")
    assert train_here(*longer) == 1
    told = summary_of(run)
    assert (told["reason"], told["total_steps"], told["planned_steps"]) == ("not finite", 8, 12)
    assert "| reason | not finite |" in (run / "training_report.md").read_text()

    def refuses(log, step, values):
        raise PippinError("P312", "metrics.jsonl cannot be written: no space left.")

    monkeypatch.setattr(runlog.RunLog, "row", refuses)
    monkeypatch.setattr("core.training.loop.step_hyper", step_hyper)
    assert train_here(*longer) == 2
    told = summary_of(run)
    assert (told["reason"], told["error"], told["total_steps"]) == ("failed", "P312", 9)
    capsys.readouterr()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_here("--resume", run) == 0
    told = summary_of(run)
    assert (told["reason"], told.get("error"), told["total_steps"]) == ("done", None, 12)
    assert told["peak_memory_bytes"] > 1e7


def test_a_second_ctrl_c_names_what_was_saved_last(here, capsys, monkeypatch):
    real = TorchBackend.train_step

    def interrupted(backend, micro, hyper):
        if hyper.step == 4:
            raise KeyboardInterrupt
        return real(backend, micro, hyper)

    monkeypatch.setattr(TorchBackend, "train_step", interrupted)
    assert train_here(*start(here)) == 130
    said = capsys.readouterr()
    assert "last saved: checkpoints/words-1/step_000002.pt" in said.out
    assert "python train.py --resume checkpoints/words-1" in said.out
    assert "aborted" in said.err
