"""The monitor's course of memory: graphs, pace, alerts, the table, and the screen itself.

Run: python -m pytest tests/unit/test_monitoring.py
"""

import csv
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from core.errors import PippinError
from core.machine.memory import predict_training_memory
from core.machine.neighbours import OtherProcess, large_processes
from core.machine.pressure import NORMAL, WARNING
from core.machine.system import GpuMemory, ProcessMemory, SystemMemory
from core.params import param_specs
from core.training.runfolder import RunFolder
from core.training.watch import MemoryPlan, RunStatus, Snapshot, Watch, as_object, read_plan
from tests.helpers import tiny_config
from tools.memory_monitor import EXIT_ALERT, Monitor, Wishes, main, parse_share, watch
from tools.monitoring.history import History, Series, graph
from tools.monitoring.notes import alerts, warnings
from tools.monitoring.table import COLUMNS, CsvFile, csv_row
from tools.monitoring.view import fact_rows, headline, view

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
NOW = 1_000_000.0
PLAN = MemoryPlan(6 * GIB, 0.8, 16, 1, is_shared=True)


def mac(*, free=6.0, swap=0.2, process=5.0, active=4.0, pressure=NORMAL, **changes):
    """A 16 GB Mac that trains; sizes in GiB, swap in GB."""
    values = {
        "system": SystemMemory(16 * GIB, int(free * GIB), int(swap * 1e9), 3 * GIB),
        "gpu": GpuMemory(int(10.7 * GIB), None, "macOS's default", is_estimate=True),
        "run": Path("checkpoints/stories-1"),
        "status": RunStatus("running", 42, "mac", ProcessMemory(42, GIB, int(process * GIB), NOW)),
        "metrics": {
            "step": 1043,
            "loss": 0.47,
            "memory_active_bytes": int(active * GIB),
            "timestamp": NOW - 3,
        },
        "peaks": {"memory_process_bytes": int(5.5 * GIB)},
        "pressure": pressure,
        "plan": PLAN,
        "others": (OtherProcess("Google Chrome Helper (Renderer)", 20, 3_100_000_000),),
    }
    return Snapshot(**{**values, **changes})


# The course


def test_a_graph_keeps_every_peak_and_stands_at_the_right():
    assert graph([0.0, 1.0], 8.0, 4, ascii_only=False) == "   \u2581"
    assert graph([8.0], 8.0, 3) == "  \u2588" and graph([99.0], 8.0, 1) == "\u2588"
    values = [1.0] * 100
    values[37] = 8.0
    shown = graph(values, 8.0, 10)
    assert len(shown) == 10 and shown.index("\u2588") == 3
    graph(values, 8.0, 10, ascii_only=True).encode("ascii")


def series(points):
    found = Series()
    for t, v in points:
        found.add(t, v)
    return found


def test_growth_counts_from_the_lowest_point_of_the_window():
    found = series([(0, 9.0), (10, 2.0), (20, 1.0), (30, 4.0)])
    assert found.growth(100) == (3.0, 10) and found.peak == 9.0
    assert found.growth(5) == (0.0, 0)
    assert Series().growth(5) == (0.0, 0.0)


def test_the_pace_is_the_slope_of_a_steady_climb():
    steady = series([(2.0 * i, 50 + 0.5 * i) for i in range(41)])  # 0.25 a second, now 70
    assert steady.seconds_to(100) == pytest.approx(30 / 0.25, rel=0.02)
    assert steady.seconds_to(70) is None  # it is there
    jump = series([(2.0 * i, 50 if i < 20 else 70) for i in range(41)])
    assert jump.seconds_to(100) is None  # one allocation is no pace
    flat = series([(2.0 * i, 50 + 0.001 * i) for i in range(41)])
    assert flat.seconds_to(100) is None
    young = series([(0.5 * i, 50 + i) for i in range(20)])
    assert young.seconds_to(100) is None


def looks(snapshots, *, every=2.0):
    history = History()
    for i, snapshot in enumerate(snapshots):
        history.add(snapshot, NOW + every * i)
    return history


