"""What a run needs around it: the machine, the configuration, tokenizer and text, memory, disk, folders.

Nothing is prepared, trained or downloaded; a text is opened and its first document read.
"""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.backend import Availability
from core.config.draft import Draft
from core.config.load import build
from core.config.schema import RunConfig
from core.data.preparing.prepare import ready_folder
from core.data.reading.documents import HUB_PREFIX
from core.data.reading.sources import open_source
from core.data.sampling.mixture import open_mixture, parse_mixture
from core.data.shards.manifest import load_manifest
from core.data.shards.verify import own_tokenizer
from core.data.tokenizers.tokenizer import KINDS, load_tokenizer
from core.errors import PippinError
from core.machine.autoconfig import (
    STORY_VOCAB_SIZE,
    DataFacts,
    DeviceFacts,
    resolve_auto,
    resolve_early,
)
from core.machine.detect import gib, power_words
from core.machine.facts import MachineFacts, NvidiaFacts
from core.machine.memory import checkpoint_bytes, predict_training_memory
from core.params import num_parameters, param_specs
from core.training.runfolder import RUNS_DIR
from core.training.verification.report import Check, Status

# Bytes of text a token stands for, about, and bytes of a token in a shard.
BYTES_PER_TOKEN, SHARD_BYTES = 4, 2
MIN_MACOS = 14
GB = 1e9


@dataclass(frozen=True)
class PlannedRun:
    """A configuration as far as it can be known before its text is prepared."""

    config: RunConfig
    device: DeviceFacts
    text_bytes: int


def failed(group: str, name: str, error: PippinError, remedy: str = "") -> Check:
    """An error as a failed check; `remedy` where the error names none."""
    choices = f"available: {', '.join(error.choices)}" if error.choices else ""
    figure = "\n".join(part for part in (error.what, error.found, choices) if part)
    return Check(group, name, "fail", figure, remedy=error.remedy or remedy)


