"""From a decided run to its end: backend, preflight, folder, loop, summary.

Nothing of an earlier run is removed before the backend is made and the preflight has passed.
"""

import shlex
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from core.backend import Backend, Batch, OutOfMemory
from core.checkpoint import Meta, initial_checkpoint
from core.config.schema import RunConfig
from core.data.sampling.loader import EvalBatches, TrainLoader, open_train_loader
from core.errors import EXIT_FAULT, EXIT_SIGINT, EXIT_SIGTERM, PippinError
from core.machine.backends import Backends
from core.machine.pressure import shares_memory
from core.params import ParamSpec
from core.training import preflight, resume, summary
from core.training.console import Console
from core.training.disk import writing
from core.training.forecast import check_device
from core.training.format import duration
from core.training.guard import Budget, MemoryWatch
from core.training.loop import Loop
from core.training.recovery import Live, Makers, Recovery, smaller
from core.training.run import Outcome, Progressed, Run
from core.training.runfolder import RunFolder
from core.training.runlog import (
    METRICS_NAME,
    SUMMARY_NAME,
    RunLog,
    cut_after,
    open_tensorboard,
    write_json,
)
from core.training.samples import Sampler
from core.training.saving import mend_best
from core.training.signals import StopSignals
from core.training.stops import not_finite_error
from core.training.textdata import TextData


@dataclass(frozen=True)
class Job:
    """A decided run.

    Attributes:
        config: The resolved experiment.
        specs: Its parameter table.
        prepared: Its text.
        start: Where it goes on; None for a fresh start.
        stop_step: The step to stop at.
        budget_bytes: What it may use, watched as it runs; None watches nothing.
        force: Whether a forecast that does not fit is no reason to stop.
    """

    config: RunConfig
    specs: tuple[ParamSpec, ...]
    prepared: TextData
    start: resume.ResumePoint | None
    stop_step: int
    budget_bytes: int | None = None
    force: bool = False

    @property
    def is_new_folder(self) -> bool:
        """Whether nothing of the run folder goes on."""
        return self.start is None or self.start.folder is None


def execute(job: Job, folder: RunFolder, backends: Backends, console: Console) -> int:
    """Train; returns the exit code.

    Args:
        job: What to do.
        folder: The run folder, locked.
        backends: What `backends` offers.
        console: Where to tell of it.

    Raises:
        PippinError: P402 where a check fails, P401 where the run diverges, P307 and P312 for the
            disk.
    """
    live = Live()
    make = _makers(job, folder, backends, console)
    try:
        while True:
            with console.phase("data", "opening the validation text"):
                eval_batches, meta = make.eval_batches(job.config), _meta(job)
            with console.phase("backend", f"making the model on {job.config.train.backend}"):
                live.backend = make.backend(job.config)
            info = live.backend.device_info()
            check_device(job.config, job.specs, info, force=job.force)
            try:
                _load(job, live.backend, backends, meta, _first_scored(eval_batches), console)
                break
            except OutOfMemory as error:
                failure = error.bare()
            live.close()
            job = replace(job, config=smaller(job.config, failure, console.warn))
        with console.phase("run", "writing the run folder"):
            state = _open_folder(job, folder, backends, console)
        return _train(job, folder, live, make, eval_batches, meta, state, console)
    finally:
        live.close()


def _makers(job: Job, folder: RunFolder, backends: Backends, console: Console) -> Makers:
    """How the parts of the run are made, at its start and where memory ran out."""
    prepared = job.prepared

    def backend(config: RunConfig) -> Backend:
        try:
            return backends.load(config.train.backend)(config, job.specs, mode="train")
        except OutOfMemory as error:
            raise PippinError(
                "P101",
                "the weights and the optimizer's state alone do not fit into memory.",
                found=error.found,
                remedy="a smaller model.d_model or model.n_layers, or close other programs",
                exit_code=EXIT_FAULT,
            ) from None

    def batches(config: RunConfig, start_step: int) -> TrainLoader:
        data = config.data
        parts = prepared.parts("train", data.sampling, data.seq_len, config.train.seed)
        return open_train_loader(parts, config, start_step=start_step)

    def eval_batches(config: RunConfig) -> EvalBatches:
        data = config.data
        return EvalBatches(
            prepared.parts("val", data.sampling, data.seq_len, config.train.seed),
            batch_size=config.train.micro_batch_size,
            max_tokens=config.train.eval_tokens,
            vocab_size=config.model.vocab_size,
        )

    def sampler(backend: Backend) -> Sampler | None:
        if not job.config.train.samples:
            return None
        return Sampler(backend, prepared, job.config, console, folder.path)

    return Makers(backend, batches, eval_batches, sampler, backends.open_checkpoint)


