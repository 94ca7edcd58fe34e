"""Several learning rates, one run each: `--lr 0.02 --lr 0.01 --lr 0.005`.

Every run has a folder of its own beside the others, and all have the size, the length and the text of
the first, so that they differ in the rates alone. Ctrl-C keeps what is there; the same command goes
on: finished runs are skipped, an unfinished one is resumed.
"""

import contextlib
import glob
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.checkpoint import list_checkpoints
from core.config.load import load, parse_override
from core.config.presets import find_config
from core.config.schema import is_auto_key, key_names
from core.errors import EXIT_FAULT, EXIT_SIGINT, EXIT_SIGTERM, PippinError
from core.machine.backends import Backends
from core.paths import is_safe_name
from core.training import format as fmt
from core.training.console import Console
from core.training.naming import settle
from core.training.options import Options
from core.training.plots import sweep_plot
from core.training.runfolder import RUNS_DIR, is_run
from core.training.runlog import METRICS_NAME, SUMMARY_NAME, read_rows, write_json
from core.training.session import Session

RECORD = "sweep.json"
CONFIG_NAME = "config.json"
# Options that change nothing of what the runs compute.
OUTWARD = (
    "lr",
    "resume",
    "overwrite",
    "save_dir",
    "save_dir_flag",
    "model_name",
    "quiet",
    "json",
    "log",
    "force",
)
NOT_FINITE = "P401"


@dataclass(frozen=True)
class Point:
    """One rate and its run."""

    lr: float
    folder: Path


