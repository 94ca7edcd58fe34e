"""Building shards: the same bytes whatever the workers, wherever it was stopped."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.preparing import building, encoding
from core.data.preparing.building import Amount, BuildOptions, build, publish, work_folder
from core.data.preparing.encoding import cut_blocks, encode_block
from core.data.preparing.scan import Item
from core.data.preparing.shard_builder import SplitBuilder
from core.data.shards.manifest import SourceInfo, open_shards
from core.data.shards.verify import verify_shards
from core.data.tokenizers.tokenizer import ByteTokenizer
from core.errors import PippinError

SOURCE = SourceInfo(
    name="t",
    fingerprint="f",
    seed=1,
    val_fraction=0.1,
    test_fraction=0.1,
    documents=0,
    whole_documents=True,
    notes=(),
)
SPLITS = ("train", "val", "train", "test", "train")


def items(count=200, length=50):
    rng = np.random.default_rng(0)
    for i in range(count):
        size = int(rng.integers(1, length))
        text = "".join(chr(97 + int(c)) for c in rng.integers(0, 26, size))
        yield Item(SPLITS[i % 5], f"{i} {text}\n", None)


def expected(split, count=200, length=50):
    """The tokens of a split by the plainest code there is."""
    out = []
    for item in items(count, length):
        if item.split == split:
            out += [*item.text.encode(), 256]
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".bin"}


def small_blocks(monkeypatch):
    monkeypatch.setattr(encoding, "BLOCK_CHARS", 300)


def made(tmp_path, name, **options):
    with work_folder(tmp_path / name, "0" * 64) as folder:
        manifest = build(folder, items(), ByteTokenizer(), SOURCE, "byte", BuildOptions(**options))
        return publish(folder, tmp_path / name), manifest


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_shards_do_not_depend_on_the_workers(tmp_path, monkeypatch, workers):
    small_blocks(monkeypatch)
    folder, manifest = made(tmp_path, "a", workers=workers, shard_tokens=777)
    for split in ("train", "val", "test"):
        stream = open_shards(folder, split)
        assert stream.tokens(0, stream.num_tokens).tolist() == expected(split)
        ends = np.flatnonzero(np.array(expected(split)) == 256) + 1
        assert stream.offsets.tolist() == [0, *ends.tolist()]
    train = manifest.splits["train"]
    assert [f.items for f in train.files][:-1] == [777] * (len(train.files) - 1)
    assert train.text_bytes == len(expected("train")) - train.documents


class Stopped(Exception):
    pass


@settings(max_examples=15, deadline=None)
@given(stops=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_a_build_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path_factory, stops):
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        patch.setattr(building, "SYNC_S", 0.0)
        tmp_path = tmp_path_factory.mktemp("stop")
        whole, _ = made(tmp_path, "whole", shard_tokens=500)

        for stop in stops:
            seen = []

            def progress(amount: Amount, seen=seen, stop=stop) -> None:
                seen.append(amount)
                if len(seen) > stop:
                    raise Stopped

            try:
                made(tmp_path, "cut", shard_tokens=500, progress=progress)
            except Stopped:
                pass
        folder, _ = made(tmp_path, "cut", shard_tokens=500)
        assert files(folder) == files(whole)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from core.data.preparing import building, encoding
from tests.unit.test_data_building import made
import tests.unit.test_data_building as t
encoding.BLOCK_CHARS, building.SYNC_S = 300, 0.0
import time
slow = float(sys.argv[3])
made(Path(sys.argv[2]), "killed", workers=2, shard_tokens=500,
     progress=lambda amount: time.sleep(slow))
"""


def test_kill_9_in_the_middle_costs_nothing(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    whole, _ = made(tmp_path, "whole", shard_tokens=500)
    root = str(Path(__file__).resolve().parents[2])
    kills = 0
    for pause in (0.05, 0.05, 0.0):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, root, str(tmp_path), str(pause)], cwd=root
        )
        progress = next(iter(tmp_path.glob(".work-killed-*")), None)
        deadline = time.monotonic() + 60
        if pause:
            while time.monotonic() < deadline and process.poll() is None:
                progress = next(iter(tmp_path.glob(".work-killed-*/progress.json")), None)
                if progress is not None:
                    time.sleep(0.3)
                    break
                time.sleep(0.01)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.wait(60)
    assert kills >= 1 and process.returncode == 0
    assert not list(tmp_path.glob(".work-*"))
    assert files(tmp_path / "killed") == files(whole)


def test_the_processes_end_with_their_parent(tmp_path):
    """A killed parent closes the pipes, which ends the others."""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, root, str(tmp_path), "0.2"], cwd=root)
    import psutil

    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline and process.poll() is None:
        children = [c for c in psutil.Process(process.pid).children() if c.is_running()]
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert len(children) >= 2 and not alive


