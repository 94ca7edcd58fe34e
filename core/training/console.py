"""The terminal: facts once, history rows, two live lines, a summary.

Without a terminal: plain lines, no control codes, one line a row. `NO_COLOR` and the encoding of the
stream are respected; what a model wrote is neutralised before it is printed.
"""

import contextlib
import json
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from core.config.draft import Draft
from core.environment import as_typed
from core.inference.text import printable
from core.training import format as fmt
from core.training.heartbeat import Activity, Silence, Ticking
from core.training.stream import LastingStream

REFRESH_S = 0.25
# Work that takes longer is named; the live lines are then drawn each second.
NAMED_AFTER_S = 2.0
REDRAW_S = 1.0
SLOW_STEP_S = 20.0
PLAIN_EVERY_S = 60.0
# key -> (title, width, shown at 80 columns)
COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("step", "step", 8),
    ("loss", "loss", 9),
    ("val", "val", 8),
    ("lr", "lr", 8),
    ("grad", "grad", 7),
    ("speed", "tok/s", 8),
    ("mfu", "MFU", 6),
    ("memory", "mem", 8),
    ("eta", "left", 9),
)
# Keys whose automatic value a user wants to know; --print-config shows the rest.
DECISIONS = (
    "model.d_model",
    "model.n_layers",
    "model.n_heads",
    "data.seq_len",
    "data.sampling",
    "train.precision",
    "train.total_steps",
    "train.micro_batch_size",
    "train.lr_matrix",
    "train.lr_embed",
)


@dataclass(frozen=True)
class Row:
    """Figures of one history row; None is not shown.

    Attributes:
        step: Optimizer steps done.
        loss: Running average of the training loss, nats a token.
        trend: Where it is going: one of the arrows of `Ema.trend`, or empty.
        val: Validation loss, nats a token.
        val_is_best: Whether it is the lowest so far.
        lr: Learning rate of the matrices.
        grad: Norm of the gradient before the clip.
        tokens_per_s: Trained tokens a second.
        mfu: Share of the device's peak FLOP/s, 0 to 1.
        memory_bytes: What the run uses now.
        eta_s: Seconds that are left.
        note: Words behind the figures.
    """

    step: int
    loss: float | None
    trend: str = ""
    val: float | None = None
    val_is_best: bool = False
    lr: float | None = None
    grad: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    eta_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Progress:
    """Figures of the two live lines.

    Attributes:
        step: Optimizer steps done.
        total_steps: The step that this start stops at.
        eta: The time that is left, in words.
        losses: Running averages of the training loss, oldest first, nats a token.
        floor: Lowest loss that the text allows, nats a token; None where it is not known.
        text: Speed and memory, in words.
        saved_at: When the run was last saved, by `Console.now`, seconds; None before that.
    """

    step: int
    total_steps: int
    eta: str
    losses: Sequence[float]
    floor: float | None
    text: str
    saved_at: float | None = None


