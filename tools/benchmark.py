"""Measure this machine: training, saving, loading. What must hold has a PASS or FAIL.

    python tools/benchmark.py train --backend mlx --steps 50 model.d_model=256
    python tools/benchmark.py save --format npz --params 137M
    python tools/benchmark.py save --backend cpu
    python tools/benchmark.py load --format pt
    python tools/benchmark.py data --megabytes 200 --input big.txt
    python tools/benchmark.py profile --backend cpu --plot profile.png
    python tools/benchmark.py compare
    python tools/benchmark.py memory --backend cpu --json model.d_model=256

`train` trains on random tokens as the loop does; waiting for data and logging may each take 1 % of
the time. `save` may take 2 s of processor time a GB and twice the time of plainly writing and
flushing the same bytes. `data` prepares a text with both kinds of tokenizer and reads windows of it.
`profile` shows where a step's time goes. `compare` trains the same on every backend that is here, checks
that the losses agree, and recommends one, which `backend: auto` remembers for this machine.
`memory` compares the predicted peak of a step with the measured one; without settings it does so for a
grid, and writes docs/memory.json and docs/memory.png.
Exit code 1 where something demanded does not hold, 2 for a wrong command
line.
"""

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from core.environment import use_environment

    use_environment()

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import backends
from core.cli import Parser, guarded, make_parser
from core.cores import usable_cores
from core.errors import PippinError
from core.params import num_parameters, param_specs
from tools.benchmarks import compare, data, memory_command, saving, training
from tools.benchmarks import profile as profiling
from tools.benchmarks.report import GB, Measured, as_object, show

EXIT_MISSED = 1
MAX_STEPS, MAX_REPEATS, MAX_SECONDS = 100_000, 1000, 600
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)\Z")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
# Copies of a checkpoint in memory: a backend holds its own besides the random tensors, and one
# tensor is on its way.
FORMAT_COPIES, BACKEND_COPIES = 1.3, 2.6


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; flags take no abbreviations.

    Raises:
        PippinError: P012 for a wrong command line.
    """
    parser = make_parser("tools/benchmark.py", __doc__)
    names = "train|save|load|data|profile|compare|memory"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    train = commands.add_parser("train", allow_abbrev=False, help="speed, data, logging, memory")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="set any key")
    train.add_argument("--backend", required=True, choices=tuple(backends.MODULES))
    train.add_argument("--config", metavar="NAME|PATH", help="a preset or file (quickstart)")
    train.add_argument("--steps", type=int, default=50, metavar="N", help="timed twice (50)")
    for name, what in (("save", "cost of saving"), ("load", "cost of loading; nothing demanded")):
        sub = commands.add_parser(name, allow_abbrev=False, help=what)
        which = sub.add_mutually_exclusive_group(required=True)
        which.add_argument(
            "--backend", choices=tuple(backends.MODULES), help="its own save, copies included"
        )
        which.add_argument("--format", choices=("npz", "pt"), help="the format alone")
        sub.add_argument("--params", default="137M", metavar="N", help="parameters (137M)")
        sub.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs (5)")
        sub.add_argument("--folder", type=Path, default=Path(), help="disk to write to (.)")
    data = commands.add_parser("data", allow_abbrev=False, help="preparing and loading data")
    data.add_argument("--input", type=Path, metavar="FILE", help="a text file (stories)")
    data.add_argument("--megabytes", type=int, default=200, metavar="N", help="of it (200)")
    data.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="(32000)")
    data.add_argument("--workers", type=int, default=usable_cores(), metavar="N")
    _add_profile_and_compare(commands)
    memory_command.add_arguments(commands, tuple(backends.MODULES))
    for sub in commands.choices.values():
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
    args, rest = parser.parse_known_args(argv)
    if args.command in ("train", "profile", "compare", "memory"):
        args.overrides += [a for a in rest if not a.startswith("-")]
        rest = [a for a in rest if a.startswith("-")]
    if rest:
        parser.error(f"unknown argument {rest[0]}")
    _check_range(parser, args)
    return args


def _add_profile_and_compare(commands: Any) -> None:
    sub = commands.add_parser("profile", allow_abbrev=False, help="where a step's time goes")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="set any key")
    sub.add_argument("--backend", required=True, choices=tuple(backends.MODULES))
    sub.add_argument("--config", metavar="NAME|PATH", help="a preset or file (quickstart)")
    sub.add_argument("--steps", type=int, default=20, metavar="N", help="profiled (20)")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .png, .svg or .pdf")
    sub = commands.add_parser("compare", allow_abbrev=False, help="every backend; recommends one")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="set any key")
    sub.add_argument("--config", metavar="NAME|PATH", help="a preset or file (quickstart)")
    sub.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each backend (5)")
    sub.add_argument("--no-remember", action="store_true", help="leave backend: auto as it is")
    sub.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def _check_range(parser: Parser, args: argparse.Namespace) -> None:
    if args.command == "compare" and not 0 < args.seconds <= MAX_SECONDS:
        parser.error(f"--seconds is {args.seconds:g}; it must be above 0, at most {MAX_SECONDS}")
    if args.command == "profile":
        if not 1 <= args.steps <= MAX_STEPS:
            parser.error(f"--steps is {args.steps}; it must be 1 to {MAX_STEPS:,}")
        if args.plot is not None and args.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            parser.error(f"--plot {args.plot} must end in .png, .svg or .pdf")
    if args.command not in ("train", "save", "load"):
        return
    # Fewer steps would have no row to time.
    steps = ("steps", training.LOG_EVERY, MAX_STEPS)
    name, least, most = steps if args.command == "train" else ("repeats", 1, MAX_REPEATS)
    value = getattr(args, name)
    if not least <= value <= most:
        parser.error(f"--{name} is {value}; it must be {least} to {most:,}")


def parse_count(text: str) -> int:
    """`137M`, `1.5G`, `20000` as a number.

    Raises:
        PippinError: P012 for anything else.
    """
    match = _COUNT.match(text.strip())
    count = float(match[1]) * _FACTORS[match[2].lower()] if match else 0.0
    if count < 1:
        raise PippinError("P012", f"{text!r} is no number of parameters.", remedy="--params 137M")
    return round(count)


def run_train(args: argparse.Namespace, console: Console) -> list[Measured]:
    """Measure training."""
    config = training.resolve_config(args.backend, args.config, args.overrides)
    with console.status(f"training on {args.backend}"):
        rows, facts = training.measure(config, args.steps)
    title = f"train on {args.backend}: {facts['framework']}, {facts['device']}"
    _report(args, console, title, rows, facts)
    t = config.train
    if not args.json:
        console.print(
            f" {facts['parameters']:,} parameters, {t.precision}, {t.grad_accum_steps} x "
            f"{t.micro_batch_size} rows of {config.data.seq_len} tokens, {args.steps} steps",
            highlight=False,
        )
    return rows


def run_data(args: argparse.Namespace, console: Console) -> list[Measured]:
    """Measure preparing and loading data."""
    with console.status(f"preparing {args.megabytes} MB twice"):
        rows, facts = data.measure(
            args.input,
            megabytes=args.megabytes,
            vocab_size=args.vocab_size,
            workers=args.workers,
        )
    title = f"data: {facts['text_mb']:.0f} MB, vocabulary of {facts['vocab_size']:,}"
    _report(args, console, title, rows, facts)
    return rows


def run_profile(args: argparse.Namespace, console: Console) -> list[Measured]:
    """Show where a step's time goes."""
    config = training.resolve_config(args.backend, args.config, args.overrides)
    with console.status(f"profiling on {args.backend}"):
        profile, rows, facts = profiling.measure(config, args.steps)
    title = f"a step on {args.backend}: {facts['framework']}, {facts['device']}"
    t = config.train
    shape = (
        f"{facts['parameters']:,} parameters, {t.precision}, {t.grad_accum_steps} x "
        f"{t.micro_batch_size} rows of {config.data.seq_len} tokens"
    )
    _report(args, console, title, rows, facts)
    if not args.json:
        console.print(f" {shape}, {args.steps} steps; {profiling.summary(rows)}", highlight=False)
    if args.plot is not None:
        try:
            profiling.plot(profile, f"{title}\n{shape}", args.plot)
        except OSError as error:
            raise PippinError(
                "P312",
                f"{args.plot} cannot be written: {error.strerror or error}.",
                remedy="another folder: --plot FILE",
                kept="the figures are above.",
            ) from error
        console.print(f" picture: {args.plot}", highlight=False)
    return rows