def test_nothing_is_said_of_a_calm_mac():
    calm = [mac() for _ in range(30)]
    assert warnings(calm[-1], NOW, looks(calm)) == []


def test_trouble_is_told_before_it_is_there():
    rising = [mac(process=5 + 0.05 * i) for i in range(31)]  # 0.025 GiB/s, budget 8.56 GiB
    found = warnings(rising[-1], NOW, looks(rising))
    assert found == ["at this pace the run's budget is full in 82 s"]  # 2.06 GiB are left
    swapping = [mac(swap=0.2 + 0.05 * i) for i in range(31)]
    assert warnings(swapping[-1], NOW, looks(swapping)) == [
        "swap grew by 1.50 GB in 60 s: steps get slow"
    ]


def test_short_memory_names_what_to_close():
    found = warnings(mac(free=1.0, pressure=WARNING), NOW)
    assert found[0].startswith("only 1.07 GB") and "memory pressure: warning" in found[1]
    assert found[-1] == "closing Google Chrome Helper (Renderer) would free 3.10 GB"


def test_a_run_that_needs_more_than_predicted_is_told():
    above = mac(peaks={"memory_process_bytes": 8 * GIB})
    assert warnings(above, NOW) == ["the run needs 8.59 GB, more than the predicted 6.44 GB"]
    card = mac(plan=MemoryPlan(6 * GIB, 0.8, 16, 1, is_shared=False), peaks=above.peaks)
    assert warnings(card, NOW) == []  # the process is not what was predicted


def test_what_an_earlier_run_of_the_process_left_is_said_and_not_held_against_the_forecast(
    tmp_path,
):
    """Two runs of a sweep, locked by this process one after the other."""
    for name in ("a-lr-0.02", "a-lr-0.01", "b-lr-0.01"):
        with RunFolder(tmp_path / name):
            time.sleep(0.002)
    looks = {
        name: Watch(tmp_path / name, others=False).look()
        for name in ("a-lr-0.02", "a-lr-0.01", "b-lr-0.01")
    }
    assert [look.after for look in looks.values()] == [None, "a-lr-0.02", None]
    assert as_object(looks["a-lr-0.01"], NOW)["run"]["after_in_same_process"] == "a-lr-0.02"
    above = mac(peaks={"memory_process_bytes": 8 * GIB}, after="a-lr-0.02")
    assert warnings(above, NOW) == []
    assert "with what a-lr-0.02 left" in dict(fact_rows(above))["run"]
    card = mac(after="a-lr-0.02", plan=MemoryPlan(6 * GIB, 0.8, 16, 1, is_shared=False))
    assert "left" not in dict(fact_rows(card))["run"]


def test_alerts_are_shares_of_what_there_is():
    assert alerts(mac(free=6.0), None) == [] and alerts(mac(free=6.0), 0.85) == []
    found = alerts(mac(free=2.0, active=9.5, process=9.7), 0.75)
    assert [a.partition(" is at ")[0] for a in found] == [
        "the system's memory",
        "the GPU's memory",
        "the run's budget",
    ]
    # 14 of 16 GiB; 9.5 of 10.7; 9.7 of 0.8 x 10.7
    assert [re.search(r"(\d+) %", a)[1] for a in found] == ["88", "89", "113"]


