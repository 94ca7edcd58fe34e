"""Show the presets: true parameter counts, memory of a step, and the time they take here.

    python tools/show_configs.py
    python tools/show_configs.py 150M
    python tools/show_configs.py --config my.json --json
    python tools/show_configs.py 150M --measure

Counts come from the table that models are built from. Memory is predicted, for the backend that this
machine would use; times are predicted too, unless --measure trains for two seconds. --markdown
writes the README's table, --write-schema writes configs/schema.json for editors.
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
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import backends
from core.checkpoint import initial_checkpoint
from core.cli import guarded, make_parser
from core.config.json_schema import SCHEMA_NAME, schema_text
from core.config.presets import find_config, preset_names
from core.errors import PippinError
from core.machine.autoconfig import DeviceFacts
from core.machine.detect import device_facts, machine_facts
from core.machine.rate import Rate, chip_of, rate_of
from core.machine.speed import measure_tokens_per_s
from core.params import param_specs
from core.paths import CONFIGS_DIR
from core.training import format as fmt
from tools.showing.describing import (
    README_DEVICE,
    Described,
    Rates,
    describe,
    with_rate,
)

BEGIN = "<!-- presets: python tools/show_configs.py --markdown -->"
END = "<!-- end of presets -->"
COMMAND = "python tools/show_configs.py"
PROBE_SECONDS = 2.0
# Columns of the table where it goes to a file or a pipe; from FULL on it says what each is for.
WIDEST, FULL = 120, 90


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; flags take no abbreviations.

    Raises:
        PippinError: P012 for a wrong command line.
    """
    parser = make_parser("tools/show_configs.py", __doc__)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME|PATH", help="one preset or file; all presets without")
    add(
        "--config",
        "--config_file",
        dest="configs",
        action="append",
        default=[],
        metavar="NAME|PATH",
    )
    add("--backend", choices=tuple(backends.MODULES), help="the backend to predict for")
    add("--measure", action="store_true", help="train two seconds for the time of NAME")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON on stdout")
    form.add_argument("--markdown", action="store_true", help="the README's table")
    form.add_argument("--write-schema", action="store_true", help="write configs/schema.json")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    names = [args.name, *args.configs] if args.name is not None else args.configs
    if len(names) > 1:
        raise PippinError(
            "P012",
            f"more than one configuration is given: {', '.join(names)}.",
            remedy=f"{COMMAND} {names[0]}",
        )
    args.name = names[0] if names else None
    if args.measure and args.name is None:
        raise PippinError(
            "P012",
            "--measure trains one configuration, and none is given.",
            remedy=f"{COMMAND} 150M --measure",
        )
    if args.name is not None and (args.markdown or args.write_schema):
        flag = "--markdown" if args.markdown else "--write-schema"
        raise PippinError("P012", f"{flag} is about all presets.", remedy=f"{COMMAND} {flag}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Show; returns the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(parse_args(given)), debug="--debug" in given)


def _run(args: argparse.Namespace) -> int:
    if args.write_schema:
        target = CONFIGS_DIR / SCHEMA_NAME
        target.write_text(schema_text(), encoding="utf-8")
        print(f"{target} is written")
        return 0
    if args.markdown:
        print(markdown())
        return 0
    path = None if args.name is None else find_config(args.name, command=COMMAND)
    device, machine, rates = _here(args.backend)
    if path is None:
        shown = [describe(find_config(name), device, rates) for name in preset_names()]
        if args.json:
            print(json.dumps([as_object(s, device) for s in shown], indent=2))
        else:
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDEST
            print(table(shown, machine, device, rates("float32").how, width=columns))
        return 0
    one = describe(path, device, rates)
    if args.measure:
        one = with_rate(one, _measured(one, device))
    if args.json:
        print(json.dumps(as_object(one, device), indent=2))
    else:
        print(page(one, device))
    return 0


def _here(backend: str | None) -> tuple[DeviceFacts, str, Rates]:
    """The device that runs here, the machine in words, and the rates it is taken to reach."""
    found = device_facts(backend, backends.available())
    facts = machine_facts()
    rates = partial(rate_of, found.device, chip_of(facts))
    return found.device, found.machine.splitlines()[0], rates


def _measured(shown: Described, device: DeviceFacts) -> float:
    """Tokens a second of a few steps on random tokens."""
    config = shown.config
    budget = device.budget_bytes * config.train.memory_fraction
    if shown.memory_bytes is not None and shown.memory_bytes > budget:
        raise PippinError(
            "P101",
            f"a step of {shown.name} needs about {fmt.gigabytes(shown.memory_bytes)}, and a run may use "
            f"{fmt.gigabytes(budget)}, so nothing is measured.",
            kept="nothing was started.",
        )
    specs = param_specs(config.model)
    backend = backends.load(config.train.backend)(config, specs, mode="train")
    try:
        backend.load(initial_checkpoint(config, specs))
        return measure_tokens_per_s(backend, config, seconds=PROBE_SECONDS)
    finally:
        backend.close()


# Forms


def table(
    shown: Sequence[Described],
    machine: str,
    device: DeviceFacts,
    how: str,
    *,
    width: int = WIDEST,
) -> str:
    """Every preset on one line, and how its time is known; what it is for where the width allows."""
    width = min(width, WIDEST)
    rule = "=" * min(width, 98)
    head = f"{'Name':<20}{'Params':>7}{'Layers':>7}{'Heads':>6}{'Embed':>6}{'Context':>8}"
    head += f"{'Memory':>9}{'Time':>12}"
    dashes = " ".join("-" * n for n in (20, 6, 6, 5, 5, 7, 8, 11))
    if width >= FULL:
        head, dashes = head + "  Best for", dashes + "  " + "-" * 14
    lines = [rule, "Available configurations", rule, "", head, dashes]
    for s in shown:
        m = s.config.model
        dims = (m.n_layers, m.n_heads, m.d_model) if s.counts else ("auto",) * 3
        size = fmt.si(s.counts.total) if s.counts else "auto"
        memory = fmt.gigabytes(s.memory_bytes) if s.memory_bytes else "fits"
        if s.memory_bytes and s.memory_bytes > device.budget_bytes * s.config.train.memory_fraction:
            memory += "!"
        took = "?" if s.seconds is None else fmt.duration(s.seconds)
        line = f"{s.name:<20}{size:>7}{dims[0]:>7}{dims[1]:>6}{dims[2]:>6}"
        line += f"{s.config.data.seq_len:>8,}{memory:>9}{took:>12}"
        line += f"  {s.title}" if width >= FULL else ""
        lines.append(fmt.cut(line, width).rstrip())
    budget = fmt.gigabytes(device.budget_bytes * 0.8)
    notes = [
        (
            "Memory: ",
            f"predicted peak of a step on {device.backend} here; ! is above the {budget} that a "
            "run may use.",
        ),
        ("Time:   ", f"{how}. Where a preset gives minutes, it is those."),
        ("Here:   ", machine),
    ]
    lines += [
        "",
        *(line for left, text in notes for line in fmt.hanging(left, text, width)),
        "",
        "To use one:",
        "  python train.py --config NAME --input_file DATA",
        "To see one:",
        "  python tools/show_configs.py NAME      (--measure for a measured time)",
        rule,
    ]
    return "\n".join(lines)


def page(s: Described, device: DeviceFacts) -> str:
    """One configuration in detail."""
    m, t = s.config.model, s.config.train
    lines = ["=" * 70, f"Config: {s.name}", f"File: {s.path}", "=" * 70]
    if s.title:
        lines += fmt.hanging("Description: ", f"{s.title}. {s.about}", 80)
    shape: list[tuple[str, object]] = [
        ("Layers", m.n_layers),
        ("Heads", m.n_heads),
        ("Embedding", m.d_model),
        ("MLP", f"{m.d_ff}, gated"),
        ("Experts", f"{m.n_experts}, {m.top_k} for a token" if m.n_experts else "none"),
        ("Block size", s.config.data.seq_len),
        ("Vocab size", f"{m.vocab_size}" + ("" if s.vocab_is_stated else ", the text decides")),
        ("Dropout", m.dropout),
        ("Bias", False),
        ("Head", "tied to the embedding" if m.tie_embeddings else "of its own"),
    ]
    if s.counts is None:
        shape = [("Size", "decided by the machine, the text and the time")]
    lines += ["", "Architecture:", *_pairs(shape)]
    if s.counts is not None:
        c = s.counts
        counts: list[tuple[str, object]] = [
            ("Total", f"{c.total:,} ({c.total / 1e6:.2f}M)"),
            ("Tied", f"{c.tied:,}"),
            ("Untied", f"{c.untied:,}"),
            ("No embedding", f"{c.non_embedding:,}"),
            ("Active", f"{c.active:,}"),
        ]
        lines += ["", "Parameters:", *_pairs(counts)]
    accum = f" x {t.grad_accum_steps}" if t.grad_accum_steps > 1 else ""
    run: list[tuple[str, object]] = [("Batch size", f"{t.micro_batch_size}{accum} rows a step")]
    if s.tokens is not None:
        run += [("Steps", f"{t.total_steps:,}"), ("Tokens", f"{s.tokens:,}")]
        if s.counts is not None:
            run.append(("Per parameter", f"{s.tokens / s.counts.total:.2g} tokens; 20 is optimal"))
    if s.memory_bytes is not None:
        budget = device.budget_bytes * t.memory_fraction
        fits = "" if s.memory_bytes <= budget else "; does not fit here"
        text = f"{fmt.gigabytes(s.memory_bytes)} predicted on {t.backend}, of {fmt.gigabytes(budget)}{fits}"
        run.append(("Memory", text))
    took = "unknown" if s.seconds is None else fmt.duration(s.seconds)
    run.append(("Time", f"{took} ({s.time_is})"))
    lines += ["", "Training:", *_pairs(run)]
    name = s.name if s.path.parent == CONFIGS_DIR else s.path
    lines += ["", "Usage:", f"  python train.py --config {name} --input_file input.txt", "=" * 70]
    return "\n".join(lines)


def _pairs(items: Sequence[tuple[str, object]]) -> list[str]:
    return [f"  {name:<14}: {value}" for name, value in items]


def as_object(s: Described, device: DeviceFacts) -> dict[str, Any]:
    """One configuration as JSON; what is not known is null."""
    c = s.counts
    return {
        "name": s.name,
        "file": str(s.path),
        "title": s.title,
        "parameters": None if c is None else vars(c),
        "vocab_is_stated": s.vocab_is_stated,
        "model": s.config.model.model_dump() if c else None,
        "seq_len": s.config.data.seq_len,
        "rows_per_step": s.config.train.micro_batch_size * s.config.train.grad_accum_steps,
        "tokens": s.tokens,
        "backend": s.config.train.backend,
        "precision": s.config.train.precision,
        "predicted_memory_bytes": s.memory_bytes,
        "budget_bytes": math.floor(device.budget_bytes * s.config.train.memory_fraction),
        "seconds": s.seconds,
        "time_is": s.time_is,
    }


def _no_rate(precision: str, *, tf32: bool = False) -> Rate:
    return Rate(None, "not shown")


def markdown() -> str:
    """The README's table between its markers; the same on every machine."""
    rows = [
        "| `--config` | Parameters | Layers x width | Heads | Context | Memory | Best for |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in preset_names():
        s = describe(find_config(name), README_DEVICE, _no_rate)
        m, c = s.config.model, s.counts
        if c is None:
            cells = ["the machine decides", "", "", "", ""]
        else:
            size = f"{c.total / 1e6:.1f}M"
            size += f", {c.active / 1e6:.1f}M active" if m.n_experts else ""
            memory = fmt.gigabytes(s.memory_bytes or 0)
            cells = [
                size,
                f"{m.n_layers} x {m.d_model}",
                f"{m.n_heads}",
                f"{s.config.data.seq_len:,}",
            ]
            cells.append(memory)
        rows.append(f"| `{name}` | " + " | ".join([*cells, s.title]) + " |")
    note = (
        "Counted from the parameter table, embedding included; memory is the predicted peak of a step on "
        "MLX in bfloat16."
    )
    return "\n".join([BEGIN, *rows, "", note, END])


if __name__ == "__main__":
    sys.exit(main())