class Sweep:
    """The runs of one command, their table and their picture."""

    def __init__(
        self, options: Options, backends: Backends, console: Console, *, command: str
    ) -> None:
        self.options = options
        self.backends = backends
        self.console = console
        self.command = command.replace(" --overwrite", "")
        self.runs_dir, self.base = _place(options)
        self.folder = self.runs_dir / f"{self.base}-lr-sweep"
        self.points = [Point(lr, self.runs_dir / f"{self.base}-lr-{lr:g}") for lr in self._rates()]
        self.diverged: set[str] = set()
        self.trained: list[Path] = []

    def run(self) -> int:
        """Train what is missing; returns the exit code.

        Raises:
            PippinError: P012 for rates or flags that make no sweep, P311 where the folders are of
                another sweep, and whatever a run raises but a loss that is not finite.
        """
        if self.options.resume is not None:
            raise PippinError(
                "P012",
                "--resume names one run, and several --lr are a sweep.",
                found="a sweep goes on by its own command: finished runs are skipped",
                remedy="leave out --resume, or give one --lr",
                kept="nothing was started.",
            )
        only_look = self.options.print_config or self.options.dry_run
        before, mark = self._record(), _stamp(self.points[0].folder)
        if not only_look:
            self._claim()
        try:
            return self._runs(only_look=only_look)
        except PippinError:
            # Refused before the first run wrote anything: the corrected command finds all as it was.
            if not only_look and len(self.trained) < 2 and _stamp(self.points[0].folder) == mark:
                self._give_up_claim(before)
            raise

    def _runs(self, *, only_look: bool) -> int:
        rates = ", ".join(f"{p.lr:g}" for p in self.points)
        if not self.options.print_config:
            self.console.fact("sweep", f"{len(self.points)} learning rates: {rates}")
        for number, point in enumerate(self.points, 1):
            try:
                code = self._one(number, point)
            except KeyboardInterrupt:
                code = EXIT_SIGINT
            if code in (EXIT_SIGINT, EXIT_SIGTERM):
                self._interrupted(point)
                return code
            if code != 0:
                return code
        return 0 if only_look else self._sum_up()

    # Where and what

    def _rates(self) -> list[float]:
        self._refuse_fixed_rate()
        rates: list[float] = []
        for text in self.options.lr:
            value = load(overrides=[f"train.lr={text}"]).values["train.lr"]
            # Folders and the record know a rate by its first six digits.
            if f"{value:g}" in [f"{rate:g}" for rate in rates]:
                raise PippinError(
                    "P012",
                    f"--lr {text} is given twice.",
                    found=f"the run of each would be {self.base}-lr-{value:g}",
                    remedy="leave out one of them",
                    kept="nothing was started.",
                )
            rates.append(float(value))
        return rates

    def _refuse_fixed_rate(self) -> None:
        """An override of the rate would win over every --lr: one rate under several names."""
        fixed = [o for o in self.options.overrides if parse_override(o)[0] == "train.lr"]
        if (rate := self.options.foreign.get("learning_rate")) is not None:
            fixed.append(f"--learning_rate {rate}")
        if fixed:
            raise PippinError(
                "P012",
                f"{fixed[-1]} gives every run of the sweep the same rate.",
                found="".join(f" --lr {text}" for text in self.options.lr).strip(),
                remedy=f"leave out {fixed[-1]}",
                kept="nothing was started.",
            )

    def _settings(self) -> dict[str, Any]:
        """What all runs have in common, to know the sweep again."""
        values = {k: v for k, v in vars(self.options).items() if k not in OUTWARD}
        return {k: v for k, v in values.items() if v not in (None, [], {}, False)}

    def _claim(self) -> None:
        """Find the sweep's record, or begin one; refuse folders that are of something else."""
        record = self._record()
        if self.options.overwrite or not self._has_begun(record):
            record = None
        elif record is not None and record["settings"] != self._settings():
            raise PippinError(
                "P311",
                f"{self.folder} is a sweep of other settings.",
                found=_differences(record["settings"], self._settings()),
                remedy="give another --model-name, or add --overwrite to begin it anew",
                kept="nothing was changed.",
            )
        if record is None:
            taken = [p.folder for p in self.points if is_run(p.folder)]
            if taken and not self.options.overwrite:
                raise PippinError(
                    "P311",
                    f"{taken[0]} already holds a run, and it is of no sweep.",
                    remedy="give another --model-name, or add --overwrite to begin anew there",
                    kept="nothing was changed.",
                )
            self._write({"settings": self._settings(), "runs": {}})
        else:
            runs = record.get("runs", {})
            self.diverged = {lr for lr, run in runs.items() if run.get("state") == "not finite"}

    def _has_begun(self, record: Mapping[str, Any] | None) -> bool:
        """Whether a run of the record was begun; a record without one keeps nothing."""
        runs = {} if record is None else record.get("runs", {})
        if any(run.get("state") != "missing" for run in runs.values()):
            return True
        names = glob.escape(f"{self.base}-lr-")
        return any(is_run(folder) for folder in self.runs_dir.glob(f"{names}*"))

    def _give_up_claim(self, before: Mapping[str, Any] | None) -> None:
        """Put back what was there before `_claim`."""
        if before is not None:
            self._write(before)
            return
        with contextlib.suppress(OSError):  # another program's file is there, or it is gone
            (self.folder / RECORD).unlink()
            self.folder.rmdir()
            self.runs_dir.rmdir()

    def _record(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and "settings" in record else None

    def _write(self, record: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RECORD, record)

    # Runs

    def _one(self, number: int, point: Point) -> int:
        label = f"run {number} of {len(self.points)}: --lr {point.lr:g}"
        only_look = self.options.print_config or self.options.dry_run
        fresh = self.options.overwrite or only_look
        if not fresh and (summary := self._finished(point)) is not None:
            self.console.fact("sweep", f"{label} is finished at step {summary['total_steps']:,}")
            return 0
        if not fresh and f"{point.lr:g}" in self.diverged:
            self.console.fact("sweep", f"{label} was not finite before; it is not tried again")
            return 0
        if not self.options.print_config:
            self.console.print()
            self.console.fact("sweep", f"{label}, in {point.folder}")
        self.console.warnings.clear()
        if not fresh and list_checkpoints(point.folder):
            options = self._going_on(point)
        else:
            options = replace(
                self._untimed(common) if (common := self._common(point)) else self.options,
                lr=[repr(point.lr)],
                save_dir=str(point.folder),
                model_name=None,
            )
        self.trained.append(point.folder)
        try:
            return Session(settle(options, self.console), self.backends, self.console).run()
        except PippinError as error:
            if error.code != NOT_FINITE:
                raise
            self.console.warn(f"{label}: {error.what}")
            self.diverged.add(f"{point.lr:g}")
            return 0

    def _going_on(self, point: Point) -> Options:
        """Options of a run that goes on: all but the place and the length is its checkpoint's."""
        o = self.options
        return Options(
            resume=str(point.folder),
            max_steps=o.max_steps,
            backend=o.backend,
            force=o.force,
            log=o.log,
            quiet=o.quiet,
            json=o.json,
        )

    def _common(self, point: Point) -> list[str]:
        """What the machine decided for the first run, for the others too; rates are their own."""
        here = [p for p in self.points if p != point]
        if self.options.overwrite:  # what lies there is of before, but for what was trained now
            here = [p for p in here if p.folder in self.trained]
        first = next((c for p in here if (c := _config(p.folder))), None)
        if first is None:
            return []
        given = {parse_override(text)[0] for text in self.options.overrides}
        out = []
        for key in key_names():
            section, _, name = key.partition(".")
            rate = key.startswith("train.lr") or key in ("train.min_lr", "train.save_dir")
            if is_auto_key(key) and not rate and key not in given and name in first[section]:
                out.append(f"{key}={json.dumps(first[section][name])}")
        return out

    def _untimed(self, common: list[str]) -> Options:
        """The options of a run whose length is known: the time stays in its configuration alone."""
        minutes = self.options.asked_minutes()
        time = [] if minutes is None else [f"train.minutes={minutes!r}"]
        overrides = [*common, *time, *self.options.overrides]
        return replace(self.options, overrides=overrides, time_budget=None, minutes=None)

    def _finished(self, point: Point) -> dict[str, Any] | None:
        """The summary of a run that needs no more steps."""
        try:
            text = (point.folder / "logs" / SUMMARY_NAME).read_text(encoding="utf-8")
            summary = json.loads(text)
            goal = int(summary["planned_steps"])
            if self.options.max_steps is not None:
                goal = min(goal, self.options.max_steps)
            failed = summary.get("reason") in ("failed", "not finite")
            return summary if int(summary["total_steps"]) >= goal and not failed else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # The end

    def _interrupted(self, point: Point) -> None:
        done = [p for p in self.points if self._finished(p) is not None]
        self._save_results()
        self.console.print()
        self.console.block(
            "sweep",
            [
                f"stopped at --lr {point.lr:g}; {len(done)} of {len(self.points)} runs are finished "
                "and stay",
                f"go on: {self.command}",
            ],
        )

    def _save_results(self) -> dict[str, dict[str, Any]]:
        runs: dict[str, dict[str, Any]] = {}
        for point in self.points:
            name = f"{point.lr:g}"
            summary = self._finished(point)
            state = "finished" if summary else "missing"
            if name in self.diverged:
                state, summary = "not finite", None
            keys = (
                "total_steps",
                "final_val_loss",
                "best_val_loss",
                "val_bits_per_byte",
                "parameters",
            )
            figures = {k: summary[k] for k in keys if k in summary} if summary else {}
            runs[name] = {"folder": str(point.folder), "state": state, **figures}
        before = (self._record() or {}).get("runs", {})
        self._write({"settings": self._settings(), "runs": {**before, **runs}})
        return runs

    def _sum_up(self) -> int:
        runs = self._save_results()
        scored = {lr: r for lr, r in runs.items() if _loss(r) is not None}
        best = min(scored, key=lambda lr: _loss(scored[lr]) or math.inf) if scored else None
        lines = [f"{'lr':<10}{'val loss':>10}{'bits/byte':>11}{'steps':>8}   run"]
        for lr, run in runs.items():
            loss, bits = _loss(run), run.get("val_bits_per_byte")
            shown = fmt.number(loss) if loss is not None else run["state"]
            byte = f"{bits:.3f}" if bits is not None else ""
            steps = f"{run['total_steps']:,}" if "total_steps" in run else ""
            mark = "   best" if lr == best else ""
            lines.append(f"{lr:<10}{shown:>10}{byte:>11}{steps:>8}   {run['folder']}{mark}")
        self.console.print()
        self.console.block("sweep", lines)
        plot = self._draw(runs)
        notes = [f"{self.folder / RECORD}   every figure"]
        if plot is not None:
            notes.append(f"{plot}   the picture")
        ends = sorted(scored, key=float)
        if len(ends) > 1 and best in (ends[0], ends[-1]):
            notes.append("the best is at an end of the row; a rate beyond it may be better")
        self.console.block("files", notes)
        self.console.emit("sweep", {"best": best, "runs": runs})
        return 0 if scored else EXIT_FAULT

    def _draw(self, runs: Mapping[str, Mapping[str, Any]]) -> Path | None:
        curves = {lr: _curve(Path(run["folder"])) for lr, run in runs.items()}
        losses = {lr: loss for lr, run in runs.items() if (loss := _loss(run)) is not None}
        try:
            return sweep_plot(curves, losses, self.folder / "sweep.png", title=self.base)
        except (OSError, ValueError) as error:
            self.console.warn(f"the picture could not be made: {fmt.one_line(str(error))}")
            return None


def _place(options: Options) -> tuple[Path, str]:
    """Folder of the runs and the beginning of their names."""
    if options.save_dir is not None:
        path = Path(options.save_dir)
        return path.parent, path.name
    config = options.config
    name = options.model_name or (find_config(config).stem if config else "quickstart")
    if not is_safe_name(name):
        raise PippinError(
            "P012", f"{name!r} cannot be a folder's name.", remedy="give a --model-name of letters"
        )
    return RUNS_DIR, name


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Tells whether a run began in a folder: the first thing that it writes is its configuration."""
    try:
        found = (folder / CONFIG_NAME).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and "model" in config else None


def _loss(run: Mapping[str, Any]) -> float | None:
    loss = run.get("final_val_loss", run.get("best_val_loss"))
    return float(loss) if loss is not None else None


def _curve(folder: Path) -> list[tuple[int, float]]:
    """Validation loss over steps, or the training loss where there is one point of it or none."""
    rows = read_rows(folder / "logs" / METRICS_NAME)
    val = [(int(r["step"]), float(r["val_loss"])) for r in rows if "val_loss" in r]
    return (
        val if len(val) > 1 else [(int(r["step"]), float(r["loss"])) for r in rows if "loss" in r]
    )


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [n for n in {**there, **now} if there.get(n) != now.get(n)]
    return "\n".join(
        f"{n}: there {there.get(n, 'not given')}, now {now.get(n, 'not given')}" for n in names
    )
