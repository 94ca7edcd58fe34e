"""Where a run goes on: the checkpoint, what of it stands, and what may change.

The architecture, the data and the seed are the checkpoint's; a configuration that asks for another is
an error that shows both. Lengths, rates, intervals and the backend may change.
"""

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from core.checkpoint import (
    Checkpoint,
    Meta,
    OpenCheckpoint,
    list_checkpoints,
    newest_valid,
    verify,
    with_intact,
)
from core.config.draft import AUTO, Draft, Source
from core.config.load import build, from_resolved
from core.config.rates import scale_rates
from core.config.schema import RunConfig, is_auto_key, key_names
from core.errors import PippinError
from core.paths import STEP_FILE
from core.training.run import Progressed
from core.training.runfolder import RUNS_DIR, find_run, run_names
from core.training.textdata import TextData

# Keys that stand on resume besides the whole section `model`.
FIXED = (
    "data.seq_len",
    "data.sampling",
    "data.mixture",
    "data.val_fraction",
    "data.test_fraction",
    "data.tokenizer",
    "data.seed",
    "train.seed",
    "train.optimizer",
    "train.micro_batch_size x train.grad_accum_steps",
)
# Of these, what the text decides.
PREPARED = ("data.mixture", "data.tokenizer")
# A key that depends on another: it is decided again if only the other is given on resume. Precision
# is not among them: it is part of the experiment, whatever the backend.
DERIVED = {"train.backend": ("train.compile",)}
# Keys that change nothing of what a step computes.
OUTWARD = (
    "data.input_file",
    "data.prefetch",
    "data.shards_dir",
    "train.backend",
    "train.ckpt_interval",
    "train.ckpt_keep",
    "train.eval_interval",
    "train.eval_tokens",
    "train.log_interval",
    "train.max_skipped_steps",
    "train.memory_fraction",
    "train.minutes",
    "train.preflight",
    "train.sample_tokens",
    "train.samples",
    "train.save_dir",
)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        path: The checkpoint.
        folder: Its run folder, None where it lies outside any.
        meta: Its meta.
        later: Checkpoints of the folder that `--overwrite` gives up, removed when the run is about to
            start.
    """

    path: Path
    folder: Path | None
    meta: Meta
    later: tuple[Path, ...] = ()


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
        drop_later: Whether checkpoints after a named one may be given up; nothing is removed here.
        warn: Told of every damaged checkpoint that was skipped.

    Raises:
        PippinError: P302 where there is nothing to resume, P303 where nothing is intact.
    """
    if name is not None and Path(name).is_file():
        return _from_file(Path(name), open_checkpoint, drop_later=drop_later)
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
        names = run_names()
        remedy = f"python train.py --resume {shlex.quote(names[0])}" if names else "python train.py"
        raise PippinError(
            "P302",
            f"{folder} holds no checkpoint.",
            choices=names,
            remedy=remedy,
            kept="nothing was changed.",
        )
    path, problems = found
    for problem in problems:
        warn(problem)
    return ResumePoint(path, folder, _meta(path, open_checkpoint))


def _from_file(path: Path, open_checkpoint: OpenCheckpoint, *, drop_later: bool) -> ResumePoint:
    try:
        ckpt = open_checkpoint(path)
        try:
            verify(ckpt)
        finally:
            ckpt.close()
    except PippinError as error:
        again = f"python train.py --resume {shlex.quote(str(path.parent))}"
        raise with_intact(error, path, open_checkpoint, again) from error
    meta = _meta(path, open_checkpoint)
    if not (path.parent / "config.json").is_file():
        return ResumePoint(path, None, meta)
    later = tuple(p for p in list_checkpoints(path.parent) if _step(p) > meta.step)
    if later and not drop_later:
        raise PippinError(
            "P302",
            f"{path.parent} holds later checkpoints than step {meta.step}: {later[0].name}.",
            found="going on from the earlier one would leave two histories in one folder.",
            remedy=f"--resume {path.parent} for the newest, or add --overwrite to drop the later",
            kept="nothing was changed.",
        )
    return ResumePoint(path, path.parent, meta, later)


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
    """Let what depends on a key follow it where it is given anew, unless it is given too."""
    if "train.lr" in given:
        scale_rates(draft, old_lr=float(saved["train"]["lr"]), given=given)
    for name, followers in DERIVED.items():
        section, _, key = name.partition(".")
        if name not in given or draft.values[name] == saved[section][key]:
            continue
        for derived in followers:
            if derived not in given and is_auto_key(derived):
                draft.set(derived, AUTO, Source("default"))


def refuse_flags(start: ResumePoint, asked: Draft) -> None:
    """Refuse what is given but could have no effect on a run that goes on.

    Raises:
        PippinError: P302 for another run folder, P012 for a time.
    """
    again = f"python train.py --resume {shlex.quote(str(start.folder or start.path))}"
    if asked.sources["train.minutes"].kind == "flag":
        total = start.meta.config["train"]["total_steps"]
        raise PippinError(
            "P012",
            f"--minutes decides the length of a new run; this one is {total} steps long.",
            found=f"the checkpoint is at step {start.meta.step}",
            remedy=f"{again} train.total_steps={max(2 * total, start.meta.step + 1)}"
            "   (longer), or leave --minutes out",
            kept="nothing was changed.",
        )
    save_dir = Path(str(asked.values["train.save_dir"]))
    given = asked.sources["train.save_dir"].kind != "default" and not asked.is_auto(
        "train.save_dir"
    )
    if start.folder is not None and given and save_dir.resolve() != start.folder.resolve():
        raise PippinError(
            "P302",
            f"the run {start.folder} goes on in its own folder, not in {save_dir}.",
            remedy=f"{again}   (there), or copy the folder and resume the copy",
            kept="nothing was changed.",
        )


