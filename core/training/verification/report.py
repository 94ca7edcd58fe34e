"""The report of a setup verification: one line a check, and what to do where one fails."""

import json
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "fail", "skipped"]
MARKS: dict[Status, str] = {"pass": "ok", "fail": "FAIL", "skipped": "skip"}


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        group: "machine", "config", "data", "memory", "disk", or "backend mlx".
        name: What was checked.
        status: Whether it is so; skipped where it cannot be asked here.
        figure: What was found, in words.
        value: The figure as a number, where it is one.
        tolerance: The most that `value` may be.
        remedy: What to do where it fails.
    """

    group: str
    name: str
    status: Status
    figure: str = ""
    value: float | None = None
    tolerance: float | None = None
    remedy: str = ""


@dataclass
class Report:
    """All checks of one verification, and the facts of the machine."""

    facts: Mapping[str, Any]
    summary: str
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        """Checks that failed."""
        return [c for c in self.checks if c.status == "fail"]

    @property
    def exit_code(self) -> int:
        """0 where nothing failed, else 1."""
        return 1 if self.failed else 0

    def to_json(self) -> str:
        """One object: ok, counts, facts and every check."""
        return json.dumps(
            {
                "ok": not self.failed,
                "counts": self.counts(),
                "seconds": round(self.seconds, 2),
                "machine": self.summary,
                "facts": self.facts,
                "checks": [_plain(c) for c in self.checks],
            },
            allow_nan=False,
        )

    def counts(self) -> dict[str, int]:
        """Number of checks by status."""
        return {s: sum(c.status == s for c in self.checks) for s in MARKS}


def _plain(check: Check) -> dict[str, Any]:
    """JSON has no infinity and no NaN: such a value is null, and the figure says it."""
    out = asdict(check)
    out["remedy"] = check.remedy if check.status == "fail" else ""
    value = check.value
    out["value"] = value if value is not None and abs(value) < float("inf") else None
    return out


class Printer:
    """Prints checks as they come, under the name of their group."""

    def __init__(self, write: Callable[[str], Any], *, width: int | None = None) -> None:
        self.write = write
        self.width = width or min(shutil.get_terminal_size((100, 24)).columns, 110)
        self._group = ""

    def check(self, check: Check) -> None:
        """One line, and the remedy below a failure."""
        if check.group != self._group:
            self._group = check.group
            self.write(f"\n {check.group}")
        head = f"  {MARKS[check.status]:<5}{check.name:<34} "
        self._wrapped(head, check.figure)
        if check.status == "fail" and check.remedy:
            self._wrapped("       try: ", check.remedy)

    def _wrapped(self, head: str, text: str) -> None:
        indent = " " * len(head)
        lines = [
            part
            for line in text.splitlines() or [""]
            for part in textwrap.wrap(line, max(20, self.width - len(head))) or [""]
        ]
        self.write((head + lines[0]).rstrip())
        for line in lines[1:]:
            self.write((indent + line).rstrip())

    def end(self, report: Report) -> None:
        """The count, and the failures once more."""
        counts = report.counts()
        words = f"{counts['pass']} passed, {counts['fail']} failed, {counts['skipped']} skipped"
        self.write(f"\n {words} in {report.seconds:.0f} s")
        for check in report.failed:
            self.write(f"  {MARKS['fail']} {check.group}: {check.name}")


def measured(
    group: str, name: str, value: float, tolerance: float, *, remedy: str, unit: str = ""
) -> Check:
    """A check of a number against the most that it may be; NaN fails."""
    good = value <= tolerance
    figure = f"{value:.2g}{unit}, at most {tolerance:.2g}{unit}"
    return Check(group, name, "pass" if good else "fail", figure, float(value), tolerance, remedy)


def worst(values: Sequence[float]) -> float:
    """The largest; NaN where one is NaN, which Python's max would lose."""
    return float("nan") if any(v != v for v in values) else max(values, default=0.0)
