"""Going on after memory ran out: a smaller micro-batch, more of them a step, the same experiment.

The rows of a step and their order stay, so the loss curve is the same to rounding. The last finished
step is saved and the backend is made anew from that file, which frees what the failed step and its
allocator held and needs no second copy of the state in memory. Where an update was cut short in the
middle, the last checkpoint is gone back to instead.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from core.backend import Backend, OutOfMemory
from core.checkpoint import Checkpoint, OpenCheckpoint, initial_checkpoint
from core.config.schema import RunConfig
from core.data.sampling.loader import EvalBatches, TrainLoader
from core.errors import PippinError
from core.training import resume
from core.training.disk import writing
from core.training.run import Progressed, Run
from core.training.runlog import cut_after, write_json
from core.training.saving import save
from core.training.stops import no_memory_error


def halved(micro_batch_size: int, grad_accum_steps: int) -> tuple[int, int] | None:
    """The split of the same rows whose micro-batch is the largest divisor of at most half.

    Of a divisor, so that every process has as many micro-batches more as every other.

    Returns:
        (micro_batch_size, grad_accum_steps), None where a micro-batch is one row.
    """
    for size in range(micro_batch_size // 2, 0, -1):
        if micro_batch_size % size == 0:
            return size, grad_accum_steps * (micro_batch_size // size)
    return None


def with_split(config: RunConfig, split: tuple[int, int]) -> RunConfig:
    """The configuration with another split of a step's rows into micro-batches."""
    changes = {"micro_batch_size": split[0], "grad_accum_steps": split[1]}
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def smaller(config: RunConfig, failure: OutOfMemory, warn: Callable[[str], None]) -> RunConfig:
    """The configuration for another try, where memory ran out before the first step.

    Raises:
        OutOfMemory: The failure, where a micro-batch is one row already.
    """
    t = config.train
    split = halved(t.micro_batch_size, t.grad_accum_steps)
    if split is None:
        raise failure
    warn(f"{place(0)}: {failure.what.rstrip('.')}; {_words(config, split)}")
    return with_split(config, split)


def place(step: int) -> str:
    """Where a run is, `step` being the last finished one."""
    return f"after step {step:,}" if step else "before step 1"


def _words(config: RunConfig, split: tuple[int, int]) -> str:
    t = config.train
    return (
        f"micro-batch {t.micro_batch_size} -> {split[0]}, accumulation {t.grad_accum_steps} -> "
        f"{split[1]} from here on: the same result, more slowly"
    )


@dataclass
class Live:
    """What of a run is made anew: None while it is.

    Attributes:
        backend: Its model and device.
        batches: Its loader, with a thread of its own.
    """

    backend: Backend | None = None
    batches: TrainLoader | None = None

    def close(self) -> None:
        """Give back both."""
        self.close_batches()
        if self.backend is not None:
            self.backend.close()
            self.backend = None

    def close_batches(self) -> None:
        """Stop the loader."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None


@dataclass(frozen=True)
class Makers:
    """How the parts of a run are made of its configuration.

    Attributes:
        backend: A backend without weights.
        batches: The loader, from a step on.
        eval_batches: The batches of a validation.
        sampler: What writes samples, with a backend; None where none are wanted.
        open_checkpoint: Opens a file of either suffix.
    """

    backend: Callable[[RunConfig], Backend]
    batches: Callable[[RunConfig, int], TrainLoader]
    eval_batches: Callable[[RunConfig], EvalBatches]
    sampler: Callable[[Backend], Callable[[int], None] | None]
    open_checkpoint: OpenCheckpoint


class Recovery:
    """Called with a run whose memory ran out; returns when it can go on.

    Args:
        live: Parts of the run, replaced here.
        makers: How they are made.
        origin: The checkpoint that this part of the run began from, None for a fresh start.
    """

    def __init__(self, live: Live, makers: Makers, origin: Path | None) -> None:
        self._live, self._makers, self._origin = live, makers, origin

    def __call__(self, run: Run, failure: OutOfMemory) -> None:
        """Halve the micro-batch and make the run's parts anew.

        Raises:
            PippinError: P101 where a micro-batch is one row already; the state was saved.
        """
        gc.collect()  # what the failed step left in circles
        train = run.config.train
        split = halved(train.micro_batch_size, train.grad_accum_steps)
        if split is None:
            self._keep(run, failure)
            raise no_memory_error(run, failure)
        when = place(run.state.step)
        run.console.warn(f"{when}: {failure.what.rstrip('.')}; {_words(run.config, split)}")
        run.config = with_split(run.config, split)
        run.meta = replace(run.meta, config=run.config.model_dump(mode="json"))
        kept = self._keep(run, failure)
        self._live.close_batches()
        if kept or not failure.intact:
            self._rebuild(run, failure)
        else:
            run.console.warn("the backend goes on as it is, since its state could not be saved")
        self._record(run, failure, when)
        run.batches = self._live.batches = self._makers.batches(run.config, run.state.step + 1)
        run.eval_batches = self._makers.eval_batches(run.config)

    def _keep(self, run: Run, failure: OutOfMemory) -> bool:
        """Whether the state of the run's step is in a file, or that of a fresh start."""
        if not failure.intact:
            return False
        if self._last(run) is None and run.state.step == 0:
            return True
        if run.checkpoint is not None and run.meta.step == run.state.step:
            return True
        if run.checkpoint is None and run.first_step == run.state.step:
            return True
        try:
            save(run, None)
            run.provisional = True
        except PippinError as error:
            run.console.warn(f"step {run.state.step:,} could not be saved: {error.what}")
            return False
        return True

    def _last(self, run: Run) -> Path | None:
        return run.checkpoint or self._origin

    def _rebuild(self, run: Run, failure: OutOfMemory) -> None:
        """Make the backend anew from the last saved state; the run's state becomes that one's."""
        path = self._last(run)
        run.sample = None  # it holds the backend
        backend = self._live.backend
        self._live.backend = None
        if backend is not None:
            backend.close()
        del backend, run.backend
        gc.collect()
        run.backend = self._live.backend = self._makers.backend(run.config)
        ckpt: Checkpoint = initial_checkpoint(run.config, run.specs)
        if path is not None:
            ckpt = self._makers.open_checkpoint(path)
            ckpt = resume.Continued(ckpt) if path == self._origin else ckpt
        try:
            run.backend.load(ckpt, optimizer=True)
            meta = ckpt.meta
        finally:
            ckpt.close()
        run.meta = replace(run.meta, backend_state=dict(meta.backend_state))
        run.sample = self._makers.sampler(run.backend)
        if not failure.intact:
            self._go_back(run, Progressed() if path is None else resume.state_of(meta))

    def _go_back(self, run: Run, state: Progressed) -> None:
        run.console.warn(
            f"the update was cut short: going on from step {state.step:,}, the last saved one"
        )
        for name, value in vars(state).items():
            setattr(run.state, name, value)
        run.log.cut_after(state.step)
        with writing(run.folder):
            cut_after(run.folder / "samples" / "samples.jsonl", state.step)

    def _record(self, run: Run, failure: OutOfMemory, when: str) -> None:
        train = run.config.train
        event = {
            "event": "out of memory",
            "when": when,
            "micro_batch_size": train.micro_batch_size,
            "grad_accum_steps": train.grad_accum_steps,
            "reason": " ".join((failure.what, failure.found)).strip(),
        }
        run.events.append(event)
        run.console.emit("event", {"step": run.state.step, **event})
        run.log.row(run.state.step, event)
        with writing(run.folder):
            write_json(run.folder / "config.json", run.config.model_dump(mode="json"))