def refuse_finished(start: ResumePoint, total_steps: int, max_steps: int | None) -> None:
    """Refuse a run that would end before its first step.

    Args:
        start: The checkpoint.
        total_steps: Length of the schedule now.
        max_steps: `--max-steps`, if given.

    Raises:
        PippinError: P302, with a longer length.
    """
    step = start.meta.step
    stop = total_steps if max_steps is None else min(max_steps, total_steps)
    if stop > step:
        return
    again = f"python train.py --resume {shlex.quote(str(start.folder or start.path))}"
    if step < total_steps:
        what = f"the checkpoint is at step {step}, and --max-steps is {max_steps}."
        remedy = f"{again} --max-steps {min(step + 100, total_steps)}"
    else:
        what = f"the run is finished: its checkpoint is at step {step} of {total_steps}."
        remedy = f"{again} train.total_steps={max(2 * total_steps, step + 1)}"
    raise PippinError("P302", what, remedy=remedy, kept="nothing was changed.")


def refuse_asked(start: ResumePoint, draft: Draft) -> None:
    """Refuse another experiment by what is asked for, before any text is prepared.

    What is not decided yet is compared by `refuse_changes`.

    Raises:
        PippinError: P302 with both values of each key that differs.
    """
    saved = build(from_resolved(start.meta.config, str(start.path)))
    keys = [f"model.{name}" for name in type(saved.model).model_fields]
    keys += [key for key in FIXED if key in draft.values and key not in PREPARED]
    pairs = [(k, _get(saved, k), draft.values[k]) for k in keys if not draft.is_auto(k)]
    rows = ("train.micro_batch_size", "train.grad_accum_steps")
    if not any(draft.is_auto(key) for key in rows):
        asked = int(draft.values[rows[0]]) * int(draft.values[rows[1]])
        pairs.append((" x ".join(rows), _get(saved, " x "), asked))
    _refuse(start, pairs)


def refuse_changes(start: ResumePoint, config: RunConfig, prepared: TextData) -> None:
    """Refuse a configuration or data that is another experiment.

    Raises:
        PippinError: P302 with both values of everything that differs, P301 for other data.
    """
    saved = build(from_resolved(start.meta.config, str(start.path)))
    keys = [*(f"model.{name}" for name in type(saved.model).model_fields), *FIXED]
    _refuse(start, [(key, _get(saved, key), _get(config, key)) for key in keys])
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


def _refuse(start: ResumePoint, pairs: Sequence[tuple[str, Any, Any]]) -> None:
    """Refuse where a key's value in the checkpoint is not the one that is asked for."""
    differing = [
        f"{key}: the checkpoint has {old}, the configuration asks for {new}"
        for key, old, new in pairs
        if old != new
    ]
    if not differing:
        return
    again = f"python train.py --resume {shlex.quote(str(start.path))}"
    raise PippinError(
        "P302",
        f"cannot resume {start.path}: another experiment was asked for.",
        found="\n".join(differing),
        remedy=f"{again}   (as it was), or start a new run",
        kept="nothing was changed.",
    )


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
        saved_best_val_loss=meta.loop.get("saved_best_val_loss"),
        saved_best_step=meta.loop.get("saved_best_step", meta.loop.get("best_step")),
    )


def same_curve(start: ResumePoint, config: RunConfig, version: str) -> str:
    """What the rest of the run has in common with an uninterrupted one, in words.

    Args:
        start: The checkpoint.
        config: The configuration of the rest.
        version: Version of the framework that computes it.
    """
    saved = build(from_resolved(start.meta.config, str(start.path)))
    keys = [k for k in key_names() if k not in OUTWARD]
    changed = [k for k in keys if _get(saved, k) != _get(config, k)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"same data order, other {', '.join(changed[:3])}{more}"
    backend = start.meta.backend
    if backend.get("name") != config.train.backend:
        if config.train.precision != "float32":
            return f"same data order, and a curve of the same shape on {config.train.backend}"
        return f"same data order, and the same curve to rounding on {config.train.backend}"
    if backend.get("version") != version:
        return "same data order, and the same curve to rounding: another version of the framework"
    return "same data order, same curve"


class Continued:
    """A checkpoint as a resumed run takes it: steps skipped in a row are counted anew.

    Those that were counted before the end are either taken again or behind the run.
    """

    def __init__(self, ckpt: Checkpoint) -> None:
        state = {**ckpt.meta.backend_state, "skipped_in_a_row": 0.0}
        self.meta = replace(ckpt.meta, backend_state=state)
        self.names = ckpt.names
        self._ckpt = ckpt

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._ckpt.shape(name)

    def dtype(self, name: str) -> str:
        """Dtype of a tensor."""
        return self._ckpt.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """Values of a tensor, verified."""
        return self._ckpt.read(name)

    def close(self) -> None:
        """Give back the file."""
        self._ckpt.close()
