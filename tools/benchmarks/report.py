"""Measurements, some with a floor or ceiling that must hold, as a table or as JSON."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

GB = 1e9
# Processors that other programs may keep busy without being mentioned.
QUIET = 0.2


@dataclass(frozen=True)
class Measured:
    """One figure.

    Attributes:
        name: What was measured.
        value: The figure, None where this machine cannot tell.
        unit: Its unit.
        most: The most it may be, None where nothing is demanded.
        least: The least it may be, None where nothing is demanded.
        note: How it was measured, or what it is made of.
    """

    name: str
    value: float | None
    unit: str
    most: float | None = None
    note: str = ""
    least: float | None = None

    @property
    def ok(self) -> bool:
        """Whether what is demanded holds; a figure that is missing does not pass."""
        if not self.demanded:
            return True
        most = math.inf if self.most is None else self.most
        least = -math.inf if self.least is None else self.least
        return self.value is not None and least <= self.value <= most

    @property
    def demanded(self) -> bool:
        """Whether anything must hold."""
        return self.most is not None or self.least is not None


class OtherLoad:
    """How much of the machine other programs used meanwhile: what spoils a measurement."""

    def __init__(self) -> None:
        """Start to count."""
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Processor seconds of everything else, and of the clock."""
        system = psutil.cpu_times()
        waiting = system.idle + getattr(system, "iowait", 0.0)
        return sum(system) - waiting - time.process_time(), time.perf_counter()

    def figure(self) -> Measured:
        """Processors that others kept busy since the start."""
        now = self._now()
        busy = max(now[0] - self._start[0], 0.0) / max(now[1] - self._start[1], 1e-9)
        note = "quiet" if busy < QUIET else "not quiet: measure again"
        return Measured("other programs", busy, "processors", note=note)


def show(console: Console, title: str, rows: Sequence[Measured]) -> None:
    """Print a table."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("quantity")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("wanted", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("note")
    for row in rows:
        verdict = "[green]PASS[/]" if row.ok else "[bold red]FAIL[/]"
        wanted = "" if row.most is None else f"<= {number(row.most)}"
        wanted += "" if row.least is None else f">= {number(row.least)}"
        shown = verdict if row.demanded else ""
        table.add_row(row.name, number(row.value), row.unit, wanted, shown, row.note)
    console.print(table)


def number(value: float | None) -> str:
    """Three digits, or "-" for what is not known."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def as_object(rows: Sequence[Measured], **facts: Any) -> dict[str, Any]:
    """Everything, for scripts."""
    figures = {
        row.name: {
            "value": row.value,
            "unit": row.unit,
            "most": row.most,
            "least": row.least,
            "ok": row.ok,
            "note": row.note,
        }
        for row in rows
    }
    return {"ok": all(row.ok for row in rows), "figures": figures, **facts}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number the mean of both."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