class Console:
    """Everything a run prints. Human text goes to `stream`, JSON rows to stdout with `as_json`."""

    def __init__(
        self,
        *,
        stream: IO[str] | None = None,
        quiet: bool = False,
        as_json: bool = False,
        every_row: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        given = stream or (sys.stderr if as_json else sys.stdout)
        self._stream = LastingStream(given, self._nobody_reads)
        self._json_stream = LastingStream(sys.stdout, self._nobody_reads)
        file = cast(IO[str], self._stream)
        self._rich = RichConsole(file=file, highlight=False, soft_wrap=True, markup=False)
        self.interactive = self._rich.is_terminal and not quiet and not as_json
        encoding = (self._stream.encoding or "ascii").lower()
        self.unicode = "utf" in encoding
        self.quiet = quiet
        self._json = as_json
        self.every_row = every_row
        self.width = (
            min(shutil.get_terminal_size((80, 24)).columns, 100) if self.interactive else 80
        )
        self.now = now
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._last_refresh = float("-inf")
        self._last_print = self._last_row = now()
        self._activity: Activity | None = None
        self._silence = Silence()
        self._ticking = False
        self._columns = COLUMNS
        self.warnings: list[str] = []

    def print(self, text: str = "", style: str = "", *, always: bool = False) -> None:
        """One or more lines of plain text above the live lines."""
        if self.quiet and not always:
            return
        text = as_typed(text)
        if not self.unicode:
            text = fmt.to_ascii(text)
        self._rich.print(Text(text, style=style))
        self._stream.flush()
        self._last_print = self.now()

    def emit(self, kind: str, data: Mapping[str, Any]) -> None:
        """One JSON object on stdout, in JSON mode."""
        if self._json:
            self._json_stream.write(json.dumps({"kind": kind, **data}, allow_nan=False) + "\n")
            self._json_stream.flush()

    def _nobody_reads(self) -> None:
        """Said on stderr, since the run goes on without a reader."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(
                " ! the output cannot be written any more; the run goes on without it\n"
            )
            sys.stderr.flush()

    def banner(self, version: str) -> None:
        """The first line, printed before anything slow."""
        self.print(f" pippin {version}   grow a small language model, the same on every backend")

    def fact(self, label: str, text: str, result: str = "", seconds: float | None = None) -> None:
        """One line of the first zone: what, the facts, what was done, how long."""
        right = f"{result}{'':>2}{seconds:6.1f} s" if seconds is not None else result
        if right or not self.interactive:  # a log or a pipe gets each fact on one line
            self.print(fmt.two_sided(f" {label:<10} {text}", right, self.width))
            return
        for line in fmt.hanging(f" {label:<10} ", text, self.width):
            self.print(line)

    @contextlib.contextmanager
    def phase(self, label: str, doing: str) -> Iterator[None]:
        """Say what goes on wherever nothing was printed for 5 seconds."""
        before = self._activity
        self._activity = Activity(f"phase {doing}", doing, self.now(), label)
        try:
            with self._watched():
                yield
        finally:
            self._activity = before

    def doing(self, kind: str, words: str) -> None:
        """What the run does from now on: named where it takes long, until something else is done."""
        self._activity = Activity(kind, words, self.now())

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Call `tick` four times a second, in one thread however deep this is nested."""
        if self._ticking:
            yield
            return
        self._ticking = True
        try:
            with Ticking(self.tick):
                yield
        finally:
            self._ticking = False

    def tick(self) -> None:
        """Redraw the live lines, or print what goes on where it was silent for long."""
        activity, now = self._activity, self.now()
        if activity is None:
            return
        if self._live is not None:
            if now - max(self._last_refresh, activity.since) >= REDRAW_S:
                self._draw()
        elif now - activity.since < NAMED_AFTER_S:
            return
        elif self._silence.ends(activity, now - self._last_print):
            self.print(activity.line(now), "dim")

    @contextlib.contextmanager
    def slow_step(self, explain: str) -> Iterator[None]:
        """Explain a first step that takes longer than 20 seconds."""
        timer = threading.Timer(SLOW_STEP_S, lambda: self.warn(explain))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def decided(self, draft: Draft) -> None:
        """The values that were decided, with their source and reason; defaults are counted."""
        asked = {k for k, s in draft.sources.items() if s.kind in ("file", "flag", "preset")}
        auto = {k for k, s in draft.sources.items() if s.kind == "auto"} & set(DECISIONS)
        shown = [k for k in draft.values if k in asked | auto]
        self.print()
        names = max(24, *map(len, shown)) + 2 if shown else 26
        self.print(f" {'what':<{names}}{'value':<16}{'from':<8}why", "bold")
        for name in shown:
            source = draft.sources[name]
            why = source.reason or source.where
            value = fmt.cut_left(fmt.value(draft.values[name]), 15)
            left = f" {name:<{names}}{value:<16}{source.kind:<8}"
            for line in fmt.hanging(left, why, self.width):
                self.print(line)
        rest = len(draft.values) - len(shown)
        self.print(f"   + {rest} more, all of them: python train.py --print-config", "dim")
        self.print()

    def header(self, *, with_mfu: bool) -> None:
        """Titles of the history; MFU only where the peak is known, and on wide terminals."""
        self._columns = tuple(
            c for c in COLUMNS if c[0] != "mfu" or (with_mfu and self.width >= 72)
        )
        if self.interactive:
            self._columns = tuple(c for c in self._columns if c[0] != "eta")
        self.print("".join(title.rjust(width) for _, title, width in self._columns), "bold")
        self._last_row = self.now()

    def row(self, row: Row) -> None:
        """One history row."""
        cells = {
            "step": f"{row.step:,}",
            "loss": ("" if row.loss is None else fmt.number(row.loss) + (f" {row.trend or ' '}")),
            "val": (fmt.number(row.val) + ("*" if row.val_is_best else " ")) if row.val else "",
            "lr": f"{row.lr:.0e}".replace("e-0", "e-") if row.lr is not None else "",
            "grad": fmt.number(row.grad, 2) if row.grad is not None else "",
            "speed": fmt.si(row.tokens_per_s) if row.tokens_per_s else "",
            "mfu": f"{100 * row.mfu:.0f} %" if row.mfu is not None else "",
            "memory": fmt.gigabytes(row.memory_bytes) if row.memory_bytes else "",
            "eta": fmt.duration(row.eta_s) if row.eta_s is not None else "",
        }
        text = "".join(cells[key].rjust(width) for key, _, width in self._columns)
        self.print(text + (f"  {row.note}" if row.note else ""))
        self._last_row = self.now()

    def wants_plain_row(self, step_s: float) -> bool:
        """Without a terminal: whether a minute without a row would pass in another such step."""
        return not self.interactive and self.now() - self._last_row + step_s > PLAIN_EVERY_S

    def sample(self, prompt: str, text: str) -> None:
        """What the model writes after a prompt, neutralised, at most three lines."""
        words = " ".join(printable(prompt + text).split())
        mark = "┆" if self.unicode else "|"
        lines = textwrap.wrap(words, self.width - 6)[:3]
        for line in lines:
            self.print(f"   {mark} {line}", "dim")

    def warn(self, text: str) -> None:
        """A warning, once above the live lines, and counted in the summary."""
        self.warnings.append(text)
        self._notice(text, always=True)

    def _notice(self, text: str, *, always: bool = False) -> None:
        """A line that stands out, broken at words in a terminal, so that the live lines stay."""
        lines = fmt.hanging(" ! ", text, self.width) if self.interactive else [f" ! {text}"]
        self.print("\n".join(lines), "yellow", always=always)

    def stopping(self, number: int, step: int) -> None:
        """Answer a signal, while the step that it stops after may go on for long."""
        if number == signal.SIGINT:
            text = f"stopping after step {step:,} (Ctrl-C again to abort without saving)"
        else:
            text = f"SIGTERM: stopping after step {step:,}, which is saved"
        self._notice(text, always=True)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """The zone of the history, with two live lines in a terminal; what takes long is named."""
        try:
            with self._live_lines(), self._watched():
                yield
        finally:
            self._activity = self._progress = None

    @contextlib.contextmanager
    def _live_lines(self) -> Iterator[None]:
        if not self.interactive:
            yield
            return
        with Live(
            Text(""), console=self._rich, auto_refresh=False, transient=True, redirect_stderr=False
        ) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def progress(self, progress: Progress) -> None:
        """Redraw the live lines, at most four times a second."""
        self._progress = progress
        if self.now() - self._last_refresh >= REFRESH_S:
            self._draw()

    def _draw(self) -> None:
        live, now = self._live, self.now()
        if live is None:
            return
        self._last_refresh = now
        text = "\n".join(self._lines_at(now))
        live.update(Text(text if self.unicode else fmt.to_ascii(text)), refresh=True)

    def _lines_at(self, now: float) -> list[str]:
        """The live lines at a moment: how far the run is, and how it does."""
        p, doing = self._progress, self._activity
        parts = []
        if doing is not None and now - doing.since >= NAMED_AFTER_S:
            parts.append(f"{doing.words}: {now - doing.since:.0f} s")
        if p is None:
            return [f" {part}" for part in parts]
        total = max(p.total_steps, 1)
        tail = f"  {p.step:,}/{p.total_steps:,}  {100 * p.step // total} %   {p.eta} left"
        bar = fmt.bar(p.step / total, self.width - len(tail) - 2)
        if p.losses:
            floor = f" floor {p.floor:.2f}" if p.floor else ""
            parts.append(f"loss {fmt.number(p.losses[-1])} {fmt.sparkline(p.losses)}{floor}")
        parts.append(p.text)
        if p.saved_at is not None:
            parts.append(f"saved {fmt.duration(now - p.saved_at)} ago")
        below = " · ".join(part for part in parts if part)
        return [f" {bar}{tail}", fmt.cut(f" {below}", self.width)]

    def skills(self, results: Mapping[str, tuple[int, int]], chance: Mapping[str, float]) -> None:
        """Skill bars beside chance."""
        total = sum(n for _, n in results.values())
        self.print(f" skills     {total} questions about unseen stories (| is chance)")
        for name, (right, asked) in results.items():
            if asked:
                bar = fmt.skill_bar(right / asked, chance[name], 30, unicode=self.unicode)
                self.print(f"   {name:<10}{bar} {100 * right / asked:4.0f} %")

    def block(self, label: str, lines: Sequence[str]) -> None:
        """Lines of the summary under one label."""
        for i, line in enumerate(lines):
            self.print(f" {label if i == 0 else '':<9}{line}", always=True)