def run_compare(args: argparse.Namespace, console: Console) -> list[Measured]:
    """Train the same on every backend that is here."""
    available = backends.available()
    overrides = compare.default_size(available, args.overrides)
    names = [name for name, state in available.items() if state.ok]
    configs = {n: training.resolve_config(n, args.config, overrides) for n in names}
    with console.status(f"training on {', '.join(names)}, one after the other"):
        found = compare.run_all(configs, seconds=args.seconds)
    told = "not remembered, as asked"
    if not args.no_remember:
        told, _ = compare.keep(found, next(iter(configs.values())), available)
    if args.json:
        print(json.dumps(compare.as_object(found, told)))
    else:
        compare.show(console, found, configs, told)
    return [Measured("agreement", 1.0 if found.ok else 0.0, "", least=1.0)]


def run_checkpoint(args: argparse.Namespace, console: Console) -> list[Measured]:
    """Measure saving or loading."""
    config = saving.checkpoint_config(parse_count(args.params), args.backend or "cpu")
    specs = param_specs(config.model)
    size = saving.checkpoint_bytes(config, specs)
    copies = BACKEND_COPIES if args.backend else FORMAT_COPIES
    saving.check_room(args.folder, size, copies=copies)
    with console.status(f"{num_parameters(specs):,} parameters, {size / GB:.2f} GB"):
        if args.backend:
            subject = saving.backend_subject(args.backend, config)
        else:
            subject = saving.format_subject("." + args.format, config)
        measure = saving.measure_save if args.command == "save" else saving.measure_load
        try:
            rows, costs = measure(subject, args.folder, args.repeats)
        finally:
            subject.close()
    title = f"{args.command}, {subject.label}: {num_parameters(specs):,} parameters"
    seconds = {kind: [vars(c) for c in found] for kind, found in costs.items()}
    _report(args, console, title, rows, {"parameters": num_parameters(specs), "costs": seconds})
    return rows


def _report(
    args: argparse.Namespace,
    console: Console,
    title: str,
    rows: list[Measured],
    facts: dict[str, object],
) -> None:
    if args.json:
        print(json.dumps(as_object(rows, command=args.command, **facts)))
    else:
        show(console, title, rows)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv

    def run() -> int:
        args = parse_args(given)
        console = Console(stderr=args.json)
        if args.command == "compare" and args.worker is not None:
            return compare.worker_main(args.worker)
        runs = {
            "train": run_train,
            "data": run_data,
            "profile": run_profile,
            "memory": memory_command.run,
            "compare": run_compare,
        }
        rows = runs.get(args.command, run_checkpoint)(args, console)
        return 0 if all(row.ok for row in rows) else EXIT_MISSED

    return guarded(run, debug="--debug" in given)


if __name__ == "__main__":
    sys.exit(main())
