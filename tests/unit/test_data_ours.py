"""Only what Pippin made is ever removed beside the shards, whatever else lies there.

Run: pytest tests/unit/test_data_ours.py
"""

import os
import time
from pathlib import Path

import pytest

from core.checkpoint import clean_temporaries
from core.data.preparing import ours
from core.data.preparing.building import publish, work_folder
from core.data.preparing.ours import LOCK, PROGRESS, foreign_names, is_own_name, private_folder
from core.data.preparing.shard_builder import SplitBuilder
from core.training.runfolder import RunFolder

KEY = "0123456789ab"
DAYS = 20 * 24 * 3600


def aged(folder: Path) -> Path:
    os.utime(folder, (time.time() - DAYS, time.time() - DAYS))
    return folder


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def begin(home: Path) -> None:
    """Begin to make shards in a folder, which looks for leftovers first."""
    with work_folder(home / "new", "f" * 64):
        pass


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def killed(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """What a build and a second one beside it leave when both are killed."""
    with monkeypatch.context() as patch:
        patch.setattr(ours, "remove_folder", lambda folder: None)
        with private_folder(home / "s") as private:
            SplitBuilder(private, "train", "uint16").close()
    with work_folder(home / "s", KEY * 5) as work:
        SplitBuilder(work, "val", "uint16", weighted=True).close()
        (work / PROGRESS).write_text("{}")
    return private, work


def test_folders_of_others_survive_whatever_their_names(home: Path) -> None:
    folders = {
        ".tmp-mine": {},
        ".work-thesis": {"chapter.txt": "years"},
        ".tmp-1234-0123abcd": {"letter.txt": "x"},
        f".work-s-{KEY}": {"notes.md": "x", LOCK: ""},
        f".work-t-{KEY}": {"train_00000.bin": "their training data"},
        ".tmp-old-77-0123abcd": {"manifest.json": "{}", LOCK: "another lock"},
        f".work-u-{KEY}": {PROGRESS: '{"steps": 3}', "val_offsets.bin": "x"},
    }
    for name, files in folders.items():
        (home / name).mkdir()
        for file, text in files.items():
            (home / name / file).write_text(text)
        aged(home / name)
    before = tree(home)
    begin(home)
    assert before <= tree(home)


def test_a_marked_folder_with_something_of_others_survives(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = killed(home, monkeypatch)
    for folder in folders:
        (folder / "notes.txt").write_text("mine")
        aged(folder)
    before = tree(home)
    begin(home)
    assert before <= tree(home)


def test_links_are_not_followed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, work = killed(home, monkeypatch)
    elsewhere = home / "elsewhere"
    work.rename(elsewhere)
    aged(elsewhere)
    work.symlink_to(elsewhere)
    (private / "val_00000.bin").symlink_to(elsewhere / "val_offsets.bin")
    aged(private)
    before = tree(elsewhere)
    begin(home)
    assert work.is_symlink() and tree(elsewhere) == before and not private.exists()


def test_what_killed_builds_left_is_removed_when_it_is_old(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, work = killed(home, monkeypatch)
    begin(home)
    assert private.is_dir() and work.is_dir()
    aged(private), aged(work)
    begin(home)
    assert tree(home) == {f".work-new-{'f' * 12}", f".work-new-{'f' * 12}/{LOCK}"}


def test_a_build_under_way_keeps_its_folder_however_old(home: Path) -> None:
    with private_folder(home / "s") as private, work_folder(home / "s", KEY) as work:
        aged(private), aged(work)
        begin(home)
        assert private.is_dir() and work.is_dir()


def test_replacing_shards_keeps_what_is_not_shards(home: Path) -> None:
    target = home / "s"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    (target / "notes.txt").write_text("mine")
    assert foreign_names(target) == ("notes.txt",)
    with work_folder(target, KEY) as work:
        (work / "manifest.json").write_text("new")
        publish(work, target, replace=True)
    assert tree(target) == {"manifest.json"} and (target / "manifest.json").read_text() == "new"
    (kept,) = home.glob(".tmp-old-*/notes.txt")
    assert kept.read_text() == "mine"
    assert tree(kept.parent) == {"notes.txt"}


def test_every_name_in_a_folder_of_shards_is_known(tmp_path: Path) -> None:
    names = "manifest.json tokenizer.model .verified.json .verified.json.77 test_weights_00012.bin"
    assert all(is_own_name(name) for name in names.split())
    others = "train.bin val_1.bin tokenizer.txt train_offsets.bin.bak extra_offsets.bin .verified"
    assert not any(is_own_name(name) for name in others.split())


def test_a_run_folder_keeps_temporary_files_of_others(tmp_path: Path) -> None:
    for name in (".tmp-999999999-thesis.tex", ".tmp-999999999-step_000002.npz"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in clean_temporaries(tmp_path)] == [".tmp-999999999-step_000002.npz"]
    assert (tmp_path / ".tmp-999999999-thesis.tex").exists()


def test_a_fresh_run_removes_event_files_alone(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "logs" / "tensorboard"
    logs.mkdir(parents=True)
    (tmp_path / "run" / "best.npz").write_bytes(b"")
    (logs / "events.out.tfevents.1.host").write_text("x")
    with RunFolder(tmp_path / "run") as folder:
        folder.clear()
        assert not logs.exists()
        logs.mkdir()
        (tmp_path / "run" / "best.npz").write_bytes(b"")
        for name in ("events.out.tfevents.2.host", "notes.txt"):
            (logs / name).write_text("x")
        folder.clear()
    assert [path.name for path in logs.iterdir()] == ["notes.txt"]
