"""`tools/benchmark.py memory`: one setting, or the grid with its file and picture."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import backends
from core.errors import PippinError
from core.paths import PROJECT_ROOT
from tools.benchmarks import memory
from tools.benchmarks.report import Measured, show

DOCS = PROJECT_ROOT / "docs"


def add_arguments(commands: Any, names: Sequence[str]) -> None:
    """The subcommand."""
    sub = commands.add_parser("memory", allow_abbrev=False, help="predicted and measured memory")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="set any key")
    sub.add_argument("--backend", choices=tuple(names), help="(cpu for one setting, else both)")
    sub.add_argument("--config", metavar="NAME|PATH", help="a preset or file (quickstart)")
    sub.add_argument("--output", type=Path, default=DOCS, metavar="FOLDER", help="(docs)")
    sub.add_argument("--limit", type=int, metavar="N", help="the first N settings of the grid")


def run(args: argparse.Namespace, console: Console) -> list[Measured]:
    """Measure; returns the figures of which something is demanded.

    Raises:
        PippinError: P101 where a step does not finish, P501 without a backend, P312 for the disk.
    """
    if args.overrides or args.config:
        return _one(args, console)
    if args.limit is not None and args.limit < 1:
        raise PippinError("P012", f"--limit is {args.limit}; it must be 1 or more.")
    return _grid(args, console)


def _one(args: argparse.Namespace, console: Console) -> list[Measured]:
    name = args.backend or "cpu"
    with console.status(f"three steps on {name}"):
        found = memory.compare(name, args.overrides, config=args.config)
    rows = [
        Measured("predicted", found.predicted_bytes / 1e9, "GB", note=f"peak: {found.moment}"),
        Measured("measured", found.measured_bytes / 1e9, "GB", note=found.counter),
        Measured(
            "predicted / measured", found.ratio, "", 1 + memory.MOST_OVER, "", 1 - memory.MOST_UNDER
        ),
    ]
    if args.json:
        print(json.dumps(memory.as_rows([found])[0]))
    else:
        show(console, f"memory of a step on {name}", rows)
    return rows


def _grid(args: argparse.Namespace, console: Console) -> list[Measured]:
    here = backends.available()
    names = [args.backend] if args.backend else [n for n in memory.GRID_BACKENDS if here[n].ok]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("backend", "setting", "predicted GB", "measured GB", "ratio", "peak", ""):
        table.add_column(title, justify="right" if "GB" in title or title == "ratio" else "left")

    done: list[memory.Compared] = []

    def tell(c: memory.Compared) -> None:
        verdict = "[green]PASS[/]" if c.ok else "[bold red]FAIL[/]"
        setting = memory.changes_of(c.settings) + (" (held out)" if c.held_out else "")
        sizes = [f"{size / 1e9:.3f}" for size in (c.predicted_bytes, c.measured_bytes)]
        table.add_row(c.backend, setting, *sizes, f"{c.ratio:.3f}", c.moment, verdict)
        console.log(f"{c.backend} {c.ratio:.3f} {sizes[0]} {sizes[1]} {setting}", highlight=False)
        done.append(c)
        if args.limit is None:  # each time: a grid takes minutes, and may be stopped
            _write(done, args.output)

    found = memory.run_grid(names, tell, limit=args.limit)
    rows = memory.summary(found)
    if args.json:
        print(json.dumps({"settings": memory.as_rows(found)}))
    else:
        console.print(table)
        show(console, "predicted against measured", rows)
    return rows


def _write(found: list[memory.Compared], folder: Path) -> None:
    """The file and the picture; of backends that were not measured now, what the file had stays."""
    path = folder / "memory.json"
    measured = {c.backend for c in found}
    try:
        if path.is_file():
            earlier = memory.from_rows(json.loads(path.read_text())["settings"])
            found = [*(c for c in earlier if c.backend not in measured), *found]
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": memory.as_rows(found)}, indent=1) + "\n")
        memory.plot(found, folder / "memory.png")
    except OSError as error:
        raise PippinError(
            "P312",
            f"{folder} cannot be written: {error.strerror or error}.",
            remedy="another folder: --output FOLDER",
        ) from error
