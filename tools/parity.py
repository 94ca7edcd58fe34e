"""Prove on this machine that backends run the same experiment, number by number.

    python tools/parity.py                          every backend that is here, against the first
    python tools/parity.py --backends cpu,mlx --steps 50 --out parity.png
    python tools/parity.py --config quickstart model.tie_embeddings=true

Each backend runs the same small experiment in float32 in a process of its own: the same initial
checkpoint, the same batches. Exit code 0: all within tolerance; 1: not; 2: a wrong command line or
a backend that is not here.
"""

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from core.environment import use_environment

    use_environment()

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import backends
from core.cli import guarded, make_parser
from core.errors import EXIT_FAULT, EXIT_USER, PippinError
from core.params import num_parameters, param_specs
from tools.parities.compare import (
    Check,
    Found,
    Handover,
    compare,
    initial_weights,
    read_found,
    read_handover,
)
from tools.parities.experiment import resolve_experiment
from tools.parities.plot import draw
from tools.parities.worker import RUN, run_worker, write_job

# One before and one after the handover, at least.
MIN_STEPS, MAX_STEPS = 2, 10_000
EXIT_BEYOND = 1


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; flags take dashes or underscores and no abbreviations.

    Raises:
        PippinError: P012 for a wrong command line.
    """
    parser = make_parser("tools/parity.py", __doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="set any key")
    add("--config", metavar="NAME|PATH", help="a preset or file; what is auto is filled in small")
    add("--backends", metavar="A,B", help="the first one is the reference (default: all here)")
    add("--steps", type=int, default=20, metavar="N", help="optimizer steps (20)")
    add("--out", type=Path, default=Path("parity.png"), help="the plot (./parity.png)")
    add("--json", action="store_true", help="one JSON object on stdout instead of tables")
    add("--debug", action="store_true", help="show tracebacks")
    add(
        *("--inject-fault", "--inject_fault"),
        type=float,
        default=0.0,
        metavar="X",
        help="self-test: scale one weight of the second backend by 1 + X; must end with exit code 1",
    )
    for flag in ("--worker", "--tasks", "--folder"):
        add(flag, default="", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    unknown = [a for a in rest if a.startswith("-")]
    if unknown:
        parser.error(f"unknown flag {unknown[0]}")
    args.overrides += rest
    if not MIN_STEPS <= args.steps <= MAX_STEPS:
        parser.error(f"--steps is {args.steps}; it must be {MIN_STEPS} to {MAX_STEPS:,}")
    return args


def chosen_backends(text: str | None) -> list[str]:
    """Names in order, the reference first; each one can run here.

    Raises:
        PippinError: P501 or P502 for one that cannot, P012 where there are fewer than two.
    """
    if text is None:
        names = sorted((n for n, a in backends.available().items() if a.ok), key="cpu".__ne__)
    else:
        names = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
        for name in names:
            try:
                backends.load(name)
            except PippinError as error:
                here = ",".join(n for n, a in backends.available().items() if a.ok)
                if error.remedy.startswith("--backend ") or not error.remedy:
                    error.remedy = f"python tools/parity.py --backends {here}"
                raise
    if len(names) < 2:
        found = ", ".join(names) or "none"
        raise PippinError(
            "P012",
            f"a comparison needs two backends; there is {found}.",
            found="\n".join(
                f"{n}: {a.reason}" for n, a in backends.available().items() if not a.ok
            ),
            remedy="python tools/parity.py --backends cpu,mlx",
        )
    return names


def check_out(path: Path) -> None:
    """Refuse a plot that could not be written, before anything is computed.

    Raises:
        PippinError: P012.
    """
    problem = "" if path.suffix == ".png" else "is no .png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path if path.exists() else path.parent, os.W_OK)
        problem = problem or ("" if writable and not path.is_dir() else "cannot be written")
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
    if problem:
        raise PippinError("P012", f"--out {path} {problem}.", remedy="--out parity.png")


class Comparison:
    """The processes of one comparison and what they found."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        console: Console,
        *,
        fault: float = 0.0,
        debug: bool = False,
    ) -> None:
        self.folder = folder
        self.debug = debug
        self.names = list(names)
        self.console = console
        self.fault = fault
        self.found: dict[str, Found] = {}
        self.handovers: list[Handover] = []

    def run(self) -> list[tuple[str, list[Check]]]:
        """Run everything; the checks of each backend against the first.

        Raises:
            PippinError: P001 if a process fails.
        """
        first, *others = self.names
        self._worker(first, [RUN])
        for name in others:
            self._worker(name, [RUN, first])
        self._worker(first, others)
        self.found = {name: read_found(self.folder, name) for name in self.names}
        initial = initial_weights(self.folder)
        results = []
        for name in others:
            to, back = (read_handover(self.folder, *p) for p in ((first, name), (name, first)))
            self.handovers += [to, back]
            a, b = self.found[first], self.found[name]
            results.append((name, compare(a, b, initial, [(to, a), (back, b)])))
        return results

    def _worker(self, name: str, tasks: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
        command += ["--folder", str(self.folder), "--tasks", ",".join(tasks)]
        if self.debug:
            command.append("--debug")
        if name == self.names[1]:
            command += ["--inject-fault", repr(self.fault)]
        words = ["running" if t == RUN else f"going on from {t}" for t in tasks]
        # MLX and cuBLAS read these at their start; the configuration says no TF32, so do they.
        quiet = {"MLX_ENABLE_TF32": "0", "NVIDIA_TF32_OVERRIDE": "0"}
        with self.console.status(f"{name}: {', '.join(words)}"):
            done = subprocess.run(
                command,
                env={**os.environ, **quiet},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            raise PippinError(
                "P001",
                f"the process of backend {name} failed (exit code {done.returncode}).",
                found=done.stderr.strip()[-4000:],
                kept="nothing was compared.",
                exit_code=EXIT_USER if done.returncode == EXIT_USER else EXIT_FAULT,
            )


def show(
    console: Console,
    names: Sequence[str],
    found: dict[str, Found],
    results: Sequence[tuple[str, list[Check]]],
) -> None:
    """A table for each backend against the first."""
    for name in names:
        values = found[name].values
        console.print(
            f" {name:<5} {values['framework']}, {values['device']}; {values['seconds']:.1f} s",
            highlight=False,
        )
    for name, checks in results:
        table = Table(
            title=f"{name} against {names[0]}",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for heading in ("quantity", "measured", "tolerance", "", "note"):
            justify: Any = "right" if heading in ("measured", "tolerance") else "left"
            table.add_column(heading, justify=justify, no_wrap=heading != "note")
        for c in checks:
            verdict = "[green]ok[/]" if c.ok else "[bold red]FAIL[/]"
            table.add_row(c.quantity, _number(c.measured), _number(c.tolerance), verdict, c.note)
        console.print(table)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def strict(value: Any) -> Any:
    """The value with numbers that JSON does not know as text."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_object(
    comparison: Comparison,
    results: Sequence[tuple[str, list[Check]]],
    config: dict[str, Any],
    plot: Path,
) -> dict[str, Any]:
    """Everything that was found, for scripts."""
    pairs = [
        {
            "reference": comparison.names[0],
            "backend": name,
            "ok": all(c.ok for c in checks),
            "checks": [{**vars(c), "ok": c.ok} for c in checks],
        }
        for name, checks in results
    ]
    return {
        "ok": all(p["ok"] for p in pairs),
        "fault": comparison.fault,
        "pairs": pairs,
        "backends": {name: found.values for name, found in comparison.found.items()},
        "handovers": [
            {"from": h.source, "to": h.target, "first_step": h.first_step, "losses": list(h.losses)}
            for h in comparison.handovers
        ],
        "config": config,
        "plot": str(plot),
    }


def run(args: argparse.Namespace) -> int:
    """Compare; returns the exit code.

    Raises:
        PippinError: for everything a user can mend.
    """
    check_out(args.out)
    names = chosen_backends(args.backends)
    try:
        config, notes = resolve_experiment(args.config, args.overrides, args.steps)
    except PippinError as error:
        error.remedy = error.remedy.replace("python train.py", "python tools/parity.py")
        raise
    console = Console(stderr=args.json)
    for note in notes:
        console.print(f" {note}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="pippin-parity-") as folder:
        write_job(Path(folder), config, args.steps)
        comparison = Comparison(
            Path(folder), names, console, fault=args.inject_fault, debug=args.debug
        )
        results = comparison.run()
    losses = {name: comparison.found[name].losses for name in names}
    size = num_parameters(param_specs(config.model))
    title = f"One experiment on {len(names)} backends: {size:,} parameters, float32"
    plot = draw(args.out, losses, comparison.handovers, title=title)
    report = as_object(comparison, results, config.model_dump(mode="json"), plot)
    if args.json:
        print(json.dumps(strict(report), allow_nan=False))
    else:
        show(console, names, comparison.found, results)
        console.print(f" plot: {plot}", highlight=False)
    failed = [f"{name}: {c.quantity}" for name, checks in results for c in checks if not c.ok]
    if failed:
        console.print(f" beyond tolerance: {'; '.join(failed)}", style="bold red", highlight=False)
    return EXIT_BEYOND if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv

    def run_or_work() -> int:
        args = parse_args(given)
        if args.worker:
            tasks = args.tasks.split(",")
            run_worker(Path(args.folder), args.worker, tasks, fault=args.inject_fault)
            return 0
        return run(args)

    return guarded(run_or_work, debug="--debug" in given)


if __name__ == "__main__":
    sys.exit(main())
