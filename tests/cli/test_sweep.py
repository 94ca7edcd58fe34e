"""Several --lr: a run each, a table and a picture, interruptible; and the names of a run.

Run: python -m pytest tests/cli/test_sweep.py
"""

import json

import pytest

from core.training.loop import Loop
from core.training.run import Outcome
from core.training.session import Session
from tests.cli.runs import TINY, rows, train_here, write_text

LENGTH = ("train.total_steps=4", "train.ckpt_interval=2", "train.eval_interval=2")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(here, *lrs, more=LENGTH):
    text = write_text(here)
    flags = [part for lr in lrs for part in ("--lr", lr)]
    return ("--input_file", text.name, "--backend", "cpu", *flags, *TINY, *more)


def record(here, base="quickstart"):
    return json.loads((here / "checkpoints" / f"{base}-lr-sweep" / "sweep.json").read_text())[
        "runs"
    ]


def config(here, lr, base="quickstart"):
    return json.loads((here / "checkpoints" / f"{base}-lr-{lr}" / "config.json").read_text())


def test_a_sweep_trains_each_rate_and_runs_differ_in_rates_alone(here, capsys):
    assert train_here(*arguments(here, "1e-2", "0.001")) == 0
    out = capsys.readouterr().out
    runs = record(here)
    assert {r["state"] for r in runs.values()} == {"finished"} and set(runs) == {"0.01", "0.001"}
    for lr, run in runs.items():
        last = [r["val_loss"] for r in rows(here / run["folder"]) if "val_loss" in r][-1]
        assert run["final_val_loss"] == last and lr in out
    best = min(runs, key=lambda lr: runs[lr]["final_val_loss"])
    assert f"{runs[best]['folder']}   best" in out and "an end of the row" in out
    assert (here / "checkpoints" / "quickstart-lr-sweep" / "sweep.png").stat().st_size > 5000
    one, other = config(here, "0.01"), config(here, "0.001")
    differ = {f"{s}.{k}" for s in one for k in one[s] if one[s][k] != other[s][k]}
    assert {"train.lr", "train.min_lr", "train.save_dir", "train.lr_matrix"} <= differ
    assert all(k.startswith("train.lr") or k in ("train.min_lr", "train.save_dir") for k in differ)


def test_what_the_machine_decides_is_decided_once(here, capsys, monkeypatch):
    """The speed differs from run to run; the length must not."""
    speeds = iter((3_000.0, 9_000.0))
    monkeypatch.setattr(Session, "_measure", lambda self, *a, **k: next(speeds))
    assert train_here(*arguments(here, "1e-2", "1e-3", more=("train.minutes=0.01",))) == 0
    one, other = config(here, "0.01")["train"], config(here, "0.001")["train"]
    for key in ("total_steps", "warmup_steps", "eval_interval", "micro_batch_size"):
        assert one[key] == other[key], key
    assert next(speeds) == 9_000.0


def test_a_time_budget_decides_the_length_of_all_runs_once(here, capsys, monkeypatch):
    """The file states 4 steps and gives way; the second run is not measured."""
    speeds = iter((100.0, 9_000.0))
    monkeypatch.setattr(Session, "_measure", lambda self, *a, **k: next(speeds))
    (here / "four.yaml").write_text("train: {total_steps: 4}\n")
    more = ("--config", "four.yaml", "--time-budget", "15s")
    assert train_here(*arguments(here, "1e-2", "1e-3", more=more)) == 0
    one, other = (config(here, lr, "four")["train"] for lr in ("0.01", "0.001"))
    assert one["total_steps"] == other["total_steps"] > 4
    assert one["minutes"] == other["minutes"] == 0.25
    assert next(speeds) == 9_000.0


