"""What train.py says before a run starts: its time and disk, manual configurations, its own tokenizer.

Run: python -m pytest tests/cli/test_before_the_start.py
"""

import json
import shlex
import shutil

import pytest

import backends
import convert
import generate
from core.data.tokenizers.training import train_tokenizer
from tests.cli.runs import TINY, start, train_here, write_text


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def remedy(err):
    line = next(line for line in err.splitlines() if line.startswith("  try: "))
    return shlex.split(line.removeprefix("  try: ").split("   (")[0])


def everything(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Time and disk


def test_a_run_of_a_given_length_is_told_its_time(here, capsys):
    assert train_here(*start(here, "train.total_steps=2")) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(" will take"))
    # A matmul is timed, a step is not: the time says so.
    assert "about " in line and "(predicted)" in line


def test_the_disk_of_a_short_run_is_that_of_its_own_checkpoints(here, capsys):
    args = start(here, "train.ckpt_keep=1000", "train.total_steps=4", "--dry-run")
    assert train_here(*args) == 0
    out = capsys.readouterr().out
    assert "2 checkpoints of " in out and "1000" not in out.partition(" will take")[2]


def test_a_full_disk_is_refused_before_the_first_step(here, capsys, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    args = start(here, "train.total_steps=20")
    assert train_here(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("P312") and "nothing was started" in err
    assert not (here / "checkpoints").exists()
    fits = remedy(err)[0]
    assert fits.startswith("train.ckpt_keep=") and train_here(*args, fits) == 0


# --manual-config


@pytest.mark.parametrize(
    ("preset", "decisions"),
    [
        ("tiny_shakespeare_cpu", ()),
        ("150M", ("train.precision=float32", "data.tokenizer=byte", "model.vocab_size=300")),
    ],
)
def test_a_preset_needs_no_more_than_decisions(here, capsys, preset, decisions):
    text = write_text(here)
    args = ("--manual-config", "--config", preset, "--input_file", text, "--backend", "cpu")
    small = ("model.n_layers=1", "model.d_model=24", "train.total_steps=2", "data.seq_len=16")
    if preset == "150M":
        assert train_here(*args) == 2
        listed = [x.split()[0] for x in capsys.readouterr().err.splitlines() if x[2:7] != "try: "]
        assert listed[1:3] == ["data.tokenizer", "train.precision"]
    assert train_here(*args, *small, *decisions) == 0, capsys.readouterr().err


def test_the_remedy_of_an_open_configuration_writes_every_value(here, capsys):
    text = write_text(here)
    args = ("--input_file", text, "--backend", "cpu", "train.minutes=0.02", "--manual-config")
    small = ("model.d_model=16", "model.n_layers=1", "data.seq_len=24", "data.val_fraction=0.1")
    assert train_here(*args, *small) == 2
    first, second = " ".join(remedy(capsys.readouterr().err)).split(" && ")
    command, file = first.split(" > ")
    assert train_here(*command.split()[2:]) == 0
    (here / file).write_text(capsys.readouterr().out)
    assert "--manual-config" in second
    assert train_here(*second.split()[2:]) == 0, capsys.readouterr().err
    run = json.loads((here / "checkpoints" / "words-1" / "config.json").read_text())
    assert run == json.loads((here / file).read_text())["config"]


# A run's own tokenizer


def damage(file, how):
    if how == "gone":
        file.unlink()
    elif how == "another":
        train_tokenizer("char", iter("xyz")).save(file.parent)
    else:
        file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("how", ["gone", "another", "cut"])
def test_a_tokenizer_that_is_not_the_runs_is_refused_before_the_text_is_read(here, capsys, how):
    args = [a for a in start(here) if a != "data.tokenizer=byte"]
    assert train_here(*args, "data.tokenizer=char", "--max-steps", 2) == 0
    run = here / "checkpoints" / "words-1"
    damage(run / "tokenizer.pippin.json", how)
    before = everything(here)
    capsys.readouterr()
    assert train_here("--resume", "checkpoints/words-1") == 2
    said = capsys.readouterr()
    assert said.err.startswith("P301") and everything(here) == before
    assert " tokenizer " not in said.out and "data.tokenizer=" not in said.err
    verb, good, target = remedy(said.err)
    assert verb == "cp"
    shutil.copy(good, target)
    assert train_here("--resume", "checkpoints/words-1") == 0


def test_without_an_intact_copy_none_is_promised(here, capsys):
    assert train_here(*start(here), "--max-steps", 2) == 0
    run = here / "checkpoints" / "words-1"
    (run / "tokenizer.pippin.json").unlink()
    shutil.rmtree(here / "shards")
    assert train_here("--resume", "checkpoints/words-1") == 2
    err = capsys.readouterr().err
    assert err.startswith("P301") and "from a copy of the run" in err
    assert not (here / "shards").exists()


# Damaged checkpoints


@pytest.fixture
def run(here):
    assert train_here(*start(here)) == 0
    return here / "checkpoints" / "words-1"


def break_file(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # the best may be the same file by another name
    path.write_bytes(content)


def test_a_damaged_checkpoint_by_name_points_to_the_newest_intact(run, capsys):
    break_file(run / "step_000006.pt")
    assert train_here("--resume", "checkpoints/words-1/step_000006.pt") == 2
    err = capsys.readouterr().err
    assert err.startswith("P303") and "newest intact: checkpoints/words-1/step_000004.pt" in err
    assert train_here(*remedy(err)[2:]) == 0
    assert (run / "step_000006.pt").is_file()


def test_where_only_the_best_is_intact_it_is_named(run, capsys):
    for path in run.glob("step_*.pt"):
        break_file(path)
    assert train_here("--resume", "checkpoints/words-1/step_000006.pt") == 2
    err = capsys.readouterr().err
    assert "no intact checkpoint beside it" in err and "best.pt --overwrite" in err
    assert train_here("--resume", "words-1") == 2
    again = remedy(capsys.readouterr().err)
    assert again[-2:] == ["checkpoints/words-1/best.pt", "--overwrite"]


def test_where_nothing_is_intact_no_command_pretends_it(run, capsys):
    for path in (*run.glob("step_*.pt"), run / "best.pt"):
        break_file(path)
    assert train_here("--resume", "words-1") == 2
    err = capsys.readouterr().err
    assert err.startswith("P303 no checkpoint in") and "put back a copy" in err
    assert generate.main(["--model_name", "words-1", "--backend", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("P303 no checkpoint in") and "--resume" not in err
    assert err.count("was passed over") == 4


def test_generate_and_convert_name_the_intact_one_too(run, capsys):
    bad = "checkpoints/words-1/step_000006.pt"
    break_file(run / "step_000006.pt")
    assert generate.main(["--checkpoint", bad, "--backend", "cpu"]) == 2
    command = remedy(capsys.readouterr().err)
    assert generate.main([*command[2:], "--max-new-tokens", "2", "--backend", "cpu"]) == 0
    assert convert.main([bad, "out.npz"]) == 2
    command = remedy(capsys.readouterr().err)
    assert convert.main(command[2:]) == 0
    found = backends.open_checkpoint(run.parent.parent / "out.npz")
    assert found.meta.step == 4
    found.close()


# The shape


@pytest.mark.parametrize(
    ("args", "origin", "fix"),
    [
        (("--d-model", "63"), "--d_model: model.d_model = 63 is odd", "model.d_model=64"),
        (("model.n_heads=7",), "model.n_heads=7: model.n_heads = 7 does", "model.n_heads=8"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_before_the_text_is_prepared(
    here, capsys, args, origin, fix
):
    small = (
        "data.seq_len=24",
        "data.tokenizer=byte",
        "train.eval_tokens=96",
        "train.total_steps=5",
    )
    given = ["--dry-run", "--backend", "cpu", "--input_file", write_text(here), *small, *args]
    before = everything(here)
    assert train_here(*given) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("P010") and origin in captured.err
    assert "nothing was started." in captured.err and " shards " not in captured.out
    assert everything(here) == before
    assert remedy(captured.err) == [fix]
    assert train_here(*given, fix) == 0


# Words


def test_an_empty_name_is_not_the_working_folder(here, capsys):
    assert generate.main(["--model_name", ""]) == 2
    err = capsys.readouterr().err
    assert err.startswith("P012") and "empty" in err and "try: " in err


@pytest.mark.parametrize("content", [None, ""])
def test_a_text_that_is_missing_or_empty_ends_with_a_command(here, capsys, content):
    text = here / "new.txt"
    if content is not None:
        text.write_text(content)
    assert train_here("--input_file", text, "--backend", "cpu", *TINY) == 2
    err = capsys.readouterr().err
    assert err.startswith("P201") and "try: " in err and "nothing was started." in err


def test_a_warning_is_counted_and_a_stop_is_none():
    from core.training.run import Outcome, Progressed
    from core.training.summary import _notes

    outcome = Outcome("interrupted", Progressed(), 0, None, None, 0.0, 0, 0, None, {})
    stop = "Ctrl-C: saving step 4 (Ctrl-C again to abort)"
    assert _notes(outcome, [stop], []) == []
    assert _notes(outcome, [stop, "swap grew"], []) == ["1 warning above"]
