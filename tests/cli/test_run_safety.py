"""What a command may remove, refuse and leave behind: nothing is lost to a flag or a refusal.

Run: python -m pytest tests/cli/test_run_safety.py
"""

import json
import math
import shlex

import numpy as np
import pytest

import backends
from core.checkpoint import list_checkpoints
from core.errors import PippinError
from core.training import preflight
from core.training.schedule import step_hyper
from tests.cli.runs import losses, rows, start, train_here


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder):
    """Every file of a folder but the lock, with its content."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def remedy(err):
    """The command that an error offers, as arguments of train.py."""
    line = next(x for x in err.splitlines() if x.strip().startswith("try: "))
    words = shlex.split(line.partition("try: ")[2].partition("   ")[0])
    assert words[:2] == ["python", "train.py"]
    return words[2:]


def broken_preflight(*args, **kwargs):
    raise PippinError("P402", "it sees the future.")


REFUSED = {
    "other experiment": (("model.d_model=32",), 2),
    "print-config": (("--print-config",), 0),
    "dry run": (("--dry-run",), 0),
    "bad key": (("train.lrr=1",), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_overwriting_later_checkpoints_removes_none_before_the_run_starts(here, name):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run)) == 0
    before = everything(run)
    more, code = REFUSED[name]
    assert train_here("--resume", run / "step_000002.pt", "--overwrite", *more) == code
    assert everything(run) == before


def test_overwriting_later_checkpoints_keeps_them_where_the_preflight_fails(here, monkeypatch):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run)) == 0
    before = everything(run)
    monkeypatch.setattr(preflight, "causality", broken_preflight)
    assert train_here("--resume", run / "step_000002.pt", "--overwrite") == 2
    assert train_here(*start(here, "--save-dir", run), "--overwrite") == 2
    assert everything(run) == before


def test_a_run_in_use_keeps_its_later_checkpoints(here, capsys):
    from core.training.runfolder import RunFolder

    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run)) == 0
    before = everything(run)
    with RunFolder(run):
        assert train_here("--resume", run / "step_000002.pt", "--overwrite") == 2
    assert "P310" in capsys.readouterr().err
    assert everything(run) == before


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_a_folder_of_other_origin_is_never_cleared_nor_written_over(here, capsys, flag):
    args = start(here)
    for name in ("logs/mine.log", "plots/mine.png", "samples/a/b.txt", "config.json"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("{}")
    before = everything(here)
    assert train_here(*args, "--save_dir", ".", *flag) == 2
    assert "P311" in capsys.readouterr().err
    after = everything(here)
    assert {k: after[k] for k in before} == before and not (here / "step_000006.pt").exists()


def test_overwrite_leaves_the_users_files_in_a_runs_folders(here):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run)) == 0
    (run / "logs" / "mine.log").write_text("x")
    assert train_here(*start(here, "--save-dir", run), "--overwrite") == 0
    assert (run / "logs" / "mine.log").read_text() == "x"
    assert [r["step"] for r in rows(run)] == list(range(1, 7))


def test_a_folder_with_only_the_best_checkpoint_is_refused(here, capsys):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run)) == 0
    for path in list_checkpoints(run):
        path.unlink()
    capsys.readouterr()
    assert train_here(*start(here, "--save-dir", run)) == 2
    err = capsys.readouterr().err
    assert err.startswith("P311") and "best.pt" in err
    assert train_here("--resume", run / "best.pt", "train.total_steps=8") == 0


def test_after_a_kill_before_the_first_save_the_same_command_starts_with_empty_logs(here):
    run = here / "checkpoints" / "r"
    args = start(here, "--save-dir", run, "train.samples=2", "train.sample_tokens=2")
    assert train_here(*args) == 0
    for path in (*list_checkpoints(run), run / "best.pt"):
        path.unlink()
    assert train_here(*args) == 0
    assert [r["step"] for r in rows(run)] == list(range(1, 7))
    samples = (run / "samples" / "samples.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in samples]
    assert steps == sorted(steps)


def test_a_refusal_after_the_folder_was_made_leaves_none(here, monkeypatch):
    monkeypatch.setattr(preflight, "causality", broken_preflight)
    assert train_here(*start(here)) == 2
    assert not (here / "checkpoints").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_here(*start(here)) == 0
    assert (here / "checkpoints" / "words-1" / "step_000006.pt").is_file()


def test_a_finished_run_is_refused_with_a_remedy_that_works(here, capsys):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run)) == 0
    before = everything(run)
    for more in ((), ("--max-steps", 5000)):
        capsys.readouterr()
        assert train_here("--resume", run, *more) == 2
        err = capsys.readouterr().err
        assert err.startswith("P302") and "train.total_steps=12" in err
    assert everything(run) == before
    assert train_here(*remedy(err)) == 0
    assert [r["step"] for r in rows(run)] == list(range(1, 13))


def test_stopping_before_the_checkpoint_is_refused_with_a_remedy_that_works(here, capsys):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run), "--max-steps", 4) == 0
    capsys.readouterr()
    assert train_here("--resume", run, "--max-steps", 3) == 2
    assert train_here(*remedy(capsys.readouterr().err)) == 0
    assert rows(run)[-1]["step"] == 6


def test_flags_without_effect_on_resume_are_refused_with_a_remedy_that_works(here, capsys):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run), "--max-steps", 4) == 0
    for more, code in ((("--minutes", 20), "P012"), (("--save_dir", "elsewhere"), "P302")):
        capsys.readouterr()
        assert train_here("--resume", run, *more) == 2
        err = capsys.readouterr().err
        assert err.startswith(code), err
        assert not (here / "elsewhere").exists()
        assert train_here(*remedy(err), "--dry-run") == 0
    assert train_here("--resume", run, "--save_dir", run, "--dry-run") == 0


def test_a_checkpoint_outside_a_run_goes_on_in_the_folder_that_is_given(here, capsys, monkeypatch):
    run = here / "checkpoints" / "r"
    poison(monkeypatch, (5, 6))  # no step is better than the best of the first folder
    assert train_here(*start(here, "--save-dir", run), "--max-steps", 4) == 0
    moved = here / "moved.pt"
    moved.write_bytes((run / "step_000004.pt").read_bytes())
    assert train_here("--resume", moved, "--save_dir", here / "mine") == 0
    assert (here / "mine" / "step_000006.pt").is_file()
    assert step_of(here / "mine" / "best.pt") == 6
    assert not (here / "checkpoints" / "moved-1").exists()
    before = everything(run)
    assert train_here("--resume", moved, "--save_dir", run) == 2
    assert "P311" in capsys.readouterr().err and everything(run) == before


def test_manual_config_takes_its_length_from_max_steps(here, capsys):
    assert train_here(*start(here)) == 0
    config = json.loads((here / "checkpoints" / "words-1" / "config.json").read_text())
    for key in ("total_steps", "save_dir"):
        del config["train"][key]
    (here / "all.json").write_text(json.dumps(config))
    args = ("--manual-config", "--config", "all.json", "--backend", "cpu")
    assert train_here(*args) == 2
    assert "train.total_steps" in capsys.readouterr().err
    assert train_here(*args, "--max-steps", 6) == 0
    assert losses(here / "checkpoints" / "words-2") == losses(here / "checkpoints" / "words-1")


def step_of(path):
    ckpt = backends.open_checkpoint(path)
    try:
        return ckpt.meta.step
    finally:
        ckpt.close()


def test_best_is_linked_again_after_a_kill_before_its_link(here, capsys):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run), "--max-steps", 4) == 0
    assert step_of(run / "best.pt") == 4, "the tiny model gets better all the time"
    (run / "best.pt").unlink()
    (run / "best.pt").hardlink_to(run / "step_000002.pt")
    assert train_here("--resume", run, "--max-steps", 5, "train.eval_tokens=24") == 0
    assert "best.pt is step_000004.pt again" in capsys.readouterr().out
    assert step_of(run / "best.pt") in (4, 5)


def test_a_run_that_goes_on_with_the_other_framework_has_one_best(here, capsys):
    run = here / "checkpoints" / "r"
    assert train_here(*start(here, "--save-dir", run), "--max-steps", 4) == 0
    stale = (run / "best.pt").read_bytes()
    assert train_here("--resume", run, "--backend", "mlx") == 0
    assert step_of(run / "best.npz") == 6, "the tiny model gets better all the time"
    assert not (run / "best.pt").exists()
    (run / "best.pt").write_bytes(stale)
    for path in run.glob("step_00000[56].*"):
        path.unlink()
    capsys.readouterr()
    assert train_here("--resume", run / "best.npz", "train.total_steps=7") == 0
    assert not (run / "best.pt").exists()


def test_another_model_is_refused_before_any_text_is_prepared(here, capsys, monkeypatch):
    assert train_here(*start(here, "--save-dir", "r"), "--max-steps", 2) == 0

    def prepared(*args, **kwargs):
        raise AssertionError("a text was prepared")

    monkeypatch.setattr("core.training.session.prepare", prepared)
    capsys.readouterr()
    assert train_here("--resume", "r", "model.n_layers=3", "model.d_model=32") == 2
    err = capsys.readouterr().err
    assert "model.n_layers: the checkpoint has 2, the configuration asks for 3" in err
    assert "model.d_model: the checkpoint has 16, the configuration asks for 32" in err


def test_a_text_that_moved_is_asked_for_and_no_other_is_offered(here, capsys):
    assert train_here(*start(here, "--save-dir", "r"), "--max-steps", 2) == 0
    (here / "words.txt").rename(here / "moved.txt")
    capsys.readouterr()
    assert train_here("--resume", "r") == 2
    err = capsys.readouterr().err
    assert "try: python train.py --resume r/step_000002.pt --input_file PATH" in err
    assert "moved.txt" not in err
    assert train_here("--resume", "r/step_000002.pt", "--input_file", "moved.txt") == 0


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (4, "--max-steps 4: stop there; the schedule stays 6"),
        (6, "--max-steps 6: as long as train.total_steps"),
        (9, "--max-steps 9: train.total_steps=6 ends the run before it"),
    ],
)
def test_what_max_steps_means_is_always_said(here, capsys, limit, words):
    assert train_here(*start(here, "--dry-run"), "--max-steps", limit) == 0
    assert words in " ".join(capsys.readouterr().out.split())


def poison(monkeypatch, steps):
    """Steps that change nothing, so that their validation is no better than the one before."""

    def poisoned(step, train, normalizer):
        return step_hyper(step, train, math.nan if step in steps else normalizer)

    monkeypatch.setattr("core.training.loop.step_hyper", poisoned)


@pytest.mark.parametrize("pruned", [False, True])
def test_best_of_steps_that_are_given_up_is_not_kept(here, monkeypatch, pruned):
    run = here / "checkpoints" / "r"
    first = ("train.ckpt_interval=1", "train.eval_interval=1", "train.samples=0")
    poison(monkeypatch, (3,))
    assert train_here(*start(here, "--save-dir", run, *first)) == 0
    assert step_of(run / "best.pt") == 6
    if pruned:
        (run / "step_000002.pt").unlink()
    early = run / ("step_000001.pt" if pruned else "step_000002.pt")
    assert train_here("--resume", early, "--overwrite", "--max-steps", 3) == 0
    assert step_of(run / "best.pt") == 2


def test_a_dry_run_says_where_the_prepared_text_is(here, capsys):
    assert train_here(*start(here), "--dry-run") == 0
    out = capsys.readouterr().out
    folder = next((here / "shards").iterdir())
    assert f"shards/{folder.name}" in out and "written\n" not in out.split("dry run")[1]


def test_the_last_commands_quote_what_comes_from_the_text_and_the_folder(here, capsys):
    nasty = 'say "$(touch gone)" `touch gone` \x1b[31m now and\u202e then\n'
    (here / "n.txt").write_text(nasty * 400, encoding="utf-8")
    args = [*start(here)]
    args[1] = "n.txt"
    assert train_here(*args, "--save-dir", "my run", "data.seq_len=16") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out
    lines = [x.strip() for x in out[out.index(" next ") :].splitlines()]
    commands = [shlex.split(x.removeprefix("next").strip(), comments=True) for x in lines if x]
    assert commands[0][:4] == ["python", "generate.py", "--model_name", "my run"]
    assert "$(touch" in commands[0][5] and len(commands[0]) == 6
    assert commands[1][:4] == ["python", "train.py", "--resume", "my run"]
    assert np.all([c[0] == "python" for c in commands])
