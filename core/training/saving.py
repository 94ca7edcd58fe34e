"""Saving a run: the checkpoint of a step, `best.*`, pruning, and what people read beside it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from core.checkpoint import OpenCheckpoint, link_best, list_checkpoints, prune, step_of
from core.inference.evaluate import Evaluation
from core.paths import BEST_FILES, STEP_FILE, step_file_name
from core.training.disk import writing
from core.training.run import Progressed, Run, is_better
from core.training.runlog import write_json


def save(run: Run, val: Evaluation | None) -> None:
    """Write the checkpoint of the run's step, then best and pruning; the older stay until then.

    Args:
        run: The run; its meta becomes that of the checkpoint.
        val: Validation of these weights, where it was measured.

    Raises:
        PippinError: P307 if the checkpoint cannot be written, P312 for what lies beside it.
    """
    with writing(run.folder):
        _save(run, val)


def _save(run: Run, val: Evaluation | None) -> None:
    state = run.state
    path = run.folder / step_file_name(state.step, run.backend.suffix)
    best = val is not None and is_better(val.loss, state.saved_best_val_loss)
    if val is not None and best:
        state.saved_best_val_loss, state.saved_best_step = val.loss, state.step
    loop = {
        "best_val_loss": state.best_val_loss,
        "best_step": state.best_step,
        "saved_best_val_loss": state.saved_best_val_loss,
        "saved_best_step": state.saved_best_step,
    }
    meta = replace(run.meta, step=state.step, tokens_seen=state.tokens_seen, loop=loop)
    written = path in list_checkpoints(run.folder) and state.step == run.meta.step
    if not written or run.provisional:
        run.provisional = False
        path = run.backend.save(path, meta, optimizer=True).result()
    run.meta, run.checkpoint = meta, path
    if best:
        _drop_other_best(link_best(path, run.folder / f"best{run.backend.suffix}"))
    prune(run.folder, keep=run.config.train.ckpt_keep, protect=(path,))
    about = {
        "step": state.step,
        "total_steps": run.config.train.total_steps,
        "tokens_seen": state.tokens_seen,
        "checkpoint": path.name,
        **{k: v for k, v in loop.items() if v is not None},
        "note": "for people; never read back",
    }
    write_json(run.folder / "training_state.json", about)


def mend_best(
    folder: Path, state: Progressed, open_checkpoint: OpenCheckpoint, tell: Callable[[str], None]
) -> None:
    """Make `best.*` on a resume what the checkpoint says it is.

    It is not after a kill between a checkpoint and its link, or where the run goes on from before
    its best step. A best that belongs to steps that were given up is removed, and the next
    validation makes a new one.

    Args:
        folder: Run folder.
        state: Changed where there is no best any more.
        open_checkpoint: Opens a file of either suffix.
        tell: Told what was done.
    """
    wanted = state.saved_best_step
    for path in list_checkpoints(folder):
        match = STEP_FILE.match(path.name)
        if wanted is None or match is None or int(match.group(1)) != wanted:
            continue
        best = folder / f"best{path.suffix}"
        if step_of(best, open_checkpoint) != wanted:
            link_best(path, best)
            tell(f"{best.name} is {path.name} again")
        _drop_other_best(best)
        return
    steps = {name: step_of(folder / name, open_checkpoint) for name in BEST_FILES}
    for name, step in steps.items():
        if step is not None and step > state.step:
            (folder / name).unlink()
            tell(f"{name} was of step {step}, which this run gives up; removed")
            state.saved_best_val_loss = state.saved_best_step = None
        elif step is not None and step != wanted and wanted in steps.values():
            (folder / name).unlink()
            tell(f"{name} was of step {step}, the best is of step {wanted}; removed")


def _drop_other_best(best: Path) -> None:
    """Remove the best that the other framework wrote before."""
    for name in BEST_FILES:
        if name != best.name:
            best.with_name(name).unlink(missing_ok=True)
