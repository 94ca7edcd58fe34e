"""How a look is shown: a screen of a terminal, or one line."""

import time

from rich.console import Group
from rich.table import Table
from rich.text import Text

from core.machine.pressure import PRESSURE_NAMES
from core.training.runfolder import RUNS_DIR
from core.training.watch import Snapshot
from tools.monitoring.history import History, graph
from tools.monitoring.notes import is_mixed, warnings
from tools.monitoring.words import duration, gigabytes

BAR_CELLS = 16
# What a row of memory needs besides its graph.
ROW_CELLS = 59
GB = 1e9
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


def bar(fraction: float, *, ascii_only: bool, cells: int = BAR_CELLS) -> str:
    """A bar of `cells` characters."""
    full, empty = ("#", ".") if ascii_only else ("\u2501", "\u2504")
    filled = round(min(1.0, max(0.0, fraction)) * cells)
    return full * filled + empty * (cells - filled)


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
    return rows


def fact_rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    """(name, words) of what has no course: pressure, predicted against actual, other programs."""
    rows = []
    if snapshot.pressure is not None:
        rows.append(("pressure", PRESSURE_NAMES[snapshot.pressure]))
    plan, most = snapshot.plan, snapshot.run_peak_bytes
    if plan is not None:
        words = gigabytes(plan.predicted_bytes)
        if most is not None:
            share = 100 * most / plan.predicted_bytes
            with_rest = f", with what {snapshot.after} left" if is_mixed(snapshot) else ""
            words += f" predicted, {gigabytes(most)} at most so far ({share:.0f} %{with_rest})"
        rows.append(("run", f"{words}, {plan.micro_batch_size} x {plan.grad_accum_steps} rows"))
    elif most is not None:
        rows.append(("run", f"{gigabytes(most)} at most so far"))
    if snapshot.others:
        rows.append(
            (
                "others",
                " \u00b7 ".join(
                    f"{o.name[:20]} {gigabytes(o.memory_bytes)}" for o in snapshot.others
                ),
            )
        )
    return rows


def figures(snapshot: Snapshot) -> list[tuple[str, str]]:
    """(label, value) of every figure that the run has logged."""
    found = []
    for key, (label, form) in FIGURES.items():
        value = snapshot.metrics.get(key)
        if isinstance(value, (int, float)):
            found.append((label, form.format(value)))
    return found


def headline(snapshot: Snapshot, now: float, width: int | None = None) -> str:
    """Which run this is, and whether it runs; a long path loses its beginning to fit the width."""
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
    path = str(snapshot.run)
    room = len(path) if width is None else max(12, width - len(words) - len(age) - 4)
    return f"{path if len(path) <= room else '...' + path[3 - room :]}   {words}{age}"


def view(
    snapshot: Snapshot,
    now: float,
    *,
    history: History | None = None,
    alerts: list[str] | None = None,
    width: int = 80,
    ascii_only: bool = False,
) -> Group:
    """The whole screen.

    Args:
        snapshot: The newest look.
        now: Seconds since 1970.
        history: All looks; without it bars are shown instead of their course.
        alerts: What `--alert-at` found.
        width: Columns of the terminal.
        ascii_only: Whether its encoding is not UTF-8.
    """
    history = history or History()
    parts: list[Text | Table] = [_line(headline(snapshot, now, width), width, "bold"), Text()]
    parts.append(_memory(snapshot, history, width, ascii_only=ascii_only))
    for name, words in fact_rows(snapshot):
        words = words.replace("\u00b7", "-") if ascii_only else words
        parts.append(_line(f"{name:<9} {words}", width))
    shown_figures = figures(snapshot)
    if shown_figures:
        grid = Table.grid(padding=(0, 2))
        for first in range(0, len(shown_figures), 4):
            cells = [c for pair in shown_figures[first : first + 4] for c in pair]
            grid.add_row(" " + cells[0], *(Text(c, style="") for c in cells[1:]))
        parts += [Text(), grid]
    notes = warnings(snapshot, now, history)
    if notes or alerts:
        parts.append(Text())
        parts += [_note(f"! {alert}", "bold red") for alert in alerts or ()]
        parts += [_note(f"! {note}", "yellow") for note in notes]
    return Group(*parts)


def _line(text: str, width: int, style: str = "") -> Text:
    """One line that is cut, not wrapped."""
    line = Text(f" {text}", style=style, no_wrap=True, overflow="ellipsis")
    line.truncate(width, overflow="ellipsis")
    return line


def _note(text: str, style: str) -> Text:
    return Text(f" {text}", style=style)


def _memory(snapshot: Snapshot, history: History, width: int, *, ascii_only: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    for column in range(5):
        table.add_column(no_wrap=True, justify="right" if column == 2 else "left")
    cells = max(8, width - ROW_CELLS)
    for name, share, words in memory_rows(snapshot):
        style = "" if share is None else "red" if share > 0.9 else "yellow" if share > 0.75 else ""
        series = history[name]
        shown = "" if share is None else bar(share, ascii_only=ascii_only, cells=cells)
        values = series.values()
        if len(values) > 1:
            # Swap has no limit of its own: its course is shown against its peak, from a GB on.
            limit = values[-1] / share if share else max(series.peak, GB)
            shown = graph(values, limit, cells, ascii_only=ascii_only)
        percent = "" if share is None else f"{100 * share:3.0f} %"
        peak = f"peak {gigabytes(series.peak)}" if len(values) > 1 else ""
        table.add_row(f" {name:<8}", Text(shown, style=style), percent, words, peak)
    return table


def line(
    snapshot: Snapshot,
    now: float,
    *,
    history: History | None = None,
    alerts: list[str] | None = None,
) -> str:
    """The same as one line, for a log."""
    cells = [time.strftime("%H:%M:%S", time.localtime(now)), headline(snapshot, now)]
    cells += [f"{name} {words}" for name, _, words in memory_rows(snapshot)]
    cells += [f"{name} {words}" for name, words in fact_rows(snapshot)]
    cells += [f"{label} {value}" for label, value in figures(snapshot)]
    cells += [f"! {alert}" for alert in alerts or ()]
    cells += [f"! {note}" for note in warnings(snapshot, now, history)]
    return "  ".join(cells)
