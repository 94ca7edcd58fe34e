"""The monitor: what it reads from a Mac, a card and a run, what it shows, and what it never loads.

Run: pytest tests/unit/test_memory_monitor.py
"""

import ctypes
import io
import json
import os
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from core.machine.system import (
    GpuMemory,
    ProcessMemory,
    SystemMemory,
    gpu_memory,
    phys_footprint_bytes,
    process_memory,
    system_memory,
)
from core.training.runfolder import RunFolder
from core.training.watch import (
    MetricsTail,
    RunStatus,
    Snapshot,
    Watch,
    as_object,
    newest_run,
    run_status,
)
from tools.memory_monitor import main
from tools.monitoring.notes import warnings
from tools.monitoring.view import bar, line, view

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
MAC = SystemMemory(16 * GIB, 4 * GIB, 1_200_000_000, 3 * GIB)
NOW = 1_000_000.0


# The system


def test_system_memory_is_psutils():
    found = system_memory()
    assert found.total_bytes == psutil.virtual_memory().total
    assert 0 < found.available_bytes <= found.total_bytes


def test_a_process_holds_what_it_allocated():
    before = process_memory(os.getpid())
    block = bytearray(b"x" * (64 << 20))
    after = process_memory(os.getpid())
    assert after.rss_bytes - before.rss_bytes > 48 << 20
    assert after.pid == os.getpid() and abs(after.started - psutil.Process().create_time()) < 0.01
    assert len(block) == 64 << 20


def test_a_process_that_is_gone_is_none():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert process_memory(child.pid) is None


def test_the_footprint_wins_over_resident_memory():
    found = process_memory(os.getpid(), footprint=lambda _pid: 123)
    assert found.footprint_bytes == 123 and found.memory_bytes == 123
    without = process_memory(os.getpid(), footprint=lambda _pid: None)
    assert without.memory_bytes == without.rss_bytes


def test_the_footprint_is_the_eighth_number_of_the_struct():
    """`struct rusage_info_v0` of macOS's <sys/resource.h>: uuid[16], then ten uint64 fields."""
    calls = []

    def rusage(pid, flavor, buffer):
        calls.append((pid, flavor))
        names = range(100, 110)  # user_time ... resident_size, phys_footprint, two times
        ctypes.memmove(buffer, struct.pack("=16s10Q", b"u" * 16, *names), 96)
        return 0

    assert phys_footprint_bytes(42, rusage=rusage) == 107
    assert calls == [(42, 0)]
    assert phys_footprint_bytes(42, rusage=lambda *_: -1) is None


@pytest.mark.skipif(sys.platform != "darwin", reason="only macOS has a physical footprint")
def test_the_footprint_of_this_process_on_a_mac():
    assert 1 << 20 < phys_footprint_bytes(os.getpid()) < system_memory().total_bytes


