"""What a run tells as it goes: rows of the terminal and of its log, and the live lines.

Its averages depend on the steps alone, never on the clock, so a resumed run tells the same.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping

from core.backend import Lazy
from core.inference.evaluate import Evaluation
from core.machine.speed import flops_per_token, peak_flops
from core.machine.system import process_memory
from core.training import format as fmt
from core.training.average import Ema
from core.training.awake import Awake
from core.training.cadence import shown_steps
from core.training.console import Progress, Row
from core.training.pace import Pace
from core.training.run import Run
from core.training.runlog import losses_until, metrics_row, strict
from core.training.schedule import step_hyper


class Reporter:
    """Tells of a run's steps.

    Args:
        run: The run, whose log, terminal and watch over memory are told; its state is only read.
        pace: Its speed, kept up to date by the loop.

    Attributes:
        saved_at: When the run was last saved, by `Console.now`; None before that.
    """

    def __init__(self, run: Run, pace: Pace) -> None:
        self.r, self._pace = run, pace
        train = run.config.train
        self._shown = shown_steps(train.total_steps, train.log_interval, train.eval_interval)
        self._peak = peak_flops(
            run.device.device,
            train.precision,
            backend=run.device.backend,
            native_bf16=run.device.native_bf16,
            tf32=train.tf32,
        )
        self._flops = flops_per_token(run.config.model, run.specs, run.config.data.seq_len)
        self.saved_at: float | None = None
        on_mac = sys.platform == "darwin"
        self._awake = Awake(on_mac=on_mac, wall_s=time.time(), monotonic_s=time.monotonic())
        self.take_up_average()

    @property
    def average(self) -> float | None:
        """The average loss, in nats a token; None while there is none."""
        value = self._ema.value
        return None if value is None or math.isnan(value) else value

    def header(self) -> None:
        """Name the columns."""
        self.r.console.header(with_mfu=self._peak is not None)

    def logs(self, step: int) -> bool:
        """Whether a step has a row in the log."""
        every = self.r.config.train.log_interval
        return step % every == 0 or step in self._shown or step == self.r.stop_step

    def take_up_average(self) -> None:
        """The average loss of the run's own log up to its step, as if it had never stopped.

        A row that is there only because the run stopped at its step is none of an uninterrupted run.
        """
        train, state = self.r.config.train, self.r.state
        every = (train.log_interval, train.eval_interval, train.ckpt_interval)
        self._ema = Ema()
        self._recent: deque[float] = deque(maxlen=200)
        for step, loss in losses_until(self.r.log.path, state.step):
            if step in self._shown or any(step % n == 0 for n in every):
                self._add(step, loss)

    def log(
        self,
        metrics: Mapping[str, Lazy],
        step: int,
        step_s: float,
        *,
        trained: bool,
        skipped_total: int,
        val: Evaluation | None,
        val_is_best: bool,
    ) -> None:
        """Write a step's row into the log, and into the terminal where it is its turn.

        Args:
            metrics: What the backend says of the step; read here.
            step: Its number.
            step_s: Seconds it took.
            trained: Whether it had a target to train on; without one it has no loss.
            skipped_total: Steps that were not finite so far.
            val: Validation after this step, if there was one.
            val_is_best: Whether that is the lowest so far.
        """
        r, train = self.r, self.r.config.train
        loss = _loss(metrics, trained)
        grad = float(metrics["grad_norm"])
        average = self._add(step, loss)
        speed = self._pace.logged()
        memory = r.backend.memory()
        if r.watch is not None and memory.active_bytes is not None:
            r.watch.device_bytes = memory.active_bytes + (memory.cached_bytes or 0)
        process = _process_bytes()
        used = max(memory.active_bytes or 0, process)
        hyper = step_hyper(step, train, 1.0)
        mfu = speed * self._flops / self._peak if speed and self._peak else None
        row = metrics_row(
            metrics,
            loss=loss,
            grad_norm=grad,
            learning_rate=hyper.lr["matrix"],
            tokens_seen=r.state.tokens_seen,
            speed=speed,
            step_time_s=self._pace.seconds_a_step,
            memory=memory,
            process_bytes=process,
            mfu=mfu,
            skipped_total=skipped_total,
            val=val,
        )
        r.log.row(step, row)
        r.console.emit("row", {"step": step, **strict(row)})
        left = self._pace.seconds_left(r.stop_step - step)
        shown = step in self._shown or r.console.every_row or r.console.wants_plain_row(step_s)
        if shown or step == r.stop_step or r.signals.received is not None:
            r.console.row(
                Row(
                    step=step,
                    loss=_number(average, trained),
                    trend=self._ema.trend(train.total_steps),
                    val=val.loss if val else None,
                    val_is_best=val is not None and val_is_best,
                    lr=hyper.lr["matrix"],
                    grad=grad,
                    tokens_per_s=speed,
                    mfu=mfu,
                    memory_bytes=used,
                    eta_s=left,
                )
            )
        self._tell_of_sleep(left)
        self.live(step, used=used, mfu=mfu)

    def row_between(self, metrics: Mapping[str, Lazy], step: int, *, trained: bool) -> None:
        """A row of a step that is not logged, so that a run of slow steps is not silent for long.

        Its loss is part of no average and of no log.
        """
        r = self.r
        r.console.row(
            Row(
                step=step,
                loss=_number(self._ema.with_value(_loss(metrics, trained)), trained),
                lr=step_hyper(step, r.config.train, 1.0).lr["matrix"],
                grad=float(metrics["grad_norm"]),
                tokens_per_s=self._pace.speed(),
                memory_bytes=max(r.backend.memory().active_bytes or 0, _process_bytes()),
                eta_s=self._pace.seconds_left(r.stop_step - step),
            )
        )

    def live(self, step: int, *, used: int | None = None, mfu: float | None = None) -> None:
        """The live lines after a step, with what its row found out."""
        r, pace = self.r, self._pace
        parts = [f"{fmt.si(pace.last_speed)} tok/s"] if pace.last_speed else []
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.0f} %")
        if used:
            parts.append(fmt.gigabytes(used))
        left = pace.left_in_words(step, r.stop_step)
        text = " · ".join(parts)
        r.console.progress(
            Progress(step, r.stop_step, left, list(self._recent), r.floor_nats, text, self.saved_at)
        )

    def _add(self, step: int, loss: float) -> float:
        """Take a loss into the average, which is NaN while none was finite."""
        average = self._ema.update(step, loss)
        if not math.isnan(average):
            self._recent.append(average)
        return average

    def _tell_of_sleep(self, left_s: float | None) -> None:
        console = self.r.console
        if (words := self._awake.slept(time.time(), time.monotonic())) is not None:
            console.warn(words)
        if (words := self._awake.advice(left_s)) is not None:
            console.fact("awake", words)


def _loss(metrics: Mapping[str, Lazy], trained: bool) -> float:
    """A step's loss in nats a token; NaN where it had nothing to learn from."""
    return float(metrics["loss"]) if trained else math.nan


def _number(value: float, trained: bool) -> float | None:
    """A loss to show: NaN is one only of a step that went wrong."""
    return None if math.isnan(value) and not trained else value


def _process_bytes() -> int:
    own = process_memory(os.getpid())
    return own.memory_bytes if own is not None else 0
