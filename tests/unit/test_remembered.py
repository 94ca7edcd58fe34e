"""The remembered backend: kept per machine and versions, and harmless whatever the file is.

Run: python -m pytest tests/unit/test_remembered.py
"""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import PippinError
from core.machine.remembered import (
    FILE_NAME,
    MAX_ENTRIES,
    Machine,
    cache_folder,
    is_there,
    recall,
    remember,
)

MAC = Machine("macOS | arm64 | Apple M3 Pro | 36 GiB", {"torch": "2.13.0", "mlx": "0.32.4"}, "Mac")
SPEEDS = {"mlx": 1400.0, "mps": 1000.0}
DATE = "2026-11-20"


def test_an_answer_comes_back_on_the_same_machine_alone(tmp_path):
    assert not is_there(tmp_path) and recall(MAC, tmp_path) == (None, "")
    path = remember(MAC, SPEEDS, date=DATE, folder=tmp_path / "new" / "folder")
    folder = path.parent
    assert path.name == FILE_NAME and is_there(folder)
    found, note = recall(MAC, folder)
    assert found is not None and not note
    assert (dict(found.tokens_per_s), found.date, found.machine) == (SPEEDS, DATE, "Mac")
    assert recall(replace(MAC, key="another Mac"), folder) == (None, "")
    assert [p.name for p in folder.iterdir()] == [FILE_NAME], "no temporary file is left"


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.1", "mlx": "0.32.4"},
        {"torch": "2.13.0"},
        {"torch": "2.13.0", "mlx": "0.32.4", "driver": "570"},
    ],
)
def test_other_versions_are_not_trusted_and_it_is_said(tmp_path, versions):
    remember(MAC, SPEEDS, date=DATE, folder=tmp_path)
    found, note = recall(replace(MAC, versions=versions), tmp_path)
    assert found is None and "tools/benchmark.py compare" in note


def test_several_machines_share_the_file_and_it_stays_small(tmp_path):
    for i in range(MAX_ENTRIES + 5):
        remember(
            replace(MAC, key=f"machine {i}"), {"cpu": float(i + 1)}, date=DATE, folder=tmp_path
        )
    remember(replace(MAC, key="machine 10"), {"cpu": 77.0}, date=DATE, folder=tmp_path)
    machines = json.loads((tmp_path / FILE_NAME).read_text())["machines"]
    assert len(machines) == MAX_ENTRIES
    assert recall(replace(MAC, key="machine 0"), tmp_path)[0] is None
    assert recall(replace(MAC, key="machine 10"), tmp_path)[0].tokens_per_s == {"cpu": 77.0}
    assert recall(replace(MAC, key="machine 36"), tmp_path)[0].tokens_per_s == {"cpu": 37.0}


def entry(**changes):
    good = {"date": DATE, "versions": dict(MAC.versions), "tokens_per_s": SPEEDS}
    return json.dumps({"format": 1, "machines": {MAC.key: {**good, **changes}}})


BROKEN = {
    "empty": "",
    "half": '{"format": 1, "machines": {',
    "list": "[1, 2]",
    "number": "7",
    "null": "null",
    "another format": json.dumps({"format": 2, "machines": {}}),
    "machines is a list": json.dumps({"format": 1, "machines": []}),
    "deep": "[" * 100_000,
    "a huge number": '{"format": 1' + "0" * 5000 + "}",
    "no date": entry(date=None),
    "a date that is code": entry(date="\x1b]0;hello\x07"),
    "an impossible date": entry(date="2026-13-40"),
    "no speeds": entry(tokens_per_s=None),
    "a list of speeds": entry(tokens_per_s=[1, 2]),
    "speeds of text": entry(tokens_per_s={"mlx": "fast"}),
    "speeds of nan": entry(tokens_per_s={"mlx": float("nan"), "mps": float("inf")}),
    "speeds below zero": entry(tokens_per_s={"mlx": -1, "mps": 0}),
    "speeds beyond reason": entry(tokens_per_s={"mlx": 10**400}),
    "true": entry(tokens_per_s={"mlx": True}),
    "large": " " * 300_000,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_or_hostile_file_is_as_if_it_were_not_there(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    found, note = recall(MAC, tmp_path)
    assert found is None and "not used" in note and "\x1b" not in note
    # And it is mended by the next measurement.
    remember(MAC, SPEEDS, date=DATE, folder=tmp_path)
    assert recall(MAC, tmp_path)[0] is not None


def test_an_entry_of_another_shape_is_left_out(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps({"format": 1, "machines": {MAC.key: "x", "y": 3}}))
    assert recall(MAC, tmp_path) == (None, "")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / FILE_NAME)
    found, note = recall(MAC, tmp_path)
    assert found is None and "not a small file" in note
    folder = tmp_path / "a"
    (folder / FILE_NAME).mkdir(parents=True)
    assert recall(MAC, folder)[0] is None
    bytes_ = tmp_path / "b"
    bytes_.mkdir()
    (bytes_ / FILE_NAME).write_bytes(b"\xff\xfe\x00\x80")
    assert recall(MAC, bytes_)[0] is None
    assert recall(MAC, tmp_path / FILE_NAME / "below a file")[0] is None
    assert recall(MAC, Path("\0"))[0] is None and not is_there(Path("\0"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    path = remember(MAC, SPEEDS, date=DATE, folder=tmp_path)
    path.chmod(0)
    assert "cannot be read" in recall(MAC, tmp_path)[1]


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_way_out(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PippinError) as error:
        remember(MAC, SPEEDS, date=DATE, folder=blocked / "below")
    assert error.value.code == "P312" and "PIPPIN_CACHE_DIR" in error.value.render()


def test_nobody_else_can_write_the_file(tmp_path):
    path = remember(MAC, SPEEDS, date=DATE, folder=tmp_path)
    assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({}, "linux", "/home/u/.cache/pippin"),
        ({"XDG_CACHE_HOME": "/x/c"}, "linux", "/x/c/pippin"),
        ({"XDG_CACHE_HOME": "relative"}, "linux", "/home/u/.cache/pippin"),
        ({"XDG_CACHE_HOME": ""}, "linux", "/home/u/.cache/pippin"),
        ({"XDG_CACHE_HOME": "/x/c"}, "darwin", "/home/u/Library/Caches/pippin"),
        ({"PIPPIN_CACHE_DIR": "/own"}, "darwin", "/own"),
    ],
)
def test_the_folder_is_the_systems(environ, platform, expected):
    assert str(cache_folder(environ, platform=platform, home=Path("/home/u"))) == expected