def test_max_tokens_stops_after_the_document_that_reaches_it(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    _, manifest = made(tmp_path, "a", max_tokens=1000)
    total = 0
    for item in items():
        total += len(item.text) + 1
        if total >= 1000:
            break
    assert manifest.tokens == total


def test_a_huge_document_is_sent_in_parts(monkeypatch):
    small_blocks(monkeypatch)
    text = "word " * 1000
    blocks = list(cut_blocks(iter([Item("train", text, None)]), ByteTokenizer()))
    assert len(blocks) > 10
    assert [p.ends for b in blocks for p in b] == [False] * (sum(map(len, blocks)) - 1) + [True]
    ids = np.concatenate([encode_block(ByteTokenizer(), b, "uint16").ids for b in blocks])
    assert ids.tolist() == [*text.encode(), 256]


def test_a_builder_refuses_a_file_that_has_become_shorter(tmp_path):
    first = SplitBuilder(tmp_path, "train", "uint16")
    first.add(np.arange(10, dtype=np.uint32), np.array([10]), text_bytes=9, entropy_bits=None)
    state = first.sync()
    first.close()
    os.truncate(tmp_path / "train_00000.bin", 7)
    with pytest.raises(PippinError) as info:
        SplitBuilder(tmp_path, "train", "uint16", state=state)
    assert info.value.code == "P203"


def test_ids_that_do_not_fit_are_refused(tmp_path):
    builder = SplitBuilder(tmp_path, "train", "uint16")
    with pytest.raises(PippinError) as info:
        builder.add(np.array([70_000], np.uint32), np.array([1]), text_bytes=1, entropy_bits=None)
    assert info.value.code == "P204"
    builder.close()


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from core.data.preparing import building, encoding
from core.errors import PippinError
from tests.unit.test_data_building import made
encoding.BLOCK_CHARS, building.SYNC_S = 300, 0.0
try:
    made(Path(sys.argv[2]), "full", shard_tokens=5000)
except PippinError as error:
    print(error.code)
"""


def test_a_full_disk_is_said_and_the_build_goes_on_when_there_is_room(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", FULL, root, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "P312"
    assert list(tmp_path.glob(".work-full-*/progress.json")) and not (tmp_path / "full").exists()
    whole, _ = made(tmp_path, "whole", shard_tokens=5000)
    full, _ = made(tmp_path, "full", shard_tokens=5000)
    assert files(full) == files(whole)


@pytest.mark.parametrize("damage", ["shorter", "gone", "list"])
def test_a_damaged_work_folder_is_begun_anew(tmp_path, monkeypatch, damage):
    small_blocks(monkeypatch)
    whole, _ = made(tmp_path, "whole", shard_tokens=500)
    source = tmp_path / "full"
    monkeypatch.setattr(building, "SYNC_S", 0.0)
    monkeypatch.setattr(building, "_write_progress", stop_after(building._write_progress, 4))
    with pytest.raises(Stopped):
        made(tmp_path, "full", shard_tokens=500)
    monkeypatch.undo()
    small_blocks(monkeypatch)
    (work,) = tmp_path.glob(".work-full-*")
    first = work / "train_00000.bin"
    if damage == "shorter":
        os.truncate(first, 7)
    elif damage == "gone":
        first.unlink()
    else:
        (work / "progress.json").write_text("[1]")
    made(tmp_path, "full", shard_tokens=500)
    assert files(source) == files(whole) and not list(tmp_path.glob(".work-*"))


def stop_after(function, calls):
    count = iter(range(calls))

    def stopping(*args):
        function(*args)
        if next(count, None) is None:
            raise Stopped

    return stopping


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    old, new = tmp_path / "shards", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    rename = Path.rename

    def full(self, target):
        if self == new:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(PippinError) as info:
        building.publish(new, old, replace=True)
    assert info.value.code == "P312" and (old / "file").read_text() == "shards"


def test_a_folder_published_while_its_lock_was_waited_for_is_not_built_in(tmp_path, monkeypatch):
    target = tmp_path / "shards"
    with building.work_folder(target, "key") as first:
        made_path = str(first)
    flock = fcntl.flock
    calls = []

    def publish_first(lock, how):
        calls.append(how)
        if len(calls) == 1:  # the folder goes, between opening its lock and getting it
            first.rename(target)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", publish_first)
    with building.work_folder(target, "key") as second:
        assert str(second) == made_path and second.is_dir() and len(calls) == 2


def test_verify_finds_a_flipped_bit(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    folder, _ = made(tmp_path, "a", shard_tokens=500)
    count, size = verify_shards(folder)
    assert count == len(files(folder)) and size == sum(map(len, files(folder).values()))
    path = folder / "train_00001.bin"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[33] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(PippinError) as info:
        verify_shards(folder)
    assert info.value.code == "P203" and "train_00001.bin" in info.value.render()


def test_a_limit_that_leaves_nothing_for_validation_is_noted(tmp_path, monkeypatch):
    """Whole documents are taken in their order until it is reached: the second is for validation."""
    small_blocks(monkeypatch)
    first = len(next(items()).text) + 1

    def notes(max_tokens):
        return made(tmp_path, f"s{max_tokens}", max_tokens=max_tokens)[1].source.notes

    assert notes(first) == (f"{first:,} tokens were reached before any document of val and test",)
    assert notes(first + 1) == (f"{first + 1:,} tokens were reached before any document of test",)
    assert notes(1_000) == notes(10**9) == notes(None) == ()
