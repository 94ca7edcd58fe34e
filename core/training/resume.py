"""Where a run goes on: the checkpoint, what of it stands, and what may change.

The architecture, the data and the seed are the checkpoint's; a configuration that asks for another is
an error that shows both. Lengths, rates, intervals and the backend may change.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint import Meta, OpenCheckpoint, list_checkpoints, newest_valid, verify
from core.config.load import AUTO, Draft, Source
from core.config.schema import RunConfig, is_auto_key
from core.errors import PippinError
from core.paths import STEP_FILE
from core.training.loop import Progressed
from core.training.runfolder import RUNS_DIR, find_run, run_names
from core.training.textdata import TextData

# Keys that stand on resume besides the whole section `model`.
FIXED = (
    "data.seq_len",
    "data.val_fraction",
    "data.test_fraction",
    "data.tokenizer",
    "data.seed",
    "train.seed",
    "train.optimizer",
    "train.micro_batch_size x train.grad_accum_steps",
)
# A key that was derived from another: it follows if only the other is given on resume.
DERIVED = {
    "train.lr": (
        "train.min_lr",
        "train.lr_matrix",
        "train.lr_embed",
        "train.lr_head",
        "train.lr_vector",
    ),
    "train.backend": ("train.precision", "train.compile"),
}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from; `folder` is None where it lies outside any run folder."""

    path: Path
    folder: Path | None
    meta: Meta


def find(
    name: str | None,
    *,
    save_dir: str | None,
    open_checkpoint: OpenCheckpoint,
    drop_later: bool,
    warn: Callable[[str], None],
) -> ResumePoint:
    """The checkpoint that `--resume` means.

    Args:
        name: A checkpoint file, a run folder, a run's name, or None: the run in `save_dir`, else the
            newest run below ./checkpoints.
        save_dir: Run folder of the configuration, if it has one.
        open_checkpoint: Opens a file of either suffix.
        drop_later: Whether checkpoints after a named one may be removed.
        warn: Told of every damaged checkpoint that was skipped.

    Raises:
        PippinError: P302 where there is nothing to resume, P303 where nothing is intact.
    """
    if name is not None and Path(name).is_file():
        return _from_file(Path(name), open_checkpoint, drop_later=drop_later, warn=warn)
    if name is None:
        runs = run_names()
        name = save_dir or (str(RUNS_DIR / runs[0]) if runs else None)
    if name is None:
        raise PippinError(
            "P302",
            f"there is no run to resume below {RUNS_DIR}.",
            remedy="python train.py   (starts one)",
            kept="nothing was changed.",
        )
    folder = find_run(name)
    found = newest_valid(folder, open_checkpoint)
    if found is None:
        raise PippinError(
            "P302", f"{folder} holds no checkpoint.", choices=run_names(), kept="nothing changed."
        )
    path, problems = found
    for problem in problems:
        warn(problem)
    return ResumePoint(path, folder, _meta(path, open_checkpoint))


def _from_file(
    path: Path, open_checkpoint: OpenCheckpoint, *, drop_later: bool, warn: Callable[[str], None]
) -> ResumePoint:
    ckpt = open_checkpoint(path)
    try:
        verify(ckpt)
    finally:
        ckpt.close()
    meta = _meta(path, open_checkpoint)
    if not (path.parent / "config.json").is_file():
        return ResumePoint(path, None, meta)
    later = [p for p in list_checkpoints(path.parent) if _step(p) > meta.step]
    if later and not drop_later:
        raise PippinError(
            "P302",
            f"{path.parent} holds later checkpoints than step {meta.step}: {later[0].name}.",
            found="going on from the earlier one would leave two histories in one folder.",
            remedy=f"--resume {path.parent} for the newest, or add --overwrite to drop the later",
            kept="nothing was changed.",
        )
    for old in later:
        old.unlink()
        warn(f"{old.name} was removed: the run goes on from step {meta.step}")
    return ResumePoint(path, path.parent, meta)


def _step(path: Path) -> int:
    match = STEP_FILE.match(path.name)
    return int(match.group(1)) if match else -1


def _meta(path: Path, open_checkpoint: OpenCheckpoint) -> Meta:
    ckpt = open_checkpoint(path)
    try:
        meta = ckpt.meta
    finally:
        ckpt.close()
    if meta.kind != "full":
        raise PippinError(
            "P302",
            f"{path} holds weights only; a run needs the optimizer's state to go on.",
            remedy="resume a step_*.npz or step_*.pt of the run folder",
            kept="nothing was changed.",
        )
    return meta


def follow(draft: Draft, given: Collection[str], saved: Mapping[str, Any]) -> None:
    """Open again what was derived from a key that is given anew, unless it is given too."""
    for name, followers in DERIVED.items():
        section, _, key = name.partition(".")
        if name not in given or draft.values[name] == saved[section][key]:
            continue
        for derived in followers:
            if derived not in given and is_auto_key(derived):
                draft.set(derived, AUTO, Source("default"))


def refuse_changes(start: ResumePoint, config: RunConfig, prepared: TextData) -> None:
    """Refuse a configuration or data that is another experiment.

    Raises:
        PippinError: P302 with both values of everything that differs, P301 for other data.
    """
    saved = RunConfig.model_validate(start.meta.config)
    differing = [
        f"model.{name}: the checkpoint has {old}, the configuration asks for {new}"
        for name, old, new in _pairs(saved.model.model_dump(), config.model.model_dump())
    ]
    for key in FIXED:
        old, new = _get(saved, key), _get(config, key)
        if old != new:
            differing.append(f"{key}: the checkpoint has {old}, the configuration asks for {new}")
    if differing:
        raise PippinError(
            "P302",
            f"cannot resume {start.path}: another experiment was asked for.",
            found="\n".join(differing),
            remedy=f"python train.py --resume {start.path}   (as it was), or start a new run",
            kept="nothing was changed.",
        )
    if prepared.tokenizer.fingerprint != start.meta.tokenizer.get("sha256"):
        raise PippinError(
            "P301",
            "the prepared text has another tokenizer than the checkpoint.",
            found=f"checkpoint {str(start.meta.tokenizer.get('sha256'))[:12]}, "
            f"text {prepared.tokenizer.fingerprint[:12]}",
            remedy="give the text and tokenizer that the run began with",
            kept="nothing was changed.",
        )
    if prepared.manifest_sha256 != start.meta.data.get("manifest_sha256"):
        raise PippinError(
            "P302",
            "the text has changed since the checkpoint was written, so the run cannot go on exactly.",
            remedy="restore the text, or start a new run on the changed one",
            kept="nothing was changed.",
        )


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(k, old[k], new[k]) for k in old if old[k] != new[k]]


def _get(config: RunConfig, key: str) -> Any:
    if " x " in key:
        return config.train.micro_batch_size * config.train.grad_accum_steps
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def state_of(meta: Meta) -> Progressed:
    """Where the loop goes on."""
    return Progressed(
        step=meta.step,
        tokens_seen=meta.tokens_seen,
        best_val_loss=meta.loop.get("best_val_loss"),
        best_step=meta.loop.get("best_step"),
    )
