"""The training loop: steps, validation, samples, checkpoints, and how a run ends.

The loop knows the backend only by `core.backend.Backend`. It reads metrics from the device when it
logs, and the skip counters every few steps; everything else stays lazy.
"""

import math
import shlex
import signal
import time
from collections import deque
from collections.abc import Mapping

from core.backend import Lazy, OutOfMemory
from core.data.sampling.loader import StepBatches
from core.errors import PippinError
from core.inference.evaluate import Evaluation, evaluate
from core.training.cadence import sample_steps
from core.training.pace import Pace
from core.training.recovery import halved
from core.training.reporting import Reporter
from core.training.run import Outcome, Reason, Run, is_better
from core.training.saving import save
from core.training.schedule import step_hyper

CHECK_EVERY = 5  # steps between readings of the skip counters


class Loop:
    """One run from its state to its end; `run()` returns the outcome."""

    def __init__(self, run: Run) -> None:
        self.r = run
        train = run.config.train
        self._samples = sample_steps(train.total_steps, train.samples)
        self._val: Evaluation | None = None
        self._val_step = -1
        self._val_is_best = False
        # The counter goes on over resumes; what was skipped before has been told.
        self._skipped = self._skipped_told = int(run.meta.backend_state.get("skipped_total", 0))
        self._in_a_row = 0
        self._trained = True  # Whether the step had a target to train on.
        self._told_untrained = self._told_slow = False
        self._first = self._begun = run.state.step
        self._tokens = 0
        # Tokens seen after each of the latest steps, to go back over skipped ones.
        self._seen = deque([(run.state.step, run.state.tokens_seen)], self._unread_steps())
        self._started = time.monotonic()
        self._pace = Pace(run.phases)
        self._reporter = Reporter(run, self._pace)

    def run(self) -> Outcome:
        """Train until the end, a signal, or too many steps that are not finite."""
        r = self.r
        self._reporter.header()
        with r.console.live():
            reason = self._steps()
        if reason == "done" and r.state.step < r.config.train.total_steps:
            reason = "stopped"
        return self.outcome(reason)

    def outcome(self, reason: Reason, error: str | None = None) -> Outcome:
        """How this part of the run ended, `error` being the code of what ended it."""
        r = self.r
        return Outcome(
            reason=reason,
            state=r.state,
            first_step=self._first,
            train_loss=self._reporter.average,
            final=self._val if self._val_step >= r.state.step else None,
            seconds=time.monotonic() - self._started,
            tokens=self._tokens,
            skipped_steps=self._skipped,
            checkpoint=r.checkpoint,
            seconds_by_phase=self._pace.phases,
            error=error,
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
        mark = self._begin_step()
        # Asked for anew each time: where memory runs out, there are other batches.
        while (batch := self._next()) is not None:
            metrics = self._step(batch)
            step = r.state.step
            step_s = time.monotonic() - mark
            # The first step compiles and allocates.
            self._pace.add_step(step_s, batch.tokens, typical=step > self._begun + 1)
            signalled = self._signalled(step)
            stop = signalled or step >= r.stop_step
            if not self._finite(metrics, step, stop=stop):
                return "not finite"
            try:
                self._events(metrics, step, step_s, stop=stop)
                # A signal that came during validation or saving does not wait for another step.
                if not stop and self._signalled(step):
                    signalled = True
                    self._save()
            except PippinError as error:
                raise self._saved_first(error) from error
            if signalled:
                return "interrupted" if r.signals.received == signal.SIGINT else "terminated"
            if stop:
                break
            self._guard()
            mark = self._begin_step()
        return "done"

    def _next(self) -> StepBatches | None:
        try:
            return next(self.r.batches, None)
        except PippinError as error:  # A shard that cannot be read: the state is whole.
            raise self._saved_first(error) from error

    def _begin_step(self) -> float:
        """Say which step begins, and stops the run if a signal comes; returns the moment."""
        self.r.signals.step = self.r.state.step + 1
        self.r.console.doing("steps", f"computing step {self.r.state.step + 1:,}")
        return time.monotonic()

    def _signalled(self, step: int) -> bool:
        """Whether a signal ends the run after this step; said after the answer to it."""
        signals = self.r.signals
        if signals.received is None:
            return False
        signals.wait_for_answer()
        if signals.received == signal.SIGINT:
            self.r.console.warn(f"Ctrl-C: saving step {step:,} (Ctrl-C again to abort)")
        else:
            self.r.console.warn(f"SIGTERM: saving step {step:,}")
        return True

    def _guard(self) -> None:
        """Ask the watch over memory; above its budget a run that swaps is made smaller."""
        notice = None if self.r.watch is None else self.r.watch.poll()
        if notice is None:
            return
        train = self.r.config.train
        split = halved(train.micro_batch_size, train.grad_accum_steps)
        tip = "close other programs"
        if notice.kind == "shrink":
            if split is not None:
                raise OutOfMemory(notice.text)
            # One row cannot be halved, and nothing failed: slow is better than over.
            if self._told_slow:
                return
            self._told_slow = True
            tip += "; the run cannot be made smaller, and may be slow until then"
        elif split is not None:
            tip += f", or --micro-batch-size {split[0]} train.grad_accum_steps={split[1]}"
        self.r.console.warn(f"{notice.text}: {tip}")

    def _recover(self, failure: OutOfMemory) -> None:
        """Go on with a smaller micro-batch, from the last finished step or the last saved one."""
        r, begin = self.r, time.monotonic()
        if r.recover is None:
            raise failure
        r.console.doing("recovery", "making the run smaller")
        before = r.state.step
        r.recover(r, failure)
        if r.watch is not None:
            r.watch.reset()
        if r.state.step < before:
            self._skipped = self._skipped_told = int(r.meta.backend_state.get("skipped_total", 0))
            self._in_a_row = 0
            self._seen.clear()
            self._seen.append((r.state.step, r.state.tokens_seen))
            self._reporter.take_up_average()
        self._begun = r.state.step
        self._pace.forget()
        self._add_phase("recovery", begin)

    def _saved_first(self, error: PippinError) -> PippinError:
        """Between steps the state is whole: say what is kept, after an attempt to save it.

        A checkpoint that was itself refused (P307) is not tried again.
        """
        state = self.r.state
        tried = error.code == "P307"
        begun = state.step > self._first
        if begun and not tried and (self.r.checkpoint is None or self.r.meta.step != state.step):
            try:
                self._save()
            except PippinError as second:
                self.r.console.warn(f"while step {state.step:,} was saved: {second.what}")
        if self.r.checkpoint is not None:
            again = f"python train.py --resume {shlex.quote(str(self.r.folder))}"
            error.kept = f"saved: {self.r.checkpoint}; go on with {again}"
        elif self._first == 0:
            error.kept = "no step of this run was saved."
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
        self._trained = batch.tokens > 0
        if not self._trained and not self._told_untrained:
            self._told_untrained = True
            r.console.warn(
                f"step {batch.step:,}: no target of its rows is trained on, so it changes nothing "
                "(said once)"
            )
        r.state.tokens_seen += batch.tokens
        self._seen.append((batch.step, r.state.tokens_seen))
        self._tokens += batch.tokens
        return metrics

    def _finite(self, metrics: Mapping[str, Lazy], step: int, *, stop: bool) -> bool:
        """Read the counters when it is time; False ends the run."""
        r = self.r
        train = r.config.train
        due = step % CHECK_EVERY == 0 or self._reporter.logs(step) or self._saves(step)
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

    def _saves(self, step: int) -> bool:
        return step % self.r.config.train.ckpt_interval == 0 or step == self.r.stop_step

    def _events(self, metrics: Mapping[str, Lazy], step: int, step_s: float, *, stop: bool) -> None:
        r, train = self.r, self.r.config.train
        if step % train.eval_interval == 0 or self._saves(step) or stop:
            self._evaluate(step)
        if self._reporter.logs(step) or self._val_step == step:
            self._reporter.log(
                metrics,
                step,
                step_s,
                trained=self._trained,
                skipped_total=self._skipped,
                val=self._val if self._val_step == step else None,
                val_is_best=self._val_is_best,
            )
        elif r.console.wants_plain_row(step_s):
            self._reporter.row_between(metrics, step, trained=self._trained)
        elif r.console.interactive:
            self._reporter.live(step)
        if stop or (self._saves(step) and self._in_a_row == 0):
            self._save()
        if step in self._samples and r.sample is not None and r.signals.received is None:
            begin = time.monotonic()
            r.console.doing("samples", "writing samples")
            r.sample(step)
            self._add_phase("samples", begin)

    def _add_phase(self, name: str, begin: float) -> None:
        self._pace.add(name, time.monotonic() - begin)

    def _evaluate(self, step: int) -> None:
        begin = time.monotonic()
        self._val = self._score(step)
        self._val_step = step
        state = self.r.state
        self._val_is_best = is_better(self._val.loss, state.best_val_loss)
        if self._val_is_best:
            state.best_val_loss, state.best_step = self._val.loss, step
        if not math.isfinite(self._val.loss):
            self.r.console.warn(f"step {step}: the validation loss is not finite")
        self._add_phase("validation", begin)

    def _score(self, step: int) -> Evaluation:
        r = self.r
        while True:
            r.console.doing("validation", f"validating step {step:,}")
            try:
                return evaluate(r.backend, r.eval_batches, token_bytes=r.token_bytes)
            except OutOfMemory as error:
                failure = error.bare()
            self._recover(failure)

    def _save(self) -> None:
        begin = time.monotonic()
        self.r.console.doing("saving", f"saving step {self.r.state.step:,}")
        val = self._val if self._val_step >= self.r.state.step else None
        save(self.r, val)
        self._reporter.saved_at = self.r.console.now()
        self._add_phase("saving", begin)
