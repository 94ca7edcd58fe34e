"""The end of a run: figures from metrics.jsonl, a plot, a report, and what to type next."""

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from core.errors import PippinError
from core.inference.evaluate import probe_skills
from core.inference.text import printable
from core.params import num_active_parameters, num_parameters
from core.training import format as fmt
from core.training.console import Console
from core.training.disk import writing
from core.training.plots import loss_plot
from core.training.run import Outcome, Run
from core.training.runfolder import RUNS_DIR
from core.training.runlog import METRICS_NAME, SUMMARY_NAME, read_rows, strict, write_json
from core.training.textdata import TextData

NUM_PROBES = 300
PROBE_SEED = 7
Skills = Mapping[str, tuple[int, int]]
T = TypeVar("T")


def finish(run: Run, outcome: Outcome, prepared: TextData, *, skills: bool) -> None:
    """Write the summary, plot and report of a run, and print the last zone of the terminal.

    The run is saved by now, so whatever fails here is a warning.

    Args:
        run: The run.
        outcome: How it ended.
        prepared: Its data.
        skills: Whether to hold the story exam, where the data has one.
    """
    console = run.console
    probes = prepared.probes(NUM_PROBES, PROBE_SEED) if skills else ()

    def ask() -> Skills:
        with console.phase("skills", "asking questions about unseen stories"):
            length = run.config.model.max_seq_len
            return probe_skills(run.backend, prepared.tokenizer, probes, max_seq_len=length)

    exam: Skills = (_or_warn(console, "the exam", ask) or {}) if probes else {}
    data, plot = record(run, outcome, prepared, exam)
    console.emit("summary", data)
    _print(run, outcome, prepared, data, exam, plot)


def record(
    run: Run, outcome: Outcome, prepared: TextData, exam: Skills
) -> tuple[dict[str, Any], Path | None]:
    """Write the summary, the plot and the report of a run, however it ended.

    Returns:
        The summary, and the plot where there is one.
    """
    console, folder = run.console, run.folder
    rows = read_rows(folder / "logs" / METRICS_NAME)
    data = summarize(run, outcome, prepared, rows, exam)
    _or_warn(console, "the summary", lambda: write_json(folder / "logs" / SUMMARY_NAME, data))

    def draw() -> Path | None:
        path = folder / "plots" / "loss.png"
        label = "entropy of the stories"
        return loss_plot(rows, path, title=folder.name, floor=run.floor_nats, floor_label=label)

    plot = _or_warn(console, "the plot", draw)

    def describe() -> None:
        path = folder / "training_report.md"
        with writing(path):
            path.write_text(report(run, data, exam, prepared.chances(), plot), encoding="utf-8")

    _or_warn(console, "the report", describe)
    return data, plot


def _or_warn(console: Console, what: str, make: Callable[[], T]) -> T | None:
    """What `make` returns, or None and a warning where it fails."""
    try:
        return make()
    except (PippinError, OSError, RuntimeError, ValueError) as error:
        reason = error.what if isinstance(error, PippinError) else f"{error}"
        console.warn(f"{what} could not be made: {fmt.one_line(reason)}")
        return None


