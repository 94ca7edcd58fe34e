"""kill -9 at a random moment of a save never costs more than that save.

Run: python -m pytest tests/resume/test_kill_in_save.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.checkpoint import clean_temporaries, list_checkpoints, newest_valid
from tests.checkpoint_helpers import OPEN, SUFFIXES

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 10
MAX_TRIES = 60

SAVE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from core.checkpoint import prune
from tests.checkpoint_helpers import WRITE, tiny_meta
folder, suffix, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
while True:
    step += 1
    values = np.random.default_rng(step)
    tensors = [(f"layers.{i}.weight", values.random((512, 512), np.float32)) for i in range(3)]
    WRITE[suffix](folder / f"step_{step:06d}{suffix}", tiny_meta(step=step), tensors)
    prune(folder, 2)
"""


def wait_for_temporary(folder: Path, child: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 30
    while not list(folder.glob(".tmp-*")):
        if time.monotonic() > limit or child.poll() is not None:
            raise RuntimeError("the child does not save")
        time.sleep(0.001)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ten_kills_in_the_middle_of_a_save(tmp_path: Path, suffix: str) -> None:
    moments = random.Random(11)
    newest = 0
    counted = 0
    for _ in range(MAX_TRIES):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), suffix, str(newest)]
        child = subprocess.Popen(command, cwd=ROOT)
        try:
            wait_for_temporary(tmp_path, child)
            time.sleep(moments.uniform(0, 0.08))
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        in_save = list(tmp_path.glob(".tmp-*"))
        if list_checkpoints(tmp_path):
            found = newest_valid(tmp_path, OPEN[suffix])
            assert found is not None
            path, problems = found
            assert problems == (), "a published file was not complete"
            step = int(path.stem.split("_")[1])
            assert step >= newest, "a published checkpoint was lost"
            newest = step
            counted += bool(in_save)
        assert set(clean_temporaries(tmp_path)) == set(in_save)
        assert not list(tmp_path.glob(".tmp-*"))
        if counted == NUM_KILLS:
            break
    assert counted == NUM_KILLS
