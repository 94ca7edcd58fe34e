"""Run folders and logs: locks, names, strict JSON, rows cut on resume.

Run: python -m pytest tests/unit/test_run_folder.py
"""

import json
import math
import os
import subprocess
import sys

import pytest

from core.errors import PippinError
from core.paths import PROJECT_ROOT, is_safe_name
from core.training.runfolder import RunFolder, next_free_name, refuse_existing
from core.training.runlog import RunLog, cut_after, open_tensorboard, read_rows


def test_a_second_process_is_refused_and_told_the_first_ones_id(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom core.training.runfolder import RunFolder\n"
        "from core.errors import PippinError\n"
        "try:\n  RunFolder(Path(sys.argv[2])).__enter__()\n"
        "except PippinError as e: print(e.code, e.what)\n"
    )
    run = [sys.executable, "-c", code, str(PROJECT_ROOT), str(tmp_path / "r")]
    with RunFolder(tmp_path / "r"):
        out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        assert out.startswith("P310") and f"process {os.getpid()}" in out
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == ""


def test_an_unwritable_place_is_found_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PippinError) as info, RunFolder(tmp_path / "file" / "run"):
        pass
    assert info.value.code == "P312" and "nothing was started" in info.value.render()


def test_a_folder_with_a_checkpoint_is_refused_naming_both_flags(tmp_path):
    refuse_existing(tmp_path, overwrite=False)
    (tmp_path / "step_000010.npz").write_bytes(b"x")
    with pytest.raises(PippinError) as info:
        refuse_existing(tmp_path, overwrite=False)
    refuse_existing(tmp_path, overwrite=True)
    assert info.value.code == "P311"
    assert "--resume" in info.value.render() and "--overwrite" in info.value.render()


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    for name in ("step_000010.npz", "best.npz", "config.json", "mine.txt", "step_000010.npz.bak"):
        (tmp_path / name).write_bytes(b"x")
    with RunFolder(tmp_path) as folder:
        (tmp_path / "logs" / "metrics.jsonl").write_text("{}\n")
        folder.clear()
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"mine.txt", "step_000010.npz.bak", "logs", ".lock"}
    assert list((tmp_path / "logs").iterdir()) == []


def test_names_take_the_next_free_number_and_are_safe(tmp_path):
    assert next_free_name("stories", tmp_path).name == "stories-1"
    (tmp_path / "Stories-1").mkdir()  # equal on a Mac's file system
    assert next_free_name("stories", tmp_path).name == "stories-2"
    for stem in ("../etc", "a b/c", "", "日本語", "." * 90, "x" * 200):
        assert is_safe_name(next_free_name(stem, tmp_path).name), stem


@pytest.mark.parametrize("name", ["", ".x", "a/b", "a\\b", "a\n", "-" * 3, "x" * 65])
def test_unsafe_names(name):
    assert not is_safe_name(name)


def test_rows_are_strict_json_and_what_is_not_finite_is_absent(tmp_path):
    log = RunLog(tmp_path)
    log.row(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.1, "val_loss": None})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert set(row) == {"step", "learning_rate", "timestamp"} and text.endswith("\n")


def test_rows_past_the_checkpoint_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3]
    assert cut_after(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert cut_after(path, 2) == 0 and cut_after(tmp_path / "none", 1) == 0


def test_tensorboard_is_written_where_its_package_is(tmp_path):
    writer = open_tensorboard(tmp_path)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert writer is None
        return
    log = RunLog(tmp_path, tensorboard=writer)
    log.row(3, {"loss": 1.5})
    log.close()
    assert any((tmp_path / "tensorboard").iterdir())
