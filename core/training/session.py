"""One call of train.py, from options to the exit code: decide, prepare, check, train, sum up.

The order matters: the command line and the configuration are checked first, then the text is prepared,
then the machine's speed is measured where something depends on it (which imports the framework), and
the run folder is touched last. Everything that a run needs is checked before step 1.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core.backend import Availability, OutOfMemory
from core.checkpoint import initial_checkpoint
from core.config.draft import AUTO, Draft, Source
from core.config.load import build, from_resolved, load, nested
from core.config.schema import RunConfig, key_names
from core.data.preparing.prepare import prepare
from core.data.sampling.mixture import Mixture, open_mixture, parse_mixture
from core.errors import PippinError
from core.machine import detect, remembered
from core.machine.autoconfig import DataFacts, DeviceFacts, resolve_auto, resolve_early
from core.machine.backends import Backends
from core.machine.depth import Dial
from core.machine.memory import predict_training_memory
from core.machine.micro_batch import Probed, settle_micro_batch
from core.machine.rate import predicted_speed, slow_speed
from core.machine.speed import measure_tokens_per_s
from core.params import ParamSpec, param_specs
from core.training import format as fmt
from core.training import resume
from core.training.console import Console
from core.training.dialling import apply_dial, tell_dial
from core.training.execute import Job, execute
from core.training.forecast import Forecast, Speed, disk_plan
from core.training.manual import require_complete
from core.training.options import Options
from core.training.own_tokenizer import check_own_tokenizer
from core.training.recovery import smaller
from core.training.runfolder import RunFolder, next_free_name, refuse_existing
from core.training.textdata import (
    TextData,
    readable,
    refuse_full_disk,
    tell_many_stories,
    text_data,
)
from core.training.vocabulary import check_vocabulary

PROBE_SECONDS = 2.0


class Session:
    """One run of train.py; `argv` is its command line as typed, where it is known."""

    def __init__(
        self, options: Options, backends: Backends, console: Console, *, argv: Sequence[str] = ()
    ) -> None:
        self.options = options
        self.backends = backends
        self.console = console
        self.argv = argv
        self._how = "measured"

    def run(self) -> int:
        """Do what the options ask for; returns the exit code.

        Raises:
            PippinError: for everything a user can mend.
        """
        if self.options.max_steps is not None and self.options.max_steps < 1:
            raise PippinError(
                "P012",
                f"--max-steps is {self.options.max_steps}; it must be 1 or more.",
                remedy="python train.py --dry-run   (decides and forecasts, and trains no step)",
                kept="nothing was started.",
            )
        start = self._resume_point()
        draft = self._draft(start)
        dial = apply_dial(draft, self.options, start, self.console)
        device = self._device(draft)
        is_timed = self.options.time_budget is not None
        if self.options.max_steps and draft.is_auto("train.total_steps") and not is_timed:
            draft.set("train.total_steps", self.options.max_steps, Source("flag", "--max-steps"))
        if self.options.manual_config:
            require_complete(draft, self.argv)
        mixture = self._mixture(draft)
        resolve_early(draft, device, dial)
        if start is not None:
            resume.refuse_asked(start, draft)
        prepared = self._prepare(draft, start, mixture)
        tokens_per_s, facts = self._resolve(draft, prepared, device, dial)
        self._settle_memory(draft, device)
        folder = self._folder(draft, start)
        config = build(draft)
        if start is not None:
            resume.refuse_changes(start, config, prepared)
        if self.options.print_config:
            self._print_config(draft)
            return 0
        stop_step = self._stop_step(draft, start)
        specs = param_specs(config.model)
        self.console.decided(draft)
        tell_dial(draft, dial, specs, facts.fill, self.console)
        speed = Speed(tokens_per_s, self._how)
        if tokens_per_s is None:
            speed = self._expected_speed(config, specs, device, facts)
        self._forecast(config, specs, device, speed, facts.fill, start, stop_step)
        if self.options.dry_run:
            self.console.print(
                f" dry run    nothing was trained; the prepared text is in {prepared.folder}",
                always=True,
            )
            return 0
        budget = int(device.budget_bytes * config.train.memory_fraction)
        job = Job(config, specs, prepared, start, stop_step, budget, self.options.force)
        if job.is_new_folder:
            refuse_existing(folder, overwrite=self.options.overwrite)
        with RunFolder(folder) as run_folder:
            if job.is_new_folder:  # once more, since it can be locked by now
                refuse_existing(folder, overwrite=self.options.overwrite)
            return execute(job, run_folder, self.backends, self.console)

    # Deciding

    def _resume_point(self) -> resume.ResumePoint | None:
        if self.options.resume is None:
            return None
        start = resume.find(
            self.options.resume or None,
            save_dir=self.options.save_dir or self._config_save_dir(),
            open_checkpoint=self.backends.open_checkpoint,
            drop_later=self.options.overwrite,
            warn=self.console.warn,
        )
        check_own_tokenizer(start)
        return start

    def _config_save_dir(self) -> str | None:
        draft = load(config=self.options.config, overrides=self.options.overrides)
        value = draft.values["train.save_dir"]
        return None if draft.is_auto("train.save_dir") else str(value)

    def _draft(self, start: resume.ResumePoint | None) -> Draft:
        o = self.options
        if start is None:
            return self._load(o.config or (None if o.manual_config else "quickstart"))
        asked = self._load(o.config)
        resume.refuse_flags(start, asked)
        draft = from_resolved(start.meta.config, str(start.path))
        for name, source in asked.sources.items():
            if source.kind in ("file", "preset", "flag") and not asked.is_auto(name):
                draft.set(name, asked.values[name], source)
        # What was derived from a value that is now given follows it.
        given = {n for n, s in asked.sources.items() if s.kind != "default"}
        resume.follow(draft, given, start.meta.config)
        return draft

    def _load(self, config: str | None) -> Draft:
        o = self.options
        return load(
            config=config,
            overrides=o.overrides,
            flags=o.flags(),
            typed=o.typed(),
            foreign=o.foreign,
            locked=o.locked,
            note=lambda text: self.console.fact("read as", text),
            warn=self.console.warn,
        )

    def _device(self, draft: Draft) -> DeviceFacts:
        wanted = None if draft.is_auto("train.backend") else str(draft.values["train.backend"])
        source = draft.sources["train.backend"]
        available = self.backends.available()
        if source.kind == "checkpoint" and wanted is not None and not available[wanted].ok:
            self.console.warn(f"the run's backend {wanted} is not here: {available[wanted].reason}")
            wanted = None
            for name in ("train.backend", *resume.DERIVED["train.backend"]):
                if draft.sources[name].kind == "checkpoint":
                    draft.set(name, AUTO, Source("default"))
        measured = ""
        if wanted is None:
            wanted, measured = self._measured_backend(available)
        facts = detect.device_facts(wanted, available)
        if measured:
            facts = replace(facts, device=replace(facts.device, reason=measured))
        if facts.machine:
            self.console.fact(facts.machine.splitlines()[0], "")
        reason = f"auto: {facts.device.reason}" if facts.device.reason else source.where
        versions = " ".join(f"{k} {v}" for k, v in available[facts.device.backend].versions.items())
        self.console.fact("backend", f"{facts.device.backend}  {versions} ({reason or 'given'})")
        return facts.device

    def _measured_backend(self, available: dict[str, Availability]) -> tuple[str | None, str]:
        """The backend that an earlier comparison on this machine found fastest, and why."""
        found, note = remembered.fastest(available)
        if note:
            self.console.warn(note)
        return (None, "") if found is None else found

    def _mixture(self, draft: Draft) -> Mixture | None:
        """The folders of `data.mixture`; the one with the most validation stands for all of them."""
        value = draft.values["data.mixture"]
        if value is None:
            return None
        mixture = open_mixture(parse_mixture(value), Path(draft.values["data.shards_dir"]))
        main = str(mixture.main)
        given = draft.values["data.input_file"]
        if given is not None and Path(given).resolve() != mixture.main.resolve():
            raise PippinError(
                "P010",
                "data.input_file and data.mixture cannot both be given",
                found=f"data.input_file: {given}\ndata.mixture: {', '.join(value)}",
                remedy="leave out data.input_file",
                kept="nothing was started.",
            )
        draft.set("data.input_file", main, Source("auto", reason="of data.mixture"))
        for folder, share in zip(mixture.folders, mixture.weights):
            self.console.fact("mixture", f"{share:.1%} {folder}")
        return mixture

    def _prepare(
        self, draft: Draft, start: resume.ResumePoint | None, mixture: Mixture | None
    ) -> TextData:
        values = draft.values
        tokenizer = self._tokenizer_source(draft, start)
        if values["data.input_file"] is None and not self.options.force:
            refuse_full_disk(draft, tokenizer)
        if values["data.input_file"] is None:
            tell_many_stories(draft, tokenizer, self.console.fact)
        try:
            with self.console.phase("data", "preparing the text"):
                prepared = prepare(
                    values["data.input_file"],
                    shards_dir=Path(values["data.shards_dir"]),
                    seq_len=values["data.seq_len"],
                    seed=values["data.seed"],
                    text_field=values["data.text_field"],
                    on_bad_line=values["data.on_bad_line"],
                    tokenizer=tokenizer,
                    vocab_size=None
                    if draft.is_auto("model.vocab_size")
                    else values["model.vocab_size"],
                    val_fraction=values["data.val_fraction"],
                    test_fraction=values["data.test_fraction"],
                    corpus_bytes=values["data.corpus_bytes"],
                    report=self.console.fact,
                )
        except PippinError as error:
            raise readable(error, None if start is None else start.path) from None
        for note in prepared.notes:
            self.console.warn(note)
        if start is None:
            check_vocabulary(draft, prepared.tokenizer.vocab_size, self.console)
        draft.resolve("data.tokenizer", prepared.tokenizer.kind, prepared.tokenizer_reason)
        return text_data(prepared, values["data.input_file"], mixture)

    def _tokenizer_source(self, draft: Draft, start: resume.ResumePoint | None) -> str:
        """The run's own tokenizer on resume, so that shards can be built again exactly."""
        if start is not None and start.folder is not None:
            return str(start.folder)
        return str(draft.values["data.tokenizer"])

    def _resolve(
        self, draft: Draft, prepared: TextData, device: DeviceFacts, dial: Dial | None
    ) -> tuple[float | None, DataFacts]:
        """Resolve what is left; returns tokens/s where measured, and what is known of the data."""
        values = draft.values
        parts = prepared.parts("train", values["data.sampling"], int(values["data.seq_len"]), 0)
        facts = DataFacts(
            vocab_size=prepared.tokenizer.vocab_size,
            train_tokens=prepared.train_tokens,
            name=prepared.name,
            is_stories=draft.values["data.input_file"] is None,
            fill=parts.fill,
            work=parts.work,
        )

        def measure(config: RunConfig) -> float:
            return self._measure(config, math.ceil(facts.work * config.data.seq_len))

        automatic = not self.options.manual_config
        speed = resolve_auto(draft, facts, device, measure if automatic else None, dial)
        draft.resolve("train.save_dir", str(next_free_name(prepared.name)), "next free name")
        return speed, facts

    def _expected_speed(
        self,
        config: RunConfig,
        specs: tuple[ParamSpec, ...],
        device: DeviceFacts,
        data: DataFacts,
    ) -> Speed:
        """The speed where nothing had to be measured; a dry run tries steps that are short and fit."""
        budget = device.budget_bytes * config.train.memory_fraction
        if predict_training_memory(config, specs).total > budget:
            return Speed(None, "unknown: a step does not fit, so none is tried")
        length, share = math.ceil(data.work * config.data.seq_len), data.fill / data.work
        machine = detect.machine_facts()
        slow = slow_speed(config, device, machine, length)
        if slow is None and (self.options.dry_run or self.options.depth is not None):
            return Speed(share * self._measure(config, length), "measured")
        tokens_per_s, how = slow or predicted_speed(config, device, machine, length)
        return Speed(None if tokens_per_s is None else share * tokens_per_s, how)

    def _settle_memory(self, draft: Draft, device: DeviceFacts) -> None:
        """The largest micro-batch that fits; a real step confirms it where a run will follow."""
        budget = int(device.budget_bytes * float(draft.values["train.memory_fraction"]))
        looks = self.options.dry_run or self.options.print_config or self.options.force
        settle_micro_batch(
            draft,
            budget_bytes=budget,
            probe=None if looks else self._probe_step,
            warn=self.console.warn,
        )

    def _probe_step(self, config: RunConfig, limit_bytes: int) -> Probed:
        with self.console.phase("memory", "trying a step in a process of its own"):
            return self.backends.probe_step(config, limit_bytes)

    def _measure(self, config: RunConfig, length: int) -> float:
        """Positions per second, with fewer rows at once where memory does not suffice.

        Where a depth is only looked at, a step that takes long is predicted.
        """
        if self.options.depth is not None and (self.options.dry_run or self.options.print_config):
            facts = detect.device_facts(config.train.backend, self.backends.available())
            if (
                slow := slow_speed(config, facts.device, detect.machine_facts(), length)
            ) is not None:
                speed, self._how = slow
                self.console.fact("speed", f"{fmt.si(speed)} tok/s, {self._how}")
                return speed
        while True:
            try:
                return self._measure_once(config, length)
            except OutOfMemory as error:
                failure = error.bare()
            config = smaller(config, failure, self.console.warn)

    def _measure_once(self, config: RunConfig, length: int) -> float:
        specs = param_specs(config.model)
        with self.console.phase("speed", "measuring this machine"):
            backend = self.backends.load(config.train.backend)(config, specs, mode="train")
            try:
                backend.load(initial_checkpoint(config, specs))
                return measure_tokens_per_s(backend, config, seconds=PROBE_SECONDS, length=length)
            finally:
                backend.close()

    def _stop_step(self, draft: Draft, start: resume.ResumePoint | None) -> int:
        total = int(draft.values["train.total_steps"])
        limit = self.options.max_steps
        if start is not None:
            resume.refuse_finished(start, total, limit)
        if limit is None:
            return total
        if limit < total:
            self.console.fact(
                "length", f"--max-steps {limit}: stop there; the schedule stays {total}"
            )
        elif draft.sources["train.total_steps"].where == "--max-steps":
            self.console.fact("length", f"--max-steps {limit} is the length of the run")
        else:
            self.console.fact(
                "length",
                f"--max-steps {limit}: train.total_steps={total} ends the run before it"
                if limit > total
                else f"--max-steps {limit}: as long as train.total_steps",
            )
        return min(limit, total)

    def _folder(self, draft: Draft, start: resume.ResumePoint | None) -> Path:
        if start is not None and start.folder is not None:
            draft.set("train.save_dir", str(start.folder), Source("checkpoint", str(start.path)))
        elif start is not None and draft.sources["train.save_dir"].kind == "checkpoint":
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
        speed: Speed,
        fill: float,
        start: resume.ResumePoint | None,
        stop_step: int,
    ) -> None:
        """Tell what the run takes; refuse one that does not fit into memory or on the disk."""
        forecast = Forecast(
            config,
            specs,
            speed,
            int(device.budget_bytes * config.train.memory_fraction),
            first_step=0 if start is None else start.meta.step,
            stop_step=stop_step,
            fill=fill,
            disk=disk_plan(config, specs, start, stop_step, overwrite=self.options.overwrite),
        )
        self.console.fact("will take", forecast.line())
        if self.options.dry_run:
            for label, text in forecast.details():
                self.console.fact(label, text)
        if not self.options.force:
            forecast.refuse(self.options.depth)