def _meta(job: Job) -> Meta:
    prepared, config = job.prepared, job.config
    tokenizer = {
        "sha256": prepared.tokenizer.fingerprint,
        "vocab_size": prepared.tokenizer.vocab_size,
    }
    data = {"manifest_sha256": prepared.manifest_sha256, "seed": config.train.seed}
    meta = initial_checkpoint(config, job.specs, tokenizer=tokenizer, data=data).meta
    if job.start is None:
        return meta
    old = job.start.meta
    return replace(meta, step=old.step, loop=dict(old.loop), backend_state=dict(old.backend_state))


def _first_scored(eval_batches: EvalBatches) -> Batch:
    """The first batch of the validation that scores anything.

    Raises:
        PippinError: P201 where none does.
    """
    for batch in eval_batches:
        if batch.weights.any():
            return batch
    raise PippinError(
        "P201",
        "the validation text has no target that is trained on, so there is nothing to measure.",
        found=f"{len(eval_batches.numbers):,} rows, every weight 0",
        remedy="more text, a larger data.val_fraction, or a longer data.seq_len where the trained "
        "part of a text lies behind the cut",
        kept="nothing was trained.",
    )


def _load(
    job: Job, backend: Backend, backends: Backends, meta: Meta, batch: Batch, console: Console
) -> None:
    """Preflight, then the run's own weights."""
    config, start = job.config, job.start
    vocab = config.model.vocab_size
    fresh = start is None
    ckpt = None if start is None else resume.Continued(backends.open_checkpoint(start.path))
    try:
        if config.train.preflight:
            probe = preflight.ProbeCheckpoint(replace(meta, step=0), job.specs)
            with console.phase("checks", "checking causality"):
                backend.load(probe, optimizer=True)
                row = _one_row(batch)
                preflight.causality(
                    backend, row, vocab_size=vocab, precision=config.train.precision
                )
        doing = "making the initial weights" if start is None else f"reading {start.path.name}"
        with console.phase("weights", doing):
            backend.load(ckpt or initial_checkpoint(config, job.specs), optimizer=True)
        if config.train.preflight:
            with console.phase("checks", "computing the first loss"):
                loss = preflight.first_loss(backend, batch, vocab_size=vocab, fresh=fresh)
            equal = f"= ln {vocab}" if fresh else f"below 1.5 ln {vocab}"
            console.fact("checks", f"causality ok · first loss {loss:.2f} {equal} ok")
    finally:
        if ckpt is not None:
            ckpt.close()
    if start is not None:
        version = backend.device_info().framework.partition(" ")[2]
        curve = resume.same_curve(start, config, version)
        age = time.time() - start.path.stat().st_mtime
        console.fact("resumed", f"{resumed(start, config.train.total_steps, age)} · {curve}")
    console.fact("run", f"{config.train.save_dir}   (watch: python tools/memory_monitor.py)")
    console.print()


def resumed(start: resume.ResumePoint, total_steps: int, age_s: float) -> str:
    """Where a run goes on: source, step, and the age of the checkpoint in seconds, in words."""
    backend = str(start.meta.backend.get("name", "?"))
    made_by = backend if start.folder is None else f"{start.folder.resolve().name}, {backend}"
    return (
        f"{start.path.name} at step {start.meta.step:,} of {total_steps:,} "
        f"({made_by}, saved {duration(age_s)} ago)"
    )


