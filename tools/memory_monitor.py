"""Watch memory and a run, from a process of its own: the run does not know and is not slowed.

    python tools/memory_monitor.py                 the newest run below ./checkpoints
    python tools/memory_monitor.py stories-1 --interval 5
    python tools/memory_monitor.py --once --json   one object, for scripts

It loads neither torch nor MLX: memory comes from the system, the run's figures from its own log. On
a terminal the view is redrawn in place, elsewhere it is one line at each look. Ctrl-C ends it.
"""

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120

import json
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.cli import guarded, make_parser
from core.errors import PippinError
from core.training.runfolder import RUNS_DIR, find_run
from core.training.watch import Snapshot, Watch, as_object, newest_run

BAR_CELLS = 24
# A system with less than this share of its memory free is about to swap or to kill.
LOW_FRACTION = 0.1
STALE_S = 120.0
GB = 1e9


def gigabytes(value: float) -> str:
    """Bytes as GB of 10^9, three digits."""
    gb = value / GB
    return f"{gb:.0f} GB" if gb >= 100 else f"{gb:.1f} GB" if gb >= 10 else f"{gb:.2f} GB"


def duration(seconds: float) -> str:
    """A rounded duration."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def bar(fraction: float, *, ascii_only: bool) -> str:
    """A bar of `BAR_CELLS` characters."""
    full, empty = ("#", ".") if ascii_only else ("\u2501", "\u2504")
    cells = round(min(1.0, max(0.0, fraction)) * BAR_CELLS)
    return full * cells + empty * (BAR_CELLS - cells)


def memory_rows(snapshot: Snapshot) -> list[tuple[str, float | None, str]]:
    """Rows (name, share in use or None, words)."""
    system, gpu, process = snapshot.system, snapshot.gpu, snapshot.status.process
    used = system.total_bytes - system.available_bytes
    words = f"{gigabytes(used)} of {gigabytes(system.total_bytes)}"
    rows: list[tuple[str, float | None, str]] = [("system", used / system.total_bytes, words)]
    if system.swap_used_bytes is not None:
        rows.append(("swap", None, f"{gigabytes(system.swap_used_bytes)} in use"))
    if gpu is not None:
        active = snapshot.metrics.get("memory_active_bytes")
        in_use = gpu.used_bytes if gpu.used_bytes is not None else active
        about = "about " if gpu.is_estimate else ""
        budget = f"{about}{gigabytes(gpu.budget_bytes)}"
        if in_use is None:
            rows.append(("GPU", None, f"{budget} may be used"))
        else:
            rows.append(("GPU", in_use / gpu.budget_bytes, f"{gigabytes(in_use)} of {budget}"))
    if process is not None:
        kind = "resident" if process.footprint_bytes is None else "footprint"
        share = process.memory_bytes / system.total_bytes
        rows.append(("process", share, f"{gigabytes(process.memory_bytes)} {kind}"))
    for key, name in (("memory_active_bytes", "run now"), ("memory_peak_bytes", "run peak")):
        if key in snapshot.metrics:
            rows.append((name, None, f"{gigabytes(snapshot.metrics[key])} on the device"))
    return rows


# Metric -> (label, how it is shown).
FIGURES = {
    "step": ("step", "{:,.0f}"),
    "loss": ("loss", "{:.4g}"),
    "val_loss": ("val", "{:.4g}"),
    "learning_rate": ("lr", "{:.3g}"),
    "grad_norm": ("grad", "{:.3g}"),
    "tokens_processed": ("tokens", "{:,.0f}"),
    "throughput_tokens_per_sec": ("tok/s", "{:,.0f}"),
    "step_time_sec": ("s/step", "{:.3g}"),
}


def figures(snapshot: Snapshot) -> list[tuple[str, str]]:
    """(label, value) of every figure that the run has logged."""
    found = []
    for key, (label, form) in FIGURES.items():
        value = snapshot.metrics.get(key)
        if isinstance(value, (int, float)):
            found.append((label, form.format(value)))
    return found


def warnings(snapshot: Snapshot, now: float) -> list[str]:
    """What a person should know now."""
    system, gpu, notes = snapshot.system, snapshot.gpu, []
    if system.available_bytes < LOW_FRACTION * system.total_bytes:
        notes.append(f"only {gigabytes(system.available_bytes)} of memory are left")
    peak = snapshot.metrics.get("memory_peak_bytes")
    if gpu is not None and peak is not None and peak > gpu.budget_bytes:
        notes.append("the run's peak is above what the GPU may use: a smaller micro-batch is safer")
    stamp = snapshot.metrics.get("timestamp")
    if snapshot.status.state == "running" and stamp is not None and now - stamp > STALE_S:
        notes.append(f"the run has logged nothing for {duration(now - stamp)}")
    return notes


def headline(snapshot: Snapshot, now: float) -> str:
    """Which run this is, and whether it runs."""
    if snapshot.run is None:
        return f"no run below ./{RUNS_DIR}"
    status = snapshot.status
    words = {
        "running": f"running, process {status.pid}",
        "ended": "ended",
        "elsewhere": f"on {status.host}",
        "unknown": "no process known",
    }[status.state]
    stamp = snapshot.metrics.get("timestamp")
    age = "" if stamp is None else f", last row {duration(max(0.0, now - stamp))} ago"
    return f"{snapshot.run}   {words}{age}"


def view(snapshot: Snapshot, now: float, *, ascii_only: bool = False) -> Group:
    """The whole view, at most 80 columns."""
    table = Table.grid(padding=(0, 2))
    for name, share, words in memory_rows(snapshot):
        style = "" if share is None else "red" if share > 0.9 else "yellow" if share > 0.75 else ""
        shown = "" if share is None else bar(share, ascii_only=ascii_only)
        percent = "" if share is None else f"{100 * share:3.0f} %"
        table.add_row(f" {name}", Text(shown, style=style), percent, words)
    parts: list[Text | Table] = [Text(f" {headline(snapshot, now)}", style="bold"), Text(), table]
    shown_figures = figures(snapshot)
    if shown_figures:
        grid = Table.grid(padding=(0, 2))
        for first in range(0, len(shown_figures), 4):
            cells = [c for pair in shown_figures[first : first + 4] for c in pair]
            grid.add_row(" " + cells[0], *(Text(c, style="") for c in cells[1:]))
        parts += [Text(), grid]
    notes = warnings(snapshot, now)
    if notes:
        parts += [Text(), *(Text(f" ! {note}", style="yellow") for note in notes)]
    return Group(*parts)


def line(snapshot: Snapshot, now: float) -> str:
    """The same as one line, for a log."""
    cells = [time.strftime("%H:%M:%S", time.localtime(now)), headline(snapshot, now)]
    cells += [f"{name} {words}" for name, _, words in memory_rows(snapshot)]
    cells += [f"{label} {value}" for label, value in figures(snapshot)]
    cells += [f"! {note}" for note in warnings(snapshot, now)]
    return "  ".join(cells)


def watch(watcher: Watch, interval: float, *, as_json: bool, count: int | None) -> None:
    """Look `count` times, or until Ctrl-C."""
    console = Console()
    live = console.is_terminal and not as_json and count is None
    if not live:
        while count is None or count > 0:
            snapshot, now = watcher.look(), time.time()
            if as_json:
                print(json.dumps(as_object(snapshot, now), allow_nan=False), flush=True)
            elif console.is_terminal:
                console.print(view(snapshot, now))
            else:
                print(line(snapshot, now), flush=True)
            count = None if count is None else count - 1
            if count != 0:
                time.sleep(interval)
        return
    ascii_only = "utf" not in console.encoding.lower()
    with Live(console=console, auto_refresh=False) as display:
        while True:
            shown = view(watcher.look(), time.time(), ascii_only=ascii_only)
            display.update(shown, refresh=True)
            time.sleep(interval)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv

    def run() -> int:
        parser = make_parser("tools/memory_monitor.py", __doc__)
        parser.add_argument("run", nargs="?", help="run name or folder (the newest)")
        parser.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds (2)")
        parser.add_argument("--once", action="store_true", help="look once")
        parser.add_argument("--json", action="store_true", help="one JSON object a line")
        parser.add_argument("--debug", action="store_true", help="show tracebacks")
        args = parser.parse_args(given)
        if not 0.1 <= args.interval <= 3600:
            raise PippinError("P012", f"--interval is {args.interval}; it must be 0.1 to 3600 s.")
        watcher = Watch(newest_run(RUNS_DIR) if args.run is None else find_run(args.run))
        watch(watcher, args.interval, as_json=args.json, count=1 if args.once else None)
        return 0

    return guarded(run, debug="--debug" in given)


if __name__ == "__main__":
    sys.exit(main())