def summarize(
    run: Run, outcome: Outcome, prepared: TextData, rows: Sequence[Mapping[str, Any]], exam: Skills
) -> dict[str, Any]:
    """The figures of `final_training_summary.json`, over the whole run, resumed or not.

    Args:
        run: The run.
        outcome: How this part of it ended.
        prepared: Its data.
        rows: Rows of metrics.jsonl, all parts of the run.
        exam: Right answers and questions by skill.
    """
    losses = [row["loss"] for row in rows if "loss" in row]
    vals = [row["val_loss"] for row in rows if "val_loss" in row]
    speeds = [r["throughput_tokens_per_sec"] for r in rows if "throughput_tokens_per_sec" in r]
    info = run.device
    data: dict[str, Any] = {
        "reason": outcome.reason,
        "error": outcome.error,
        "total_steps": outcome.state.step,
        "planned_steps": run.config.train.total_steps,
        "total_tokens_processed": outcome.state.tokens_seen,
        "session_seconds": outcome.seconds,
        "session_tokens": outcome.tokens,
        "session_tokens_per_sec": outcome.tokens / outcome.seconds if outcome.seconds else None,
        "seconds_by_phase": dict(outcome.seconds_by_phase),
        "parameters": num_parameters(run.specs),
        "active_parameters": num_active_parameters(run.specs),
        "final_loss": losses[-1] if losses else None,
        "best_loss": min(losses, default=None),
        "avg_loss": statistics.fmean(losses) if losses else None,
        "loss_std": statistics.pstdev(losses) if losses else None,
        "avg_throughput_tokens_per_sec": statistics.fmean(speeds) if speeds else None,
        "peak_throughput_tokens_per_sec": max(speeds, default=None),
        "final_val_loss": outcome.final.loss if outcome.final else None,
        "best_val_loss": min(vals, default=None),
        "val_bits_per_byte": outcome.final.bits_per_byte if outcome.final else None,
        "floor_bits_per_byte": prepared.floor_bits_per_byte,
        "skipped_steps": outcome.skipped_steps,
        "micro_batch_size": run.config.train.micro_batch_size,
        "grad_accum_steps": run.config.train.grad_accum_steps,
        "out_of_memory": list(run.events),
        "peak_memory_bytes": _peak_bytes(run, rows),
        "swap_growth_bytes": None if run.watch is None else run.watch.guard.swap_grown_bytes,
        "skills": {k: {"right": r, "asked": n} for k, (r, n) in exam.items()},
        "chance": dict(prepared.chances()) if exam else {},
        "checkpoint": str(outcome.checkpoint) if outcome.checkpoint else None,
        "backend": info.backend,
        "framework": info.framework,
        "device": info.device,
        "precision": run.config.train.precision,
        "warnings": list(run.console.warnings),
    }
    return strict(data)


