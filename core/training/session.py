"""One call of train.py, from options to the exit code: decide, prepare, check, train, sum up.

The order matters: everything that can be refused is refused before a framework is imported, and
everything that a run needs is checked before step 1.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.backend import Backend, Batch
from core.checkpoint import Meta, initial_checkpoint
from core.config.load import Draft, Source, build, from_resolved, load, nested
from core.config.schema import RunConfig, key_names
from core.data.loader import EvalBatches, TrainLoader
from core.data.prepare import prepare
from core.errors import EXIT_SIGINT, EXIT_SIGTERM, PippinError
from core.machine import detect
from core.machine.autoconfig import DataFacts, DeviceFacts, resolve_auto, resolve_early
from core.machine.memory import checkpoint_bytes, predict_training_memory
from core.machine.speed import measure_tokens_per_s
from core.params import ParamSpec, num_parameters, param_specs
from core.training import format as fmt
from core.training import preflight, resume, summary
from core.training.console import Console
from core.training.loop import Loop, Progressed, Run, not_finite_error
from core.training.options import Backends, Options
from core.training.runfolder import RunFolder, next_free_name, refuse_existing
from core.training.runlog import RunLog, cut_after, open_tensorboard, write_json
from core.training.samples import Sampler
from core.training.signals import StopSignals
from core.training.textdata import TextData, text_data

PROBE_SECONDS = 2.0


class Session:
    """One run of train.py."""

    def __init__(self, options: Options, backends: Backends, console: Console) -> None:
        self.options = options
        self.backends = backends
        self.console = console

    def run(self) -> int:
        """Do what the options ask for; returns the exit code.

        Raises:
            PippinError: for everything a user can mend.
        """
        if self.options.max_steps is not None and self.options.max_steps < 1:
            raise PippinError(
                "P012", f"--max-steps is {self.options.max_steps}; it must be 1 or more."
            )
        start = self._resume_point()
        draft = self._draft(start)
        device = self._device(draft)
        if self.options.manual_config:
            self._require_complete(draft)
        resolve_early(draft, device)
        prepared = self._prepare(draft, start)
        speed = self._resolve(draft, prepared, device)
        stop_step = self._stop_step(draft, start)
        folder = self._folder(draft, start)
        config = build(draft)
        if start is not None:
            resume.refuse_changes(start, config, prepared)
        if self.options.print_config:
            self._print_config(draft)
            return 0
        specs = param_specs(config.model)
        self.console.decided(draft)
        self._forecast(config, specs, device, speed, stop_step)
        if self.options.dry_run:
            self.console.print(" dry run    nothing was trained or written", always=True)
            return 0
        if start is None and not self.options.overwrite:
            refuse_existing(folder)
        with RunFolder(folder) as run_folder:
            if start is None and self.options.overwrite:
                run_folder.clear()
            return self._train(run_folder, config, specs, prepared, start, stop_step)

    # Deciding

    def _resume_point(self) -> resume.ResumePoint | None:
        if self.options.resume is None:
            return None
        return resume.find(
            self.options.resume or None,
            save_dir=self.options.save_dir or self._config_save_dir(),
            open_checkpoint=self.backends.open_checkpoint,
            drop_later=self.options.overwrite,
            warn=self.console.warn,
        )

    def _config_save_dir(self) -> str | None:
        draft = load(config=self.options.config, overrides=self.options.overrides)
        value = draft.values["train.save_dir"]
        return None if draft.is_auto("train.save_dir") else str(value)

    def _draft(self, start: resume.ResumePoint | None) -> Draft:
        o = self.options
        if start is None:
            config = o.config or (None if o.manual_config else "quickstart")
            return load(config=config, overrides=o.overrides, flags=o.flags())
        asked = load(config=o.config, overrides=o.overrides, flags=o.flags())
        draft = from_resolved(start.meta.config, str(start.path))
        for name, source in asked.sources.items():
            if source.kind in ("file", "preset", "flag") and not asked.is_auto(name):
                draft.set(name, asked.values[name], source)
        # What was derived from a value that is now given follows it.
        given = {n for n, s in asked.sources.items() if s.kind != "default"}
        resume.follow(draft, given, start.meta.config)
        return draft

    def _device(self, draft: Draft) -> DeviceFacts:
        wanted = None if draft.is_auto("train.backend") else str(draft.values["train.backend"])
        source = draft.sources["train.backend"]
        available = self.backends.available()
        if source.kind == "checkpoint" and wanted is not None and not available[wanted].ok:
            self.console.warn(f"the run's backend {wanted} is not here: {available[wanted].reason}")
            wanted = None
            draft.set("train.backend", "auto", Source("default"))
        facts = detect.device_facts(wanted, available)
        self.console.fact(facts.machine.splitlines()[0], "") if facts.machine else None
        reason = source.where if wanted else facts.device.reason
        versions = " ".join(f"{k} {v}" for k, v in available[facts.device.backend].versions.items())
        self.console.fact("backend", f"{facts.device.backend}  {versions} ({reason or 'given'})")
        return facts.device

    def _require_complete(self, draft: Draft) -> None:
        """--manual-config: what depends on the data alone may stay open, nothing else."""
        from_data = {"model.vocab_size", "data.corpus_bytes", "train.save_dir"}
        left = [k for k in draft.values if draft.is_auto(k) and k not in from_data]
        if left:
            raise PippinError(
                "P010",
                "--manual-config decides nothing, and these keys have no value:",
                found="\n".join(left),
                remedy="give each a value in the file, or leave out --manual-config",
                kept="nothing was started.",
            )

    def _prepare(self, draft: Draft, start: resume.ResumePoint | None) -> TextData:
        values = draft.values
        with self.console.phase("data", "preparing the text"):
            prepared = prepare(
                values["data.input_file"],
                shards_dir=Path(values["data.shards_dir"]),
                seq_len=values["data.seq_len"],
                seed=values["data.seed"],
                text_field=values["data.text_field"],
                tokenizer=self._tokenizer_source(draft, start),
                vocab_size=None
                if draft.is_auto("model.vocab_size")
                else values["model.vocab_size"],
                val_fraction=values["data.val_fraction"],
                test_fraction=values["data.test_fraction"],
                corpus_bytes=values["data.corpus_bytes"],
                report=self.console.fact,
            )
        for note in prepared.notes:
            self.console.warn(note)
        draft.resolve("data.tokenizer", prepared.tokenizer.kind, prepared.tokenizer_reason)
        return text_data(prepared, values["data.input_file"])

    def _tokenizer_source(self, draft: Draft, start: resume.ResumePoint | None) -> str:
        """The run's own tokenizer on resume, so that shards can be built again exactly."""
        if start is not None and start.folder is not None:
            return str(start.folder)
        return str(draft.values["data.tokenizer"])

    def _resolve(self, draft: Draft, prepared: TextData, device: DeviceFacts) -> float | None:
        facts = DataFacts(
            vocab_size=prepared.tokenizer.vocab_size,
            train_tokens=prepared.train_tokens,
            name=prepared.name,
            is_stories=draft.values["data.input_file"] is None,
        )
        if self.options.max_steps is not None and draft.is_auto("train.total_steps"):
            draft.set("train.total_steps", self.options.max_steps, Source("flag", "--max-steps"))
        measure: Callable[[RunConfig], float] | None = self._measure
        if self.options.manual_config:
            measure = None
        speed = resolve_auto(draft, facts, device, measure)
        draft.resolve("train.save_dir", str(next_free_name(prepared.name)), "next free name")
        return speed

    def _measure(self, config: RunConfig) -> float:
        specs = param_specs(config.model)
        with self.console.phase("speed", "measuring this machine"):
            backend = self.backends.load(config.train.backend)(config, specs, mode="train")
            try:
                backend.load(initial_checkpoint(config, specs))
                return measure_tokens_per_s(backend, config, seconds=PROBE_SECONDS)
            finally:
                backend.close()

    def _stop_step(self, draft: Draft, start: resume.ResumePoint | None) -> int:
        total = int(draft.values["train.total_steps"])
        limit = self.options.max_steps
        if limit is None:
            return total
        if limit < total:
            self.console.fact(
                "length", f"--max-steps {limit}: stop there; the schedule stays {total}"
            )
        elif draft.sources["train.total_steps"].where == "--max-steps":
            self.console.fact("length", f"--max-steps {limit} is the length of the run")
        stop = min(limit, total)
        if start is not None and stop <= start.meta.step:
            raise PippinError(
                "P302",
                f"the checkpoint is at step {start.meta.step} and --max-steps is {limit}.",
                remedy=f"--max-steps {start.meta.step + 100}",
                kept="nothing was changed.",
            )
        return stop

    def _folder(self, draft: Draft, start: resume.ResumePoint | None) -> Path:
        if start is not None and start.folder is not None:
            draft.set("train.save_dir", str(start.folder), Source("checkpoint", str(start.path)))
        elif start is not None:
            name = next_free_name(start.path.stem)
            draft.set("train.save_dir", str(name), Source("auto", reason="next free name"))
        return Path(draft.values["train.save_dir"])

    def _print_config(self, draft: Draft) -> None:
        if self.options.json:
            sources = {k: vars(s) for k, s in draft.sources.items()}
            print(json.dumps({"config": nested(draft.values.items()), "sources": sources}))
            return
        width = max(map(len, key_names()))
        for name in key_names():
            source = draft.sources[name]
            why = source.reason or source.where
            value = fmt.value(draft.values[name])
            print(f"{name:<{width}}  {value:<20} {source.kind:<10} {why}".rstrip())

    def _forecast(
        self,
        config: RunConfig,
        specs: tuple[ParamSpec, ...],
        device: DeviceFacts,
        speed: float | None,
        stop_step: int,
    ) -> None:
        forecast = predict_training_memory(config, specs)
        budget = int(device.budget_bytes * config.train.memory_fraction)
        disk = checkpoint_bytes(config, specs) * (config.train.ckpt_keep + 1)
        t = config.train
        tokens = stop_step * t.micro_batch_size * t.grad_accum_steps * config.data.seq_len
        parts = [f"{fmt.si(num_parameters(specs))} parameters", f"{fmt.si(tokens)} tokens"]
        if speed is not None:
            minutes = tokens / speed / 60
            parts.append(f"about {fmt.duration(60 * minutes)}")
        memory = f"memory {fmt.gigabytes(forecast.total)} of {fmt.gigabytes(budget)}"
        self.console.fact("will take", " · ".join([*parts, memory, f"disk {fmt.gigabytes(disk)}"]))
        if forecast.total > budget and not self.options.force:
            sizes = [f"{name} {fmt.gigabytes(n)}" for name, n in forecast.parts().items()]
            rows = max(t.micro_batch_size // 2, 1)
            raise PippinError(
                "P101",
                f"a step needs about {fmt.gigabytes(forecast.total)}, and this run may use "
                f"{fmt.gigabytes(budget)}.",
                found="largest parts: " + " · ".join(sizes[:3]),
                choices=(
                    f"train.micro_batch_size={rows} "
                    f"train.grad_accum_steps={t.grad_accum_steps * 2} (same result)",
                    "train.gradient_checkpointing=true",
                    "--force",
                ),
                kept="nothing was started.",
            )

    # Training

    def _train(
        self,
        folder: RunFolder,
        config: RunConfig,
        specs: tuple[ParamSpec, ...],
        prepared: TextData,
        start: resume.ResumePoint | None,
        stop_step: int,
    ) -> int:
        t = config.train
        meta = self._meta(config, specs, prepared, start)
        backend = self.backends.load(t.backend)(config, specs, mode="train")
        try:
            eval_batches = EvalBatches(
                prepared.open("val"),
                seq_len=config.data.seq_len,
                batch_size=t.micro_batch_size,
                max_tokens=t.eval_tokens,
                vocab_size=config.model.vocab_size,
            )
            first = next(iter(eval_batches))
            self._load(backend, config, specs, start, first, meta)
            state = Progressed()
            if start is not None:
                state = resume.state_of(start.meta)
                cut = cut_after(folder.logs / "metrics.jsonl", state.step)
                if cut:
                    self.console.fact("log", f"{cut} rows after step {state.step} were dropped")
            write_json(folder.path / "config.json", config.model_dump(mode="json"))
            prepared.tokenizer.save(folder.path)
            log = RunLog(folder.logs, tensorboard=open_tensorboard(folder.logs))
            with (
                StopSignals(self.console.warn) as signals,
                TrainLoader(
                    prepared.open("train"),
                    seq_len=config.data.seq_len,
                    micro_batch_size=t.micro_batch_size,
                    grad_accum_steps=t.grad_accum_steps,
                    seed=t.seed,
                    vocab_size=config.model.vocab_size,
                    start_step=state.step + 1,
                    prefetch=config.data.prefetch,
                ) as batches,
            ):
                sampler = Sampler(backend, prepared, config, self.console, folder.path)
                run = Run(
                    config=config,
                    specs=specs,
                    backend=backend,
                    batches=batches,
                    eval_batches=eval_batches,
                    token_bytes=prepared.tokenizer.token_bytes(),
                    folder=folder.path,
                    log=log,
                    console=self.console,
                    signals=signals,
                    meta=meta,
                    state=state,
                    stop_step=stop_step,
                    floor_nats=prepared.floor_nats_per_token,
                    device_name=backend.device_info().device,
                    sample=sampler if t.samples else None,
                )
                outcome = Loop(run).run()
            log.close()
            if outcome.reason == "not finite":
                raise not_finite_error(run, outcome)
            summary.finish(run, outcome, prepared, skills=outcome.reason == "done")
        finally:
            backend.close()
        return {"interrupted": EXIT_SIGINT, "terminated": EXIT_SIGTERM}.get(outcome.reason, 0)

    def _meta(
        self,
        config: RunConfig,
        specs: tuple[ParamSpec, ...],
        prepared: TextData,
        start: resume.ResumePoint | None,
    ) -> Meta:
        tokenizer = {
            "sha256": prepared.tokenizer.fingerprint,
            "vocab_size": prepared.tokenizer.vocab_size,
        }
        data = {"manifest_sha256": prepared.manifest_sha256, "seed": config.train.seed}
        meta = initial_checkpoint(config, specs, tokenizer=tokenizer, data=data).meta
        if start is None:
            return meta
        return replace(meta, step=start.meta.step, loop=dict(start.meta.loop))

    def _load(
        self,
        backend: Backend,
        config: RunConfig,
        specs: tuple[ParamSpec, ...],
        start: resume.ResumePoint | None,
        batch: Batch,
        meta: Meta,
    ) -> None:
        """Preflight, then the run's own weights."""
        vocab = config.model.vocab_size
        fresh = start is None
        ckpt = self.backends.open_checkpoint(start.path) if start is not None else None
        try:
            if config.train.preflight:
                probe = preflight.ProbeCheckpoint(replace(meta, step=0), specs)
                with self.console.phase("checks", "checking causality"):
                    backend.load(probe, optimizer=True)
                    row = _one_row(batch)
                    preflight.causality(
                        backend, row, vocab_size=vocab, precision=config.train.precision
                    )
            if ckpt is None:
                backend.load(initial_checkpoint(config, specs))
            else:
                backend.load(ckpt, optimizer=True)
            if config.train.preflight:
                loss = preflight.first_loss(backend, batch, vocab_size=vocab, fresh=fresh)
                equal = f"= ln {vocab}" if fresh else f"below 1.5 ln {vocab}"
                self.console.fact("checks", f"causality ok · first loss {loss:.2f} {equal} ok")
        finally:
            if ckpt is not None:
                ckpt.close()
        where = Path(config.train.save_dir)
        if start is not None:
            self.console.fact(
                "resumed",
                f"{start.path.name} at step {start.meta.step:,} of {config.train.total_steps:,} "
                f"({start.meta.backend.get('name', '?')}) · same data order, same curve",
            )
        self.console.fact("run", f"{where}   (watch: python tools/memory_monitor.py)")
        self.console.print()


def _one_row(batch: Batch) -> Batch:
    return Batch(
        np.ascontiguousarray(batch.tokens[:1]),
        np.ascontiguousarray(batch.targets[:1]),
        np.ascontiguousarray(batch.weights[:1]),
    )