def _open_folder(job: Job, folder: RunFolder, backends: Backends, console: Console) -> Progressed:
    """Make the folder that of this run: drop what is given up, write what describes it."""
    start = job.start
    state = Progressed() if start is None else resume.state_of(start.meta)
    with writing(folder.path):
        if start is None or job.is_new_folder:
            folder.clear(keep=() if start is None else (start.path,))
            state.saved_best_val_loss = state.saved_best_step = None  # no best.* is here yet
        else:
            for old in start.later:
                old.unlink(missing_ok=True)
                console.warn(f"{old.name} was removed: the run goes on from step {state.step}")
            mend_best(folder.path, state, backends.open_checkpoint, console.warn)
            cut = cut_after(folder.logs / METRICS_NAME, state.step)
            if cut:
                console.fact("log", f"{cut} rows after step {state.step} were dropped")
            cut_after(folder.path / "samples" / "samples.jsonl", state.step)
            (folder.logs / SUMMARY_NAME).unlink(missing_ok=True)  # its end is no end any more
        write_json(folder.path / "config.json", job.config.model_dump(mode="json"))
        job.prepared.tokenizer.save(folder.path)
    return state


def _train(
    job: Job,
    folder: RunFolder,
    live: Live,
    make: Makers,
    eval_batches: EvalBatches,
    meta: Meta,
    state: Progressed,
    console: Console,
) -> int:
    prepared = job.prepared
    if live.backend is None:
        raise PippinError("P001", "a run without a backend.", exit_code=EXIT_FAULT)
    log = RunLog(folder.logs, tensorboard=open_tensorboard(folder.logs))
    with log, StopSignals(console.stopping) as signals, _watch(job) as watch:
        signals.step = state.step + 1
        with console.phase("data", "opening the training text"):
            live.batches = make.batches(job.config, state.step + 1)
        run = Run(
            config=job.config,
            specs=job.specs,
            backend=live.backend,
            batches=live.batches,
            eval_batches=eval_batches,
            token_bytes=prepared.tokenizer.token_bytes(),
            folder=folder.path,
            log=log,
            console=console,
            signals=signals,
            meta=meta,
            state=state,
            stop_step=job.stop_step,
            floor_nats=prepared.floor_nats_per_token,
            device=live.backend.device_info(),
            sample=make.sampler(live.backend),
            first_step=state.step,
            recover=Recovery(live, make, job.start.path if job.start is not None else None),
            watch=watch,
        )
        loop = Loop(run)
        try:
            outcome = loop.run()
        except PippinError as error:
            summary.record(run, loop.outcome("failed", error.code), prepared, {})
            raise
        except KeyboardInterrupt:
            if run.checkpoint is not None:
                again = f"python train.py --resume {shlex.quote(str(run.folder))}"
                console.warn(f"last saved: {run.checkpoint}; go on with {again}")
            raise
        live.close_batches()
        try:
            log.close()
        except PippinError as error:
            console.warn(error.what)
    if outcome.reason == "not finite":
        summary.record(run, outcome, prepared, {})
        raise not_finite_error(run, outcome)
    return _finish(run, outcome, prepared)


def _watch(job: Job) -> AbstractContextManager[MemoryWatch | None]:
    """The watch over memory. A card has memory of its own; a Mac's GPU and a CPU share the whole."""
    if job.budget_bytes is None:
        return nullcontext()
    return MemoryWatch(Budget(job.budget_bytes, shares_memory(job.config.train.backend)))


def _finish(run: Run, outcome: Outcome, prepared: TextData) -> int:
    """Sum up; all is saved by now, so nothing here changes how the run ended."""
    try:
        with run.console.phase("summary", "drawing the curve and writing the report"):
            summary.finish(run, outcome, prepared, skills=outcome.reason == "done")
    except KeyboardInterrupt:
        run.console.warn(f"aborted; the run is saved: {outcome.checkpoint}")
        return EXIT_SIGINT
    return {"interrupted": EXIT_SIGINT, "terminated": EXIT_SIGTERM}.get(outcome.reason, 0)


def _one_row(batch: Batch) -> Batch:
    return Batch(
        np.ascontiguousarray(batch.tokens[:1]),
        np.ascontiguousarray(batch.targets[:1]),
        np.ascontiguousarray(batch.weights[:1]),
    )