def _peak_bytes(run: Run, rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The most memory that the watch saw or a row tells of; a short run ends before the watch looks."""
    names = ("memory_peak_bytes", "memory_process_bytes")
    told = [int(row[name]) for row in rows for name in names if row.get(name)]
    seen = 0 if run.watch is None else run.watch.guard.peak_bytes
    return max([seen, *told]) or None


def _print(
    run: Run,
    outcome: Outcome,
    prepared: TextData,
    data: Mapping[str, Any],
    exam: Skills,
    plot: Path | None,
) -> None:
    console, folder = run.console, run.folder
    console.print("", always=True)
    step, total = outcome.state.step, run.config.train.total_steps
    verb = "done" if outcome.reason == "done" else "stopped"
    line = f"{step:,} of {total:,} steps" if step < total else f"{step:,} steps"
    if outcome.reason in ("interrupted", "terminated"):
        how = "by Ctrl-C" if outcome.reason == "interrupted" else "by SIGTERM"
        line = f"at step {step:,} of {total:,} {how}, saved"
    speed = outcome.tokens / outcome.seconds if outcome.seconds > 0 else 0.0
    console.block(
        verb,
        [
            f"{line} · {fmt.si(outcome.state.tokens_seen)} tokens · "
            f"{fmt.exact_duration(outcome.seconds)} · {fmt.si(speed)} tok/s with everything"
        ],
    )
    console.block("loss", [_loss_line(outcome, data)])
    if exam:
        console.skills(exam, prepared.chances())
    notes = _notes(outcome, console.warnings, run.events)
    if notes:
        console.block("notes", notes)
    files = []
    best = folder / f"best{run.backend.suffix}"
    if best.exists():
        files.append(f"{best!s:<38} the best model, {fmt.gigabytes(best.stat().st_size)}")
    if (folder / "training_report.md").exists():
        files.append(f"{folder / 'training_report.md'!s:<38} curves, samples, settings")
    if plot is not None:
        files.append(f"{plot!s:<38} the loss curve")
    console.block("files", files)
    console.block("next", _next(run, outcome, prepared))


def _loss_line(outcome: Outcome, data: Mapping[str, Any]) -> str:
    parts = []
    if outcome.train_loss is not None:
        parts.append(f"train {fmt.number(outcome.train_loss)}")
    if outcome.final is not None:
        best = data.get("best_val_loss", outcome.final.loss)
        parts.append(f"val {fmt.number(outcome.final.loss)} (best {fmt.number(best)})")
        if outcome.final.bits_per_byte is not None:
            parts.append(f"{outcome.final.bits_per_byte:.3f} bits/byte")
    if "floor_bits_per_byte" in data:
        parts.append(f"floor {data['floor_bits_per_byte']:.3f}")
    return "   ".join(parts)


def _notes(
    outcome: Outcome, warnings: Sequence[str], events: Sequence[Mapping[str, Any]]
) -> list[str]:
    notes = []
    if events:
        last, places = events[-1], list(dict.fromkeys(str(e["when"]) for e in events))
        notes.append(
            f"memory ran out {', '.join(places)}: micro-batches of {last['micro_batch_size']} rows, "
            f"{last['grad_accum_steps']} a step, since then"
        )
    if outcome.skipped_steps:
        notes.append(f"{outcome.skipped_steps} steps were not finite and were skipped")
    other = {k: v for k, v in outcome.seconds_by_phase.items() if k != "steps"}
    if other and outcome.seconds > 0:
        name = max(other, key=lambda k: other[k])
        notes.append(f"besides steps: {name} took {100 * other[name] / outcome.seconds:.0f} %")
    # What the user did is no warning to go back to.
    count = sum(not w.startswith(("Ctrl-C", "SIGTERM")) for w in warnings)
    if count:
        notes.append(f"{count} warning{'s' * (count != 1)} above")
    return notes


def _next(run: Run, outcome: Outcome, prepared: TextData) -> list[str]:
    """Commands to type next; nothing in them, of the text least of all, can mean more to a shell."""
    folder = run.folder
    quoted = shlex.quote(str(folder))
    name = shlex.quote(folder.name) if folder.parent == RUNS_DIR else quoted
    prompt = fmt.one_line(printable(prepared.prompts()[0]))
    equals = "=" if prompt.startswith("-") else " "
    lines = [f"python generate.py --model_name {name} --prompt{equals}{shlex.quote(prompt)}"]
    if outcome.state.step < run.config.train.total_steps:
        lines.insert(0, f"python train.py --resume {quoted}")
    else:
        more = 2 * run.config.train.total_steps
        lines.append(f"python train.py --resume {quoted} train.total_steps={more}")
    if outcome.checkpoint is not None:
        other = ".pt" if run.backend.suffix == ".npz" else ".npz"
        where = "mps, cuda, cpu" if other == ".pt" else "mlx"
        paths = f"{shlex.quote(str(outcome.checkpoint))} {shlex.quote(folder.name + other)}"
        lines.append(f"python convert.py {paths}   # for {where}")
    return lines


def report(
    run: Run, data: Mapping[str, Any], exam: Skills, chances: Mapping[str, float], plot: Path | None
) -> str:
    """The training report, in Markdown."""
    c = run.config
    lines = [f"# {run.folder.name}", ""]
    if plot is not None:
        lines += [f"![loss]({plot.relative_to(run.folder)})", ""]
    lines += ["| figure | value |", "|---|---|"]
    for name, value in data.items():
        if not isinstance(value, (dict, list)):
            lines.append(f"| {name} | {fmt.value(value)} |")
    if exam:
        lines += ["", "| skill | right | asked | chance |", "|---|---|---|---|"]
        for name, (right, asked) in exam.items():
            lines.append(f"| {name} | {right} | {asked} | {100 * chances[name]:.0f} % |")
    lines += ["", "## Samples", ""]
    for row in read_rows(run.folder / "samples" / "samples.jsonl"):
        text = (row["prompt"] + row["text"]).replace("\n", "\n  > ")
        lines += [f"- step {row['step']:,}", f"  > {text}"]
    lines += ["", "## Settings", "", "```yaml"]
    for section, body in c.model_dump(mode="json").items():
        lines.append(f"{section}:")
        lines += [f"  {k}: {'null' if v is None else fmt_yaml(v)}" for k, v in body.items()]
    return "\n".join([*lines, "```", ""])


def fmt_yaml(value: object) -> str:
    """A scalar as YAML that the loader reads back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
