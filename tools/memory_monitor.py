"""Watch memory and a run, from a process of its own: the run does not know and is not slowed.

    python tools/memory_monitor.py                 the newest run below ./checkpoints
    python tools/memory_monitor.py stories-1 --interval 5
    python tools/memory_monitor.py --alert-at 85% --csv memory.csv
    python tools/memory_monitor.py --once --json   one object, for scripts

It loads neither torch nor MLX: memory comes from the system, the run's figures from its own folder. On
a terminal the course of memory is drawn in place, elsewhere it is one line at each look. Ctrl-C ends it.
`--alert-at` rings the bell when the machine, the GPU or the run passes that share of its limit; with
`--once` the exit code is then 1.
"""

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from core.environment import use_environment

    use_environment()

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from core.cli import guarded, make_parser
from core.errors import PippinError
from core.training.runfolder import RUNS_DIR, find_run
from core.training.watch import Snapshot, Watch, as_object, newest_run
from tools.monitoring.history import History
from tools.monitoring.notes import alerts, warnings
from tools.monitoring.table import CsvFile, csv_row
from tools.monitoring.view import line, view

EXIT_ALERT = 1


@dataclass(frozen=True)
class Wishes:
    """What was asked for: seconds between looks, the form, how often, and when to alert."""

    interval: float
    as_json: bool = False
    count: int | None = None
    alert_at: float | None = None


def parse_share(text: str) -> float:
    """A share of a limit: "85%", "85" or "0.85".

    Raises:
        PippinError: P012 where it is none of more than 0 and at most 100 %.
    """
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = float("nan")
    share = value if not text.strip().endswith("%") and value <= 1 else value / 100
    if not 0 < share <= 1:
        raise PippinError(
            "P012",
            f"--alert-at is {text}; it must be a share such as 85%.",
            remedy="--alert-at 85%",
        )
    return share


class Monitor:
    """Looks, remembers, writes the table, and says what is above its share."""

    def __init__(
        self,
        look: Callable[[], Snapshot],
        wishes: Wishes,
        *,
        table: CsvFile | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.history = History()
        self.alerted: list[str] = []
        self._look, self._wishes, self._table, self._clock = look, wishes, table, clock
        self._above = False

    def look(self) -> tuple[Snapshot, float, bool]:
        """A look, its time, and whether something has just passed its share."""
        snapshot, now = self._look(), self._clock()
        self.history.add(snapshot, now)
        self.alerted = alerts(snapshot, self._wishes.alert_at)
        crossed, self._above = bool(self.alerted) and not self._above, bool(self.alerted)
        if self._table is not None:
            self._table.add(csv_row(snapshot, now, self.alerted))
        return snapshot, now, crossed

    def text(self, snapshot: Snapshot, now: float) -> str:
        """One line, plain or JSON."""
        if not self._wishes.as_json:
            return line(snapshot, now, history=self.history, alerts=self.alerted)
        data = as_object(snapshot, now)
        notes = warnings(snapshot, now, self.history)
        data |= {"alerts": self.alerted, "warnings": notes}
        return json.dumps(data, allow_nan=False)


def watch(monitor: Monitor, wishes: Wishes, console: Console) -> int:
    """Look as often as was asked for, or until Ctrl-C; returns the exit code."""
    if console.is_terminal and not wishes.as_json and wishes.count is None:
        _draw(monitor, wishes, console)
    count = wishes.count
    ascii_only = "utf" not in console.encoding.lower()
    while count is None or count > 0:
        snapshot, now, _ = monitor.look()
        if console.is_terminal and not wishes.as_json:
            shown = view(
                snapshot,
                now,
                alerts=monitor.alerted,
                width=console.width,
                ascii_only=ascii_only,
            )
            console.print(shown)
        else:
            print(monitor.text(snapshot, now), flush=True)
        count = None if count is None else count - 1
        if count != 0:
            time.sleep(wishes.interval)
    return EXIT_ALERT if monitor.alerted else 0


def _draw(monitor: Monitor, wishes: Wishes, console: Console) -> None:
    """Redraw in place until Ctrl-C."""
    ascii_only = "utf" not in console.encoding.lower()
    with Live(console=console, auto_refresh=False) as display:
        while True:
            snapshot, now, crossed = monitor.look()
            shown = view(
                snapshot,
                now,
                history=monitor.history,
                alerts=monitor.alerted,
                width=console.width,
                ascii_only=ascii_only,
            )
            display.update(shown, refresh=True)
            if crossed:
                console.bell()
            time.sleep(wishes.interval)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv

    def run() -> int:
        parser = make_parser("tools/memory_monitor.py", __doc__)
        add = parser.add_argument
        add("run", nargs="?", help="run name or folder (the newest)")
        add("--interval", type=float, default=2.0, metavar="S", help="seconds (2)")
        add("--once", action="store_true", help="look once")
        add("--json", action="store_true", help="one JSON object a line")
        add("--csv", metavar="FILE", help="append each look to a table")
        add("--alert-at", metavar="SHARE", help="warn and ring at this share of a limit: 85%%")
        add("--debug", action="store_true", help="show tracebacks")
        args = parser.parse_args(given)
        if not 0.1 <= args.interval <= 3600:
            raise PippinError("P012", f"--interval is {args.interval}; it must be 0.1 to 3600 s.")
        share = None if args.alert_at is None else parse_share(args.alert_at)
        wishes = Wishes(args.interval, args.json, 1 if args.once else None, share)
        watcher = Watch(newest_run(RUNS_DIR) if args.run is None else find_run(args.run))
        table = None if args.csv is None else CsvFile(Path(args.csv))
        try:
            return watch(Monitor(watcher.look, wishes, table=table), wishes, Console())
        finally:
            if table is not None:
                table.close()

    return guarded(run, debug="--debug" in given)


if __name__ == "__main__":
    sys.exit(main())