def machine(facts: MachineFacts) -> Iterator[Check]:
    """What the machine says of itself, and what stands in the way."""
    group = "machine"
    cores = facts.cpu.physical_cores or facts.cpu.logical_cores
    known = facts.memory_bytes is not None and cores is not None
    yield Check(
        group,
        "processor and memory",
        "pass" if known else "fail",
        _processor(facts),
        remedy="run it outside the container, or give /proc to it",
    )
    if facts.apple is not None:
        yield from _mac(facts)
    if facts.nvidia is not None:
        certain = facts.nvidia.order_is_certain
        words = _cards(facts.nvidia)
        yield Check(
            group,
            "NVIDIA cards",
            "pass" if certain else "fail",
            words if certain else f"{words}; CUDA numbers cards that differ in its own order",
            remedy="export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    words = power_words(facts.power)
    yield Check(group, "power", "pass", words or "mains")


def _processor(facts: MachineFacts) -> str:
    cpu = facts.cpu
    words = [cpu.name, f"{cpu.physical_cores or cpu.logical_cores or 'unknown'} cores"]
    if cpu.performance_cores is not None:
        words[-1] += f" ({cpu.performance_cores} fast, {cpu.efficiency_cores} efficient)"
    flags = {"bf16": cpu.bf16, "AVX-512": cpu.avx512, "AMX": cpu.amx, "SME": cpu.sme}
    words += [name for name, has in flags.items() if has]
    words.append("unknown memory" if facts.memory_bytes is None else gib(facts.memory_bytes))
    if facts.limits.memory_bytes is not None:
        words[-1] += f" limited to {gib(facts.limits.memory_bytes)}"
    return ", ".join(words)


def _cards(nvidia: NvidiaFacts) -> str:
    first, count = nvidia.gpus[0], len(nvidia.gpus)
    words = [f"{count} x {first.name}" if count > 1 else first.name]
    size = nvidia.replica_memory_bytes
    if size is not None:
        words.append(gib(size) + (" each" if count > 1 else ""))
    if first.compute_capability is not None:
        major, minor = first.compute_capability
        words.append(f"{first.architecture or 'unknown architecture'} {major}.{minor}")
    words += [w for w in (first.kind, nvidia.interconnect) if w is not None]
    return ", ".join(words)


def _mac(facts: MachineFacts) -> Iterator[Check]:
    apple = facts.apple
    if apple is None:
        return
    budget = apple.recommended_working_set_bytes
    share = f"{gib(budget)} for the GPU ({apple.working_set_source})" if budget else "unknown"
    largest = apple.largest_buffer_bytes
    share += f", largest array {gib(largest)}" if largest else ""
    share += f", {apple.gpu_cores} GPU cores" if apple.gpu_cores else ""
    yield Check("machine", "unified memory", "pass", share)
    yield Check(
        "machine",
        "Python for this chip",
        "fail" if apple.is_rosetta else "pass",
        "an Intel build under Rosetta" if apple.is_rosetta else facts.architecture,
        remedy="brew install python@3.12, remove .venv, ./setup.sh",
    )
    major = (facts.system_version or "").split(".")[0]
    old = major.isdigit() and int(major) < MIN_MACOS and major != "10"
    yield Check(
        "machine",
        "macOS",
        "fail" if old else "pass",
        f"{facts.system_version}; MLX and bfloat16 need {MIN_MACOS}",
        remedy="update macOS, or --backend cpu",
    )


def backends_here(
    available: Mapping[str, Availability], wanted: str | None
) -> tuple[list[str], list[Check]]:
    """The backends to test, and a check for each that there is.

    A backend whose hardware or package is absent is skipped; one of a wrong version fails, as does the
    one that was asked for.
    """
    checks, present = [], []
    for name, state in available.items():
        if wanted is not None and name != wanted:
            continue
        if state.ok:
            present.append(name)
            versions = " ".join(f"{k} {v}" for k, v in state.versions.items())
            checks.append(Check("backends", name, "pass", versions))
        else:
            wrong = wanted == name or state.code == "P502"
            status: Status = "fail" if wrong else "skipped"
            checks.append(Check("backends", name, status, state.reason, remedy=state.remedy))
    if not present and wanted is None:
        checks.append(Check("backends", "one that can run", "fail", "none", remedy="./setup.sh"))
    return present, checks


def tokenizer(draft: Draft) -> Check:
    """The tokenizer's pieces have rows in the model."""
    group, name = "config", "tokenizer against vocabulary"
    value = str(draft.values["data.tokenizer"])
    ready = ready_folder(draft.values["data.input_file"])
    wanted = None if draft.is_auto("model.vocab_size") else int(draft.values["model.vocab_size"])
    try:
        if ready is not None:
            manifest = load_manifest(ready)
            made = own_tokenizer(ready, manifest)
        elif value in ("auto", *KINDS):
            size = "of its own size" if wanted is None else f"of {wanted:,} pieces at most"
            kind = "one" if value == "auto" else f"a {value} tokenizer"
            return Check(group, name, "pass", f"{kind} {size} is made from the text")
        else:
            made = load_tokenizer(Path(value).expanduser())
    except PippinError as error:
        return failed(group, name, error)
    figure = f"{made.vocab_size:,} pieces of kind {made.kind}"
    if wanted is None:
        return Check(group, name, "pass", figure + ", which the model takes")
    good = made.vocab_size <= wanted
    figure += f", model.vocab_size={wanted:,}"
    unused = f" ({wanted - made.vocab_size:,} rows stay unused)" if made.vocab_size < wanted else ""
    remedy = f"model.vocab_size={made.vocab_size}"
    return Check(group, name, "pass" if good else "fail", figure + unused, remedy=remedy)


def dataset(draft: Draft, *, online: bool) -> tuple[Check, int]:
    """Whether the text can be read, and its size in bytes where that is known (else 0)."""
    group, name = "data", "text"
    given, mixture = draft.values["data.input_file"], draft.values["data.mixture"]
    try:
        if mixture is not None:
            found = open_mixture(parse_mixture(mixture), Path(draft.values["data.shards_dir"]))
            tokens = sum(m.tokens for m in found.manifests)
            figure = f"{len(found.folders)} folders, {tokens:,} tokens"
            return Check(group, name, "pass", figure), BYTES_PER_TOKEN * tokens
        ready = ready_folder(given)
        if ready is not None:
            tokens = load_manifest(ready).tokens
            return Check(group, name, "pass", f"{ready}: {tokens:,} tokens, prepared"), (
                BYTES_PER_TOKEN * tokens
            )
        if given is None:
            size = draft.values["data.corpus_bytes"]
            words = (
                f"{size / 1e6:.0f} MB of stories are written"
                if isinstance(size, int)
                else ("stories are written")
            )
            return Check(group, name, "pass", f"{words} here; no file is needed"), (
                size if isinstance(size, int) else 0
            )
        if str(given).startswith(HUB_PREFIX) and not online:
            return _hub_library(str(given)), 0
        source = open_source(given, draft.values["data.text_field"])
        next(iter(source.documents()), None)
        size = int(source.num_bytes)
        return Check(group, name, "pass", f"{given}: {size / 1e6:.1f} MB can be read"), size
    except PippinError as error:
        remedy = "data.input_file=PATH of a file or folder, or leave it out for stories"
        return failed(group, name, error, remedy), 0


def _hub_library(given: str) -> Check:
    if importlib.util.find_spec("datasets") is None:
        figure = f"{given} needs the package datasets, which is not installed"
        return Check("data", "text", "fail", figure, remedy="pip install 'datasets>=4'")
    figure = f"{given}: the package datasets is here; --online also reaches the hub"
    return Check("data", "text", "pass", figure)


def plan(draft: Draft, device: DeviceFacts, text_bytes: int) -> PlannedRun:
    """Resolve everything without preparing or measuring: automatic sizes are then the smallest.

    Raises:
        PippinError: P010 where keys contradict each other.
    """
    trial = Draft(dict(draft.values), dict(draft.sources))
    resolve_early(trial, device)
    trial.resolve("data.tokenizer", "bpe", "")
    text_bytes = text_bytes or int(trial.values["data.corpus_bytes"])
    vocab = STORY_VOCAB_SIZE
    if not trial.is_auto("model.vocab_size"):
        vocab = int(trial.values["model.vocab_size"])
    tokens = max(text_bytes // BYTES_PER_TOKEN, 1_000_000)
    is_stories = trial.values["data.input_file"] is None
    resolve_auto(trial, DataFacts(vocab, tokens, "text", is_stories), device, None)
    trial.resolve("train.save_dir", f"{RUNS_DIR}/text-1", "")
    return PlannedRun(build(trial), device, text_bytes)


def memory(draft: Draft, planned: PlannedRun) -> Check:
    """The predicted peak of a step against the share of the device's budget that it may use."""
    config = planned.config
    specs = param_specs(config.model)
    total = predict_training_memory(config, specs).total
    share = config.train.memory_fraction
    budget = int(planned.device.budget_bytes * share)
    size = f"{num_parameters(specs) / 1e6:.1f} M parameters"
    if any(draft.is_auto(k) for k in ("model.d_model", "model.n_layers")):
        size += ", the smallest of the automatic sizes"
    figure = f"{total / GB:.2f} GB of {budget / GB:.2f} GB, {share:.0%} of the budget ({size})"
    return Check(
        "memory",
        f"one step on {config.train.backend}",
        "pass" if total <= budget else "fail",
        figure,
        float(total),
        float(budget),
        remedy=_fitting(config, budget) if total > budget else "",
    )


def _fitting(config: RunConfig, budget: int) -> str:
    """The nearest settings that fit: the same step in smaller micro-batches, then checkpointing."""
    specs = param_specs(config.model)
    for checkpointing in (False, True):
        rows, parts = config.train.micro_batch_size, config.train.grad_accum_steps
        while rows >= 1:
            update = {
                "micro_batch_size": rows,
                "grad_accum_steps": parts,
                "gradient_checkpointing": checkpointing or config.train.gradient_checkpointing,
            }
            trial = config.model_copy(update={"train": config.train.model_copy(update=update)})
            if predict_training_memory(trial, specs).total <= budget:
                words = f"train.micro_batch_size={rows} train.grad_accum_steps={parts}"
                return words + (" train.gradient_checkpointing=true" if checkpointing else "")
            rows, parts = rows // 2, parts * 2
    return "a smaller model: model.n_layers, model.d_model"


def disk(planned: PlannedRun, free: Callable[[str], int | None]) -> Check:
    """Checkpoints, the new one beside those that are kept, and the prepared text."""
    config = planned.config
    kept = config.train.ckpt_keep + 2  # the best, and the one that is being written
    need = kept * checkpoint_bytes(config, param_specs(config.model))
    need += planned.text_bytes + SHARD_BYTES * planned.text_bytes // BYTES_PER_TOKEN
    folder = _existing(Path(config.train.save_dir))
    left = free(str(folder))
    if left is None:
        return Check("disk", "free space", "skipped", f"{folder.absolute()} does not say")
    return Check(
        "disk",
        "free space",
        "pass" if need <= left else "fail",
        f"{need / GB:.2f} GB are needed for checkpoints and text, {left / GB:.1f} GB are free",
        float(need),
        float(left),
        remedy="free some space, or --save-dir and data.shards_dir on another disk",
    )


def folders(draft: Draft) -> Iterator[Check]:
    """Where a run writes can be written."""
    runs = RUNS_DIR if draft.is_auto("train.save_dir") else draft.values["train.save_dir"]
    places = {"run folder": runs, "shards": draft.values["data.shards_dir"]}
    for name, path in places.items():
        place = _existing(Path(path))
        error = _write(place)
        key = "--save-dir" if name == "run folder" else "data.shards_dir"
        allow = f"chmod u+w {place}, or " if place.is_dir() else ""
        yield Check(
            "disk",
            f"{name} writable",
            "fail" if error else "pass",
            f"{place}: {error}" if error else str(path),
            remedy=f"{allow}{key} FOLDER" if key.startswith("-") else f"{allow}{key}=FOLDER",
        )


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _write(place: Path) -> str:
    """Why nothing can be written there; empty where it can."""
    if not place.is_dir():
        return "it is a file, not a folder"
    try:
        handle, name = tempfile.mkstemp(prefix=".pippin-", dir=place)
        os.close(handle)
        with contextlib.suppress(OSError):
            Path(name).unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def free_bytes(folder: str) -> int | None:
    """Bytes that can be written on the disk of a folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
