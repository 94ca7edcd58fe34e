"""What a run takes on its disk, held against what is free, and what to type where it does not fit.

Run: python -m pytest tests/unit/test_disk.py
"""

import errno
import shutil
from pathlib import Path

import pytest

from core.checkpoint.atomic import atomic_file
from core.config.load import load
from core.errors import PippinError
from core.training.disk import DiskPlan, disk_error, files_to_come, saves_between
from core.training.textdata import refuse_full_disk


def fullest(held, saves, keep, best):
    """The most files beyond those held, by playing the saves with the best at every one of them."""
    files = list(range(held))
    own_best, start, most = best, held + best, 0
    for step in range(held, held + saves):
        files.append(step)
        most = max(most, len(files) + own_best - start)
        pruned = files[: max(len(files) - keep, 0)]
        files = files[len(pruned) :]
        own_best = own_best or bool(pruned)  # the first was the best: it lives on by its other name
    return most


@pytest.mark.parametrize("keep", [1, 2, 3, 7])
@pytest.mark.parametrize("saves", [1, 2, 3, 4, 5, 20])
def test_files_of_a_fresh_run_are_those_of_its_fullest_moment(saves, keep):
    assert files_to_come(held=0, saves=saves, keep=keep) == fullest(0, saves, keep, False)


@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize("saves", [1, 2, 9])
def test_a_run_that_goes_on_counts_what_is_there(held, saves):
    found = files_to_come(held=held, saves=saves, keep=3, best_held=True)
    assert found == fullest(held, saves, 3, True)
    assert files_to_come(held=held, saves=0, keep=3) == 0


@pytest.mark.parametrize("first", [0, 3, 10])
@pytest.mark.parametrize("interval", [1, 4, 100])
def test_saves_are_counted_as_the_loop_makes_them(first, interval):
    stop = 26
    wanted = sum(s % interval == 0 or s == stop for s in range(first + 1, stop + 1))
    assert saves_between(first, stop, interval) == wanted


@pytest.fixture
def disk_of(monkeypatch):
    def make(free):
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return make


def test_a_run_that_does_not_fit_names_what_does(tmp_path, disk_of):
    disk_of(1000)
    DiskPlan(tmp_path, saves=3, keep=1000, each_bytes=333).refuse()
    plan = DiskPlan(tmp_path, saves=50, keep=1000, each_bytes=200)
    with pytest.raises(PippinError) as caught:
        plan.refuse()
    assert caught.value.code == "P312" and caught.value.kept == "nothing was started."
    assert caught.value.remedy == "train.ckpt_keep=3"  # and the best, and the one being written
    DiskPlan(tmp_path, saves=50, keep=3, each_bytes=200).refuse()
    with pytest.raises(PippinError, match="--save-dir") as caught:
        DiskPlan(tmp_path, saves=50, keep=3, each_bytes=400).refuse()
    assert "train.ckpt_keep" not in caught.value.remedy


def test_room_of_what_is_removed_first_counts_as_free(tmp_path, disk_of):
    disk_of(1000)
    old = tmp_path / "step_000001.pt"
    old.write_bytes(b"0" * 600)
    with pytest.raises(PippinError):
        DiskPlan(tmp_path, saves=4, keep=9, each_bytes=400).refuse()
    DiskPlan(tmp_path, saves=4, keep=9, each_bytes=400, dropped=(old,)).refuse()


def stories(size):
    draft = load(config="quickstart", overrides=[f"data.corpus_bytes={size}"])
    draft.set("model.vocab_size", 4096, draft.sources["data.corpus_bytes"])
    return draft


def test_stories_beyond_the_disk_are_refused_before_anything_is_written(
    tmp_path, disk_of, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    disk_of(1_000_000_000)
    refuse_full_disk(stories(2_000_000_000), "bpe")  # two bytes for about 4.4
    with pytest.raises(PippinError) as caught:
        refuse_full_disk(stories(2_500_000_000), "bpe")
    assert caught.value.code == "P312" and not list(tmp_path.iterdir())
    key, _, fits = caught.value.remedy.partition("=")
    assert key == "data.corpus_bytes"
    refuse_full_disk(stories(int(fits)), "bpe")
    with pytest.raises(PippinError):
        refuse_full_disk(stories(2_000_000_000), "byte")  # each byte is an id


def test_more_stories_than_any_disk_are_out_of_range():
    with pytest.raises(PippinError, match="corpus_bytes"):
        load(foreign={"num_documents": "1e9"})


@pytest.mark.parametrize(
    ("number", "word", "not_word"),
    [
        (errno.ENOSPC, "free some space", "may write"),
        (errno.EROFS, "may write", "free some space"),
        (errno.EACCES, "may write", "free some space"),
        (errno.ENOTDIR, "name that is free", "free some space"),
    ],
)
def test_the_remedy_of_a_run_folder_follows_the_error(tmp_path, number, word, not_word):
    file = tmp_path / "taken"
    file.write_text("x")
    error = disk_error(file / "logs", OSError(number, "no"), kept="k")
    assert word in error.remedy and not_word not in error.remedy
    assert ("is a file" in error.found) == (number == errno.ENOTDIR)
    assert ("free on its disk" in error.found) == (number == errno.ENOSPC)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_the_remedy_of_a_checkpoint_fits_every_command(tmp_path, number):
    with (
        pytest.raises(PippinError) as caught,
        atomic_file(tmp_path / "a.npz"),
    ):
        raise OSError(number, "no")
    error = caught.value
    assert error.code == "P307" and error.remedy and "--save" not in error.render()
    assert ("free space" in error.remedy) == (number == errno.ENOSPC)
    assert not list(Path(tmp_path).iterdir())