def test_an_interrupted_sweep_goes_on_where_it_was(here, capsys, monkeypatch):
    args = arguments(here, "1e-2", "1e-3")
    real, calls = Loop.run, []

    def interrupted(self):
        calls.append(self)
        outcome = real(self)
        if len(calls) == 1:
            return outcome
        return Outcome(**{**vars(outcome), "reason": "interrupted"})

    monkeypatch.setattr(Loop, "run", interrupted)
    # The second run is cut short by its own --max-steps and told to have been interrupted.
    original = Session.run

    def second_is_short(self):
        if "0.001" in str(self.options.save_dir):
            object.__setattr__(self.options, "max_steps", 2)
        return original(self)

    monkeypatch.setattr(Session, "run", second_is_short)
    assert train_here(*args) == 130
    out = capsys.readouterr().out
    assert "1 of 2 runs are finished" in out and "go on: python train.py" in out
    assert record(here)["0.001"]["state"] == "missing"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    before = (here / "checkpoints" / "quickstart-lr-0.01" / "step_000004.pt").read_bytes()
    assert train_here(*args) == 0
    out = capsys.readouterr().out
    assert "--lr 0.01 is finished" in out and "step_000002.pt at step 2 of 4" in out
    assert (here / "checkpoints" / "quickstart-lr-0.01" / "step_000004.pt").read_bytes() == before
    assert [r["step"] for r in rows(here / "checkpoints" / "quickstart-lr-0.001")] == [1, 2, 3, 4]
    assert {r["state"] for r in record(here).values()} == {"finished"}
    assert train_here(*args) == 0  # once more: nothing is trained
    assert "step     loss" not in capsys.readouterr().out


def test_a_rate_that_diverges_ends_its_run_and_not_the_sweep(here, capsys, monkeypatch):
    from core.errors import PippinError

    original = Session.run

    def run(self):
        if "-lr-3" in str(self.options.save_dir):
            raise PippinError("P401", "the loss was not finite.")
        return original(self)

    monkeypatch.setattr(Session, "run", run)
    assert train_here(*arguments(here, "3", "1e-3")) == 0
    out = capsys.readouterr().out
    assert record(here)["3"]["state"] == "not finite" and "not finite" in out
    assert record(here)["0.001"]["state"] == "finished"
    assert train_here(*arguments(here, "3", "1e-3")) == 0
    assert "it is not tried again" in capsys.readouterr().out


def test_another_sweep_or_run_in_its_folders_is_refused(here, capsys):
    assert train_here(*arguments(here, "1e-2", "1e-3")) == 0
    assert train_here(*arguments(here, "1e-2", "1e-3", more=("train.total_steps=5",))) == 2
    err = capsys.readouterr().err
    assert err.startswith("P311") and "sweep of other settings" in err and "overrides" in err
    assert train_here(*arguments(here, "0.05", "0.06"), "--model_name", "mine", "--dry-run") == 0
    assert not (here / "checkpoints" / "mine-lr-sweep").exists()


