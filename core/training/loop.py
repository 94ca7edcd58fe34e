"""The training loop: steps, logs, validation, samples, checkpoints, and how a run ends.

The loop knows the backend only by `core.backend.Backend`. It reads metrics from the device when it
logs, and the skip counters every few steps; everything else stays lazy.
"""

import math
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from core.backend import Lazy, OutOfMemory
from core.data.sampling.loader import StepBatches
from core.errors import PippinError
from core.inference.evaluate import Evaluation, evaluate
from core.machine.speed import flops_per_token, peak_flops
from core.machine.system import process_memory
from core.training import format as fmt
from core.training.cadence import sample_steps, shown_steps
from core.training.console import Progress, Row
from core.training.recovery import halved
from core.training.run import Outcome, Reason, Run, is_better
from core.training.saving import save
from core.training.schedule import step_hyper

CHECK_EVERY = 5  # steps between readings of the skip counters
SLEEP_GAP_S = 30.0


class Loop:
    """One run from its state to its end; `run()` returns the outcome."""

    def __init__(self, run: Run) -> None:
        self.r = run
        train = run.config.train
        self._shown = shown_steps(train.total_steps, train.log_interval)
        self._samples = sample_steps(train.total_steps, train.samples)
        self._ema = fmt.Ema()
        self._recent: deque[float] = deque(maxlen=200)
        self._peak = peak_flops(run.device_name, train.precision)
        self._flops = flops_per_token(run.config.model, run.specs, run.config.data.seq_len)
        self._val: Evaluation | None = None
        self._val_step = -1
        self._val_is_best = False
        # The counter goes on over resumes; what was skipped before has been told.
        self._skipped = self._skipped_told = int(run.meta.backend_state.get("skipped_total", 0))
        self._in_a_row = 0
        self._first = self._begun = run.state.step
        self._tokens = 0
        # Tokens seen after each of the latest steps, to go back over skipped ones.
        self._seen = deque([(run.state.step, run.state.tokens_seen)], self._unread_steps())
        self._step_seconds = 0.0
        self._timed_tokens = 0
        self._timed_steps = 0
        self._seconds_a_step: float | None = None
        self._last_speed: float | None = None
        self._phase_seconds: dict[str, float] = run.phases
        self._wall = time.time() - time.monotonic()

    def run(self) -> Outcome:
        """Train until the end, a signal, or too many steps that are not finite."""
        r = self.r
        start = time.monotonic()
        r.console.header(with_mfu=self._peak is not None)
        with r.console.live():
            reason = self._steps()
        if reason == "done" and r.state.step < r.config.train.total_steps:
            reason = "stopped"
        return Outcome(
            reason=reason,
            state=r.state,
            first_step=self._first,
            train_loss=self._ema.value,
            final=self._val,
            seconds=time.monotonic() - start,
            tokens=self._tokens,
            skipped_steps=self._skipped,
            checkpoint=r.checkpoint,
            seconds_by_phase=self._phase_seconds,
        )

    def _steps(self) -> Reason:
        while True:
            try:
                return self._until_the_end()
            except OutOfMemory as error:
                failure = error.bare()
            self._recover(failure)

    def _until_the_end(self) -> Reason:
        r = self.r
        mark = time.monotonic()
        # Asked for anew each time: where memory runs out, there are other batches.
        while (batch := next(r.batches, None)) is not None:
            metrics = self._step(batch)
            step = r.state.step
            now = time.monotonic()
            if step > self._begun + 1:  # the first step compiles and allocates
                self._step_seconds += now - mark
                self._timed_tokens += batch.tokens
                self._timed_steps += 1
            self._phase_seconds["steps"] = self._phase_seconds.get("steps", 0.0) + now - mark
            # A signal that comes later than here stops the next step, which then saves.
            received = r.signals.received
            if received is not None:
                name = "Ctrl-C" if received == signal.SIGINT else "SIGTERM"
                r.console.warn(f"{name}: saving step {step:,} (Ctrl-C again to abort)")
            stop = received is not None or step >= r.stop_step
            if not self._finite(metrics, step, stop=stop):
                return "not finite"
            try:
                self._events(metrics, step, stop=stop)
            except PippinError as error:
                raise self._saved_first(error) from error
            if received is not None:
                return "interrupted" if received == signal.SIGINT else "terminated"
            if stop:
                break
            self._guard()
            mark = time.monotonic()
        return "done"

    def _guard(self) -> None:
        """Ask the watch over memory; above its budget a run that swaps is made smaller."""
        notice = None if self.r.watch is None else self.r.watch.poll()
        if notice is None:
            return
        if notice.kind == "shrink":
            raise OutOfMemory(notice.text)
        train = self.r.config.train
        tip = "close other programs"
        if (split := halved(train.micro_batch_size, train.grad_accum_steps)) is not None:
            tip += f", or --micro-batch-size {split[0]} train.grad_accum_steps={split[1]}"
        self.r.console.warn(f"{notice.text}: {tip}")

    def _recover(self, failure: OutOfMemory) -> None:
        """Go on with a smaller micro-batch, from the last finished step or the last saved one."""
        r, begin = self.r, time.monotonic()
        if r.recover is None:
            raise failure
        before = r.state.step
        r.recover(r, failure)
        if r.watch is not None:
            r.watch.reset()
        if r.state.step < before:
            self._skipped = self._skipped_told = int(r.meta.backend_state.get("skipped_total", 0))
            self._in_a_row = 0
            self._seen.clear()
            self._seen.append((r.state.step, r.state.tokens_seen))
        self._begun = r.state.step
        self._step_seconds, self._timed_tokens, self._timed_steps = 0.0, 0, 0
        self._add_phase("recovery", begin)

    def _saved_first(self, error: PippinError) -> PippinError:
        """Where the disk refused something else than a checkpoint, try to save before the end."""
        if error.code != "P312":
            return error
        state = self.r.state
        if self.r.checkpoint is None or self.r.meta.step != state.step:
            try:
                self._save()
            except PippinError as second:
                self.r.console.warn(f"while step {state.step:,} was saved: {second.what}")
        if self.r.checkpoint is not None:
            again = f"python train.py --resume {shlex.quote(str(self.r.folder))}"
            error.kept = f"saved: {self.r.checkpoint}; go on with {again}"
        return error

    def _step(self, batch: StepBatches) -> Mapping[str, Lazy]:
        r = self.r
        hyper = step_hyper(batch.step, r.config.train, batch.normalizer)
        if self._tokens == 0:
            advice = "still in the first step; usually this is compiling, or memory: try a smaller "
            with r.console.slow_step(
                advice + "train.micro_batch_size, or --dry-run for a forecast"
            ):
                metrics = r.backend.train_step(batch.micro, hyper)
                float(metrics["loss"])
        else:
            metrics = r.backend.train_step(batch.micro, hyper)
        r.state.step = batch.step
        r.state.tokens_seen += batch.tokens
        self._seen.append((batch.step, r.state.tokens_seen))
        self._tokens += batch.tokens
        return metrics

    def _finite(self, metrics: Mapping[str, Lazy], step: int, *, stop: bool) -> bool:
        """Read the counters when it is time; False ends the run."""
        r = self.r
        train = r.config.train
        due = step % CHECK_EVERY == 0 or self._logs(step) or self._saves(step)
        if not due and not stop:
            return True
        total = int(float(metrics["skipped_total"]))
        self._skipped = total
        if total > self._skipped_told:
            r.console.warn(
                f"step {step}: loss or gradient was not finite, skipped ({total} so far)"
            )
            self._skipped_told = total
        self._in_a_row = int(float(metrics["skipped_in_a_row"]))
        if self._in_a_row < train.max_skipped_steps:
            return True
        self._roll_back()
        self._save()
        return False

    def _unread_steps(self) -> int:
        """Steps that may have been skipped since the last good one when that is noticed."""
        return self.r.config.train.max_skipped_steps + CHECK_EVERY + 1

    def _roll_back(self) -> None:
        """Count the steps that were skipped in a row as not taken, so that a resume takes them again.

        They changed nothing, so the weights are those of the last good step, and by that number
        they are saved. It never goes back behind the start of this part of the run.
        """
        state = self.r.state
        while len(self._seen) > 1 and self._seen[-1][0] > state.step - self._in_a_row:
            self._seen.pop()
        state.step, state.tokens_seen = self._seen[-1]
        if state.best_step is not None:
            state.best_step = min(state.best_step, state.step)

    def _logs(self, step: int) -> bool:
        return (
            step % self.r.config.train.log_interval == 0
            or step in self._shown
            or step == self.r.stop_step
        )

    def _saves(self, step: int) -> bool:
        return step % self.r.config.train.ckpt_interval == 0 or step == self.r.stop_step

    def _events(self, metrics: Mapping[str, Lazy], step: int, *, stop: bool) -> None:
        r, train = self.r, self.r.config.train
        if step % train.eval_interval == 0 or self._saves(step) or stop:
            self._evaluate(step)
        if self._logs(step) or self._val_step == step:
            self._log(metrics, step)
        elif r.console.interactive:
            self._live(step)
        if stop or (self._saves(step) and self._in_a_row == 0):
            self._save()
        if step in self._samples and r.sample is not None and r.signals.received is None:
            begin = time.monotonic()
            r.sample(step)
            self._add_phase("samples", begin)

    def _add_phase(self, name: str, begin: float) -> None:
        self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + time.monotonic() - begin

    def _evaluate(self, step: int) -> None:
        begin = time.monotonic()
        self._val = self._score()
        self._val_step = step
        state = self.r.state
        self._val_is_best = is_better(self._val.loss, state.best_val_loss)
        if self._val_is_best:
            state.best_val_loss, state.best_step = self._val.loss, step
        if not math.isfinite(self._val.loss):
            self.r.console.warn(f"step {step}: the validation loss is not finite")
        self._add_phase("validation", begin)

    def _score(self) -> Evaluation:
        r = self.r
        while True:
            try:
                return evaluate(r.backend, r.eval_batches, token_bytes=r.token_bytes)
            except OutOfMemory as error:
                failure = error.bare()
            self._recover(failure)

    def _log(self, metrics: Mapping[str, Lazy], step: int) -> None:
        r, train = self.r, self.r.config.train
        loss = float(metrics["loss"])
        grad = float(metrics["grad_norm"])
        average = self._ema.update(step, loss)
        self._recent.append(average)
        speed = self._timed_tokens / self._step_seconds if self._step_seconds > 0 else None
        if speed is not None:
            self._last_speed = speed
            self._seconds_a_step = self._step_seconds / self._timed_steps
        self._step_seconds, self._timed_tokens, self._timed_steps = 0.0, 0, 0
        memory = r.backend.memory()
        if r.watch is not None and memory.active_bytes is not None:
            r.watch.device_bytes = memory.active_bytes + (memory.cached_bytes or 0)
        own = process_memory(os.getpid())
        process = own.memory_bytes if own is not None else 0
        used = max(memory.active_bytes or 0, process)
        hyper = step_hyper(step, train, 1.0)
        val = self._val if self._val_step == step else None
        mfu = speed * self._flops / self._peak if speed and self._peak else None
        eta = self._eta(step)
        row: dict[str, Any] = {
            "loss": loss,
            "learning_rate": hyper.lr["matrix"],
            "grad_norm": grad,
            "tokens_processed": r.state.tokens_seen,
            "throughput_tokens_per_sec": speed,
            "step_time_sec": self._seconds_a_step if speed is not None else None,
            "perplexity": math.exp(loss) if loss < 700 else None,
            "memory_active_bytes": memory.active_bytes,
            "memory_peak_bytes": memory.peak_bytes,
            "memory_process_bytes": process,
            "mfu": mfu,
            "skipped_total": self._skipped,
        }
        if "aux_loss" in metrics:
            row["aux_loss"] = float(metrics["aux_loss"])
        if "loss_scale" in metrics:
            row["loss_scale"] = float(metrics["loss_scale"])
            row["overflows_total"] = float(metrics["overflows_total"])
        if val is not None:
            row["val_loss"] = val.loss
            row["val_bits_per_byte"] = val.bits_per_byte
        r.log.row(step, row)
        r.console.emit("row", {"step": step, **{k: v for k, v in row.items() if _jsonable(v)}})
        shown = step in self._shown or r.console.every_row or r.console.wants_plain_row()
        if shown or step == r.stop_step or r.signals.received is not None:
            r.console.row(
                Row(
                    step=step,
                    loss=average,
                    trend=self._ema.trend(train.total_steps),
                    val=val.loss if val else None,
                    val_is_best=val is not None and self._val_is_best,
                    lr=hyper.lr["matrix"],
                    grad=grad,
                    tokens_per_s=speed,
                    mfu=mfu,
                    memory_bytes=used,
                    eta_s=eta,
                )
            )
        self._slept()
        self._live(step, used=used, mfu=mfu)

    def _slept(self) -> None:
        wall = time.time() - time.monotonic()
        if wall - self._wall > SLEEP_GAP_S:
            gap = fmt.duration(wall - self._wall)
            self.r.console.warn(f"the computer slept {gap}; training went on after it")
        self._wall = wall

    def _eta(self, step: int) -> float | None:
        if not self._seconds_a_step:
            return None
        left = (self.r.stop_step - step) * self._seconds_a_step
        steps = self._phase_seconds.get("steps", 0.0)
        other = sum(v for k, v in self._phase_seconds.items() if k != "steps")
        return left * (1 + other / steps) if steps > 5 else left

    def _live(self, step: int, *, used: int | None = None, mfu: float | None = None) -> None:
        r = self.r
        eta = self._eta(step)
        if eta is None:
            text = "..."
        elif step < 0.05 * r.stop_step:
            text = f"{fmt.duration(0.8 * eta)}-{fmt.duration(1.3 * eta)}"
        else:
            text = fmt.duration(eta)
        parts = [f"{fmt.si(self._last_speed)} tok/s"] if self._last_speed else []
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.0f} %")
        if used:
            parts.append(fmt.gigabytes(used))
        if r.checkpoint is not None:
            parts.append(f"saved step {r.meta.step:,}")
        r.console.progress(
            Progress(step, r.stop_step, text, list(self._recent), r.floor_nats, " · ".join(parts))
        )

    def _save(self) -> None:
        begin = time.monotonic()
        val = self._val if self._val_step >= self.r.state.step else None
        save(self.r, val)
        self._add_phase("saving", begin)


def _jsonable(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