@pytest.mark.parametrize(
    ("text", "share"), [("85%", 0.85), ("85", 0.85), ("0.85", 0.85), ("1", 1.0), (" 100% ", 1.0)]
)
def test_shares_are_read_as_people_write_them(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "101", "150%", "nan", "inf"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(PippinError) as caught:
        parse_share(text)
    assert caught.value.code == "P012"


# The run's plan


def test_the_plan_is_the_forecast_of_the_runs_own_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr("core.training.watch.gpu_memory", lambda _system: None)
    config = tiny_config(train__micro_batch_size=4, train__grad_accum_steps=3)
    run = tmp_path / "a"
    with RunFolder(run):
        (run / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
        rows = [{"step": 1, "memory_process_bytes": 9e9}, {"step": 2, "memory_process_bytes": 10}]
        (run / "logs" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        watcher = Watch(run)
        found = watcher.look()
        expected = predict_training_memory(config, param_specs(config.model)).total
        assert found.plan == MemoryPlan(expected, 0.8, 4, 3, is_shared=True)
        assert found.run_peak_bytes == 9_000_000_000
        out = as_object(found, NOW)["run"]
        assert (out["predicted_bytes"], out["peak_bytes"]) == (expected, 9_000_000_000)
        # Written again where memory ran out: seen at the next look.
        smaller = tiny_config(train__micro_batch_size=2, train__grad_accum_steps=6)
        (run / "config.json").write_text(json.dumps(smaller.model_dump(mode="json")))
        os.utime(run / "config.json", (NOW, NOW))
        assert watcher.look().plan.micro_batch_size == 2
    for broken in ("", "{", '{"model": {}}'):
        (run / "config.json").write_text(broken)
        assert read_plan(run) is None


def test_programs_of_one_name_count_together():
    table = [
        (1, "Chrome", 300),
        (2, "Chrome", 400),
        (3, "train", 9000),
        (4, "sh", 10),
        (5, "X", 700),
    ]
    found = large_processes(
        without={3}, min_bytes=100, list_processes=lambda: table, footprint=lambda _pid: None
    )
    assert found == (OtherProcess("Chrome", 2, 700), OtherProcess("X", 1, 700))
    found = large_processes(
        most=1, min_bytes=1, list_processes=lambda: table, footprint=lambda pid: 10**5 * pid
    )
    assert found == (OtherProcess("X", 1, 500_000),)
    assert all(o.memory_bytes >= 1 for o in large_processes(min_bytes=1, most=2))


# The table


def test_the_table_is_appended_and_read_back(tmp_path):
    path = tmp_path / "m.csv"
    for _ in range(2):
        table = CsvFile(path)
        table.add(csv_row(mac(), NOW, ["a", "b"]))
        table.close()
    with path.open(newline="") as handle:
        found = list(csv.DictReader(handle))
    assert len(found) == 2 and tuple(found[0]) == COLUMNS
    assert found[1]["run_bytes"] == str(5 * GIB) and found[1]["memory_pressure"] == "normal"
    assert found[1]["predicted_bytes"] == str(6 * GIB) and found[1]["alerts"] == "a; b"
    assert found[1]["throughput_tokens_per_sec"] == ""


def test_a_table_of_somebody_else_is_never_written(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("name,salary\n")
    with pytest.raises(PippinError) as caught:
        CsvFile(path)
    assert caught.value.code == "P012" and path.read_text() == "name,salary\n"
    with pytest.raises(PippinError):
        CsvFile(tmp_path / "no" / "such" / "folder.csv")


# What is shown


def rendered(snapshots, width, **more):
    console = Console(file=io.StringIO(), width=width, record=True, force_terminal=False)
    console.print(view(snapshots[-1], NOW, history=looks(snapshots), width=width, **more))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_fits_and_says_what_it_should(width):
    snapshots = [mac(process=5 + 0.05 * i) for i in range(31)]
    text = rendered(snapshots, width, alerts=["the run's budget is at 90 %"])
    assert max(map(len, text.splitlines())) <= width
    for words in (
        "peak 6.98 GB",
        "pressure  normal",
        "6.44 GB predicted, 6.98 GB at most so far (108 %), 16 x 1 rows",
        "others    Google Chrome Helper 3.10 GB",
        "! the run's budget is at 90 %",
        "\u2582\u2583",
    ):
        assert words in text, text
    rendered(snapshots, width, ascii_only=True).encode("ascii")


def test_a_long_path_loses_its_beginning_and_not_what_follows():
    long = mac(run=Path("checkpoints/" + "x" * 90 + "-end"))
    text = headline(long, NOW, 80)
    assert len(text) <= 80 and text.startswith("...") and "-end   running, process 42" in text
    assert "last row 3 s ago" in text


def test_without_a_plan_the_peak_is_still_told():
    rows = dict(fact_rows(mac(plan=None, pressure=None, others=())))
    assert rows == {"run": "5.91 GB at most so far"}


def test_looks_in_a_row_alert_once_and_end_with_their_code(tmp_path, capsys):
    shown = [mac(), mac(free=1.0), mac(free=1.0), mac(), mac(free=1.0)]
    times = iter(range(100))
    monitor = Monitor(
        iter(shown).__next__, Wishes(0.1, alert_at=0.9), clock=lambda: NOW + next(times)
    )
    assert [monitor.look()[2] for _ in shown] == [False, True, False, False, True]
    one = Wishes(0.1, count=1, alert_at=0.9)
    plain = Console(file=io.StringIO(), force_terminal=False)
    assert watch(Monitor(lambda: mac(free=1.0), one), one, plain) == EXIT_ALERT
    assert "! the system's memory is at 94 %" in capsys.readouterr().out
    assert watch(Monitor(mac, one), one, plain) == 0
    capsys.readouterr()
    wishes = Wishes(0.1, as_json=True, count=1, alert_at=0.9)
    assert watch(Monitor(lambda: mac(free=1.0), wishes), wishes, plain) == EXIT_ALERT
    found = json.loads(capsys.readouterr().out)
    assert len(found["alerts"]) == 1 and found["memory_pressure"] == "normal"
    assert found["other_processes"][0]["processes"] == 20 and found["warnings"]


def test_the_command_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--once", "--csv", "m.csv", "--alert-at", "100%"]) == 0
    assert (tmp_path / "m.csv").read_text().count("\n") == 2
    assert main(["--once", "--alert-at", "much"]) == 2
    assert "--alert-at is much" in capsys.readouterr().err


def screen_of(command, columns, cwd, *, until, timeout=30.0):
    """What a terminal of this width shows when `until` was seen and Ctrl-C typed; (lines, code)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=env, start_new_session=True
    )
    os.close(slave)
    data, deadline, typed = b"", time.monotonic() + timeout, False
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                data += os.read(master, 65536)
            except OSError:  # Linux's way to say that the other end has gone: it is ending
                child.wait(max(0.0, deadline - time.monotonic()))
                break
        if not typed and until(data.decode(errors="replace")):
            child.send_signal(2)
            typed = True
        if child.poll() is not None and not select.select([master], [], [], 0.1)[0]:
            break
    child.kill() if child.poll() is None else None
    os.close(master)
    return emulate(data.decode(errors="replace"), columns), child.wait()


def emulate(text, columns):
    """The lines of a terminal that knows CR, LF, cursor up and erase line."""
    lines, row, col, i = [[]], 0, 0, 0
    escape = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
    while i < len(text):
        found = escape.match(text, i)
        if found:
            if found[2] == "A":
                row = max(0, row - int(found[1] or 1))
            elif found[2] == "K":
                lines[row] = []
            i = found.end()
            continue
        if text[i] == "\r":
            col = 0
        elif text[i] == "\n":
            row += 1
            lines += [[] for _ in range(row + 1 - len(lines))]
        elif text[i] != "\x07":
            assert col < columns, f"line {row} wraps"
            lines[row] += [" "] * (col + 1 - len(lines[row]))
            lines[row][col] = text[i]
            col += 1
        i += 1
    return ["".join(line).rstrip() for line in lines]


@pytest.mark.parametrize("columns", [80, 120])
def test_in_a_terminal_it_is_redrawn_in_place_until_ctrl_c(tmp_path, columns):
    run = tmp_path / "checkpoints" / "a"
    with RunFolder(run):
        config = tiny_config()
        (run / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
        (run / "logs" / "metrics.jsonl").write_text('{"step": 5, "loss": 1.5}\n')
        script = str(ROOT / "tools" / "memory_monitor.py")
        lines, code = screen_of(
            [sys.executable, script, "--interval", "0.1"],
            columns,
            tmp_path,
            until=lambda text: text.count("peak") > 12,  # several times redrawn
        )
    assert code == 130
    text = "\n".join(lines)
    assert len([line for line in lines if line.startswith(" system")]) == 1, text
    assert f"running, process {os.getpid()}" in lines[0]
    assert re.search(r"process +[\u2581-\u2588]+ +\d+ %", text), text
    assert "predicted" in text and "step" in text and "Traceback" not in text