REFUSED = {
    "warm-up": (("train.warmup_steps=50",), "P010"),
    "depth": (("--depth", "0"), "P012"),
    "stories": (("--num-documents", "0"), "P012"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sweep_that_never_started_leaves_nothing(here, capsys, name):
    more, code = REFUSED[name]
    assert train_here(*arguments(here, "1e-2", "1e-3"), *more) == 2
    assert capsys.readouterr().err.startswith(code) and not (here / "checkpoints").exists()


def test_a_sweep_that_never_started_does_not_block_the_corrected_command(here, capsys):
    folder = here / "checkpoints" / "quickstart-lr-sweep"
    folder.mkdir(parents=True)
    stopped = {"settings": {"overrides": ["train.warmup_steps=50"]}, "runs": {}}
    (folder / "sweep.json").write_text(json.dumps(stopped))
    assert train_here(*arguments(here, "1e-2", "1e-3")) == 0
    assert {r["state"] for r in record(here).values()} == {"finished"}


def test_a_refused_overwrite_keeps_the_sweep_that_was_there(here, capsys):
    args = arguments(here, "1e-2", "1e-3")
    assert train_here(*args) == 0
    path = here / "checkpoints" / "quickstart-lr-sweep" / "sweep.json"
    before = path.read_bytes()
    assert train_here(*args, "--overwrite", "train.warmup_steps=50") == 2
    assert path.read_bytes() == before
    capsys.readouterr()
    assert train_here(*args) == 0
    assert "--lr 0.01 is finished" in capsys.readouterr().out


def test_each_run_has_the_rate_that_was_asked_for(here, capsys):
    """The folder's name has six digits; the run has all of them."""
    assert train_here(*arguments(here, "0.0123456789", "1e-3")) == 0
    assert config(here, "0.0123457")["train"]["lr"] == 0.0123456789


BAD = {
    "fixed rate": (("--lr", "0.1", "--lr", "0.2", "train.lr=0.5"), "P012", "train.lr=0.5"),
    "foreign rate": (
        ("--lr", "0.1", "--lr", "0.2", "--learning-rate", "0.1"),
        "P012",
        "--learning_rate 0.1",
    ),
    "one rate, two values": (("--lr", "0.02", "train.lr=0.5"), "P012", "--lr 0.02"),
    "six digits": (("--lr", "0.01", "--lr", "0.01000000001"), "P012", "twice"),
    "twice": (("--lr", "0.1", "--lr", "1e-1"), "P012", "twice"),
    "no number": (("--lr", "0.1", "--lr", "fast"), "P010", "fast"),
    "resume": (("--lr", "0.1", "--lr", "0.2", "--resume", "x"), "P012", "sweep"),
    "name": (("--model_name", "../a"), "P012", "folder's name"),
    "two folders": (("--model_name", "a", "--save-dir", "b"), "P012", "leave out one"),
    "two runs": (("--model_name", "a", "--resume", "b"), "P012", "leave out one"),
    "two files": (("--config", "tiny", "--config_file", "small"), "P012", "twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_flags_that_say_two_things_are_refused_before_anything(here, capsys, name):
    args, code, words = BAD[name]
    assert train_here("--backend", "cpu", *args) == 2
    err = capsys.readouterr().err
    assert err.startswith(code) and words in err and not (here / "checkpoints").exists()


def test_a_named_run_goes_on_and_says_so(here, capsys):
    args = arguments(here)
    assert train_here(*args, "--model_name", "dante") == 0
    assert "a new run in checkpoints/dante" in capsys.readouterr().out
    assert train_here("--model_name", "dante", "--max_iters", "6") == 0
    out = capsys.readouterr().out
    assert "holds a run, so it goes on" in out and "step_000004.pt at step 4 of 6" in out
    assert (here / "checkpoints" / "dante" / "step_000006.pt").is_file()
    # The architecture stands: asking for another shows both.
    assert train_here("--config_file", "configs/tiny.json", "--model_name", "dante") == 2
    err = capsys.readouterr().err
    assert err.startswith("P302") and "the checkpoint has 16" in err and "asks for 192" in err
    assert train_here("--model_name", "dante", "--n_layer", "3") == 2
    assert "model.n_layers: the checkpoint has 2" in capsys.readouterr().err
    assert train_here(*args, "--model_name", "dante", "--overwrite") == 0
    assert not (here / "checkpoints" / "dante" / "step_000006.pt").exists()


def test_resume_from_names_a_checkpoint(here, capsys):
    assert train_here(*arguments(here), "--model_name", "a") == 0
    path = "checkpoints/a/step_000004.pt"
    assert train_here("--resume-from", path, "train.total_steps=6") == 0
    assert "step_000004.pt at step 4 of 6" in capsys.readouterr().out


def test_a_vocabulary_that_does_not_fit_is_told(here, capsys):
    args = arguments(here)
    assert train_here(*args, "model.vocab_size=200", "--dry-run") == 2
    err = capsys.readouterr().err
    assert err.startswith("P010") and "below the 261 ids" in err
    assert train_here(*args, "model.vocab_size=2000", "--dry-run") == 0
    assert "1,739 rows of the embedding are never used" in capsys.readouterr().out
