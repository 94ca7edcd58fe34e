"""From a decided run to its end: backend, preflight, folder, loop, summary.

Nothing of an earlier run is removed before the backend is made and the preflight has passed.
"""

from dataclasses import dataclass, replace

import numpy as np

from core.backend import Backend, Batch
from core.checkpoint import Meta, initial_checkpoint
from core.config.schema import RunConfig
from core.data.loader import EvalBatches, open_train_loader
from core.errors import EXIT_SIGINT, EXIT_SIGTERM, PippinError
from core.params import ParamSpec
from core.training import preflight, resume, summary
from core.training.console import Console
from core.training.disk import writing
from core.training.loop import Loop, not_finite_error
from core.training.options import Backends
from core.training.run import Outcome, Progressed, Run
from core.training.runfolder import RunFolder
from core.training.runlog import METRICS_NAME, RunLog, cut_after, open_tensorboard, write_json
from core.training.samples import Sampler
from core.training.saving import mend_best
from core.training.signals import StopSignals
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
    """

    config: RunConfig
    specs: tuple[ParamSpec, ...]
    prepared: TextData
    start: resume.ResumePoint | None
    stop_step: int

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
    config = job.config
    backend = backends.load(config.train.backend)(config, job.specs, mode="train")
    try:
        data = config.data
        eval_batches = EvalBatches(
            job.prepared.parts("val", data.sampling, data.seq_len, config.train.seed),
            batch_size=config.train.micro_batch_size,
            max_tokens=config.train.eval_tokens,
            vocab_size=config.model.vocab_size,
        )
        meta = _meta(job)
        _load(job, backend, backends, meta, next(iter(eval_batches)), console)
        state = _open_folder(job, folder, backends, console)
        return _train(job, folder, backend, eval_batches, meta, state, console)
    finally:
        backend.close()


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
        backend.load(ckpt or initial_checkpoint(config, job.specs), optimizer=True)
        if config.train.preflight:
            loss = preflight.first_loss(backend, batch, vocab_size=vocab, fresh=fresh)
            equal = f"= ln {vocab}" if fresh else f"below 1.5 ln {vocab}"
            console.fact("checks", f"causality ok · first loss {loss:.2f} {equal} ok")
    finally:
        if ckpt is not None:
            ckpt.close()
    if start is not None:
        version = backend.device_info().framework.partition(" ")[2]
        console.fact(
            "resumed",
            f"{start.path.name} at step {start.meta.step:,} of {config.train.total_steps:,} "
            f"({start.meta.backend.get('name', '?')}) · {resume.same_curve(start, config, version)}",
        )
    console.fact("run", f"{config.train.save_dir}   (watch: python tools/memory_monitor.py)")
    console.print()


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
        write_json(folder.path / "config.json", job.config.model_dump(mode="json"))
        job.prepared.tokenizer.save(folder.path)
    return state


def _train(
    job: Job,
    folder: RunFolder,
    backend: Backend,
    eval_batches: EvalBatches,
    meta: Meta,
    state: Progressed,
    console: Console,
) -> int:
    config, prepared, data = job.config, job.prepared, job.config.data
    parts = prepared.parts("train", data.sampling, data.seq_len, config.train.seed)
    log = RunLog(folder.logs, tensorboard=open_tensorboard(folder.logs))
    with (
        StopSignals() as signals,
        open_train_loader(parts, config, start_step=state.step + 1) as batches,
    ):
        sampler = Sampler(backend, prepared, config, console, folder.path)
        run = Run(
            config=config,
            specs=job.specs,
            backend=backend,
            batches=batches,
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
            device_name=backend.device_info().device,
            sample=sampler if config.train.samples else None,
        )
        outcome = Loop(run).run()
    if outcome.reason == "not finite":
        raise not_finite_error(run, outcome)
    return _finish(run, outcome, prepared)


def _finish(run: Run, outcome: Outcome, prepared: TextData) -> int:
    """Sum up; all is saved by now, so nothing here changes how the run ended."""
    try:
        run.log.close()
    except PippinError as error:
        run.console.warn(error.what)
    try:
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