@pytest.mark.parametrize(
    ("answer", "memory_gib", "budget_bytes", "is_estimate"),
    [
        ("0\n", 16, 16 * GIB * 2 // 3, True),
        (None, 64, 48 * GIB, True),
        ("nonsense", 32, 32 * GIB * 2 // 3, True),
        ("12288\n", 16, 12 * GIB, False),
    ],
)
def test_the_budget_of_a_mac(answer, memory_gib, budget_bytes, is_estimate):
    asked = []

    def run(command):
        asked.append(list(command))
        return answer

    found = gpu_memory(SystemMemory(memory_gib * GIB, 0, 0, 0), run=run, is_apple_silicon=True)
    assert (found.budget_bytes, found.is_estimate) == (budget_bytes, is_estimate)
    assert found.used_bytes is None and asked == [
        ["/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"]
    ]


def test_the_memory_of_a_card(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    asked = []

    def run(command):
        asked.append(list(command))
        return "81559, 1210\n"

    found = gpu_memory(MAC, run=run, is_apple_silicon=False)
    assert (found.budget_bytes, found.used_bytes) == (81559 << 20, 1210 << 20)
    assert asked[0][-1] == "--id=3"


@pytest.mark.parametrize("answer", [None, "", "[N/A], 3", "No devices were found"])
def test_no_card_is_none(answer):
    assert gpu_memory(MAC, run=lambda _: answer, is_apple_silicon=False) is None


# A run


def append(path, text):
    with path.open("a", encoding="utf-8") as handle:
        handle.write(text)


def row(**values):
    return json.dumps(values) + "\n"


def test_the_tail_reads_each_row_once_and_waits_for_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.poll() == []
    append(path, row(step=1, loss=3.0) + row(step=2, loss=2.5, val_loss=2.7) + '{"step": 3, "lo')
    assert [r["step"] for r in tail.poll()] == [1, 2]
    assert tail.poll() == []
    append(path, 'ss": 2.0}\n')
    assert tail.poll() == [{"step": 3, "loss": 2.0}]
    assert tail.latest == {"step": 3, "loss": 2.0, "val_loss": 2.7}


def test_the_tail_begins_again_where_a_resume_cut_or_replaced_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, row(step=1, loss=3.0) + row(step=2, val_loss=2.7))
    tail = MetricsTail(path)
    tail.poll()
    os.truncate(path, len(row(step=1, loss=3.0)))
    assert [r["step"] for r in tail.poll()] == [1]
    assert "val_loss" not in tail.latest
    other = tmp_path / "new"
    append(other, row(step=7) * 9)
    other.replace(path)
    assert len(tail.poll()) == 9


def test_the_tail_survives_what_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, 'garbage\n[1]\n{"step": 4, "loss": NaN, "note": "x", "lr": null}\n')
    tail = MetricsTail(path)
    tail.poll()
    assert tail.latest == {"step": 4}


def test_the_tail_reads_a_file_larger_than_its_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr("core.training.watch._READ_BYTES", 64)
    path = tmp_path / "metrics.jsonl"
    append(path, "".join(row(step=i, loss=i / 7) for i in range(50)))
    assert [r["step"] for r in MetricsTail(path).poll()] == list(range(50))


def test_the_lock_of_a_live_run_names_its_process(tmp_path):
    with RunFolder(tmp_path / "a"):
        found = run_status(tmp_path / "a")
    assert (found.state, found.pid) == ("running", os.getpid())
    assert found.process.rss_bytes > 1 << 20


def lock(folder, *, started=None, host=None):
    data = {
        "pid": os.getpid(),
        "started": time.time() if started is None else started,
        "host": platform.node() if host is None else host,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").write_text(json.dumps(data))
    return folder


def test_a_process_that_inherited_the_number_is_not_the_run(tmp_path):
    """The lock is older than the process of that number: the run has ended."""
    started = psutil.Process().create_time() - 3600
    assert run_status(lock(tmp_path / "a", started=started)).state == "ended"


def test_a_run_on_another_machine_is_not_looked_for_here(tmp_path):
    found = run_status(lock(tmp_path / "a", host="elsewhere.local"))
    assert (found.state, found.host, found.process) == ("elsewhere", "elsewhere.local", None)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x"}'])
def test_a_broken_lock_is_unknown(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    assert run_status(tmp_path).state == "unknown"


def test_the_newest_run_is_the_one_written_last(tmp_path):
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        folder = tmp_path / name / "logs"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(row(step=1))
        os.utime(folder / "metrics.jsonl", (NOW - age, NOW - age))
    (tmp_path / "empty").mkdir()
    assert newest_run(tmp_path) == tmp_path / "new"
    assert newest_run(tmp_path / "none") is None


# What is shown


def snapshot(**changes):
    values = {
        "system": MAC,
        "gpu": GpuMemory(12 * GIB, None, "macOS's default", is_estimate=True),
        "run": Path("checkpoints/stories-1"),
        "status": RunStatus("running", 42, "mac", ProcessMemory(42, GIB, 3 * GIB, NOW)),
        "metrics": {
            "step": 1043,
            "loss": 0.47123,
            "tokens_processed": 4_300_123,
            "memory_active_bytes": 6 * GIB,
            "memory_peak_bytes": 7 * GIB,
            "timestamp": NOW - 3,
        },
    }
    return Snapshot(**{**values, **changes})


def rendered(shot, **options):
    console = Console(file=io.StringIO(), width=80, record=True, force_terminal=False)
    console.print(view(shot, NOW, **options))
    return console.export_text()


def test_the_view_fits_80_columns_and_shows_the_figures():
    text = rendered(snapshot())
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "checkpoints/stories-1   running, process 42, last row 3 s ago",
        "12.9 GB of 17.2 GB",
        "75 %",
        "6.44 GB of about 12.9 GB",
        "3.22 GB footprint",
        "1,043",
        "0.4712",
        "4,300,123",
    ):
        assert words in text


def test_missing_figures_are_absent_and_never_zero():
    empty = snapshot(
        system=SystemMemory(16 * GIB, 8 * GIB, None, None),
        gpu=None,
        run=None,
        status=RunStatus("unknown"),
        metrics={},
    )
    text = rendered(empty) + line(empty, NOW)
    for word in ("swap", "GPU", "process", "loss", "step", "None", "0.00 GB"):
        assert word not in text
    found = as_object(empty, NOW)
    assert set(found) == {"timestamp", "system"}
    assert set(found["system"]) == {"total_bytes", "available_bytes"}


def test_ascii_terminals_get_ascii():
    rendered(snapshot(), ascii_only=True).encode("ascii")
    assert bar(0.5, ascii_only=True) == "#" * 8 + "." * 8
    assert bar(7.0, ascii_only=True, cells=24) == "#" * 24


def test_warnings_say_what_matters_now():
    assert warnings(snapshot(), NOW) == []
    low = snapshot(system=SystemMemory(16 * GIB, GIB, 0, 0))
    assert "1.07 GB of memory are left" in warnings(low, NOW)[0]
    above = snapshot(metrics={"memory_peak_bytes": 13 * GIB})
    assert "above what the GPU may use" in warnings(above, NOW)[0]
    silent = snapshot(metrics={"timestamp": NOW - 600})
    assert "nothing for 10 min" in warnings(silent, NOW)[0]
    ended = snapshot(metrics={"timestamp": NOW - 600}, status=RunStatus("ended", 42, "mac"))
    assert warnings(ended, NOW) == []


def test_a_watch_follows_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("core.training.watch.gpu_memory", lambda _system: None)
    run = tmp_path / "a"
    with RunFolder(run):
        watch = Watch(run)
        assert watch.look().metrics == {}
        append(run / "logs" / "metrics.jsonl", row(step=5, loss=1.5))
        found = as_object(watch.look(), NOW)
    assert found["run"]["metrics"] == {"step": 5, "loss": 1.5}
    assert found["run"]["state"] == "running" and found["run"]["pid"] == os.getpid()
    assert found["run"]["process"]["memory_bytes"] > 1 << 20
    json.dumps(found, allow_nan=False)


def test_an_unknown_run_lists_nothing_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["nowhere", "--once"]) == 2
    assert "no run is called 'nowhere'" in capsys.readouterr().err
    assert main(["--once", "--interval", "0"]) == 2


def test_without_a_terminal_each_look_is_one_plain_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--once"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "system" in out and "\x1b" not in out


def test_the_tool_loads_no_framework(tmp_path):
    """Run as a script from another folder, it prints one object and has imported neither."""
    run = lock(tmp_path / "checkpoints" / "a")
    (run / "logs").mkdir()
    append(run / "logs" / "metrics.jsonl", row(step=9, loss=0.5))
    script = ROOT / "tools" / "memory_monitor.py"
    code = (
        "import runpy, sys; sys.argv = ['x', '--once', '--json']\n"
        f"sys.path.insert(0, {str(script.parent)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    loaded = {m.partition('.')[0] for m in sys.modules}\n"
        "    print(sorted(loaded & {'torch', 'mlx', 'jax'}), end.code, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stderr.split() == ["[]", "0"]
    found = json.loads(done.stdout)
    assert found["run"]["metrics"] == {"step": 9, "loss": 0.5}
    assert found["run"]["folder"] == str(Path("checkpoints") / "a")


def test_the_tool_runs_as_a_script_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "memory_monitor.py"), "--once", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert json.loads(done.stdout)["system"]["total_bytes"] > 0
