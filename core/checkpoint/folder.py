"""The checkpoints of a run folder: the newest that verifies is the truth; no pointer file."""

import os
import shlex
import shutil
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

from core.checkpoint.atomic import (
    atomic_file,
    clean_temporaries,
    publish,
    temporary_path,
)
from core.checkpoint.content import verify
from core.checkpoint.meta import OpenCheckpoint
from core.errors import PippinError
from core.paths import BEST_FILES, STEP_FILE

__all__ = [
    "clean_temporaries",
    "is_intact",
    "link_best",
    "list_checkpoints",
    "newest_valid",
    "prune",
    "step_of",
    "with_intact",
]


def list_checkpoints(folder: Path) -> tuple[Path, ...]:
    """Files `step_NNNNNN.npz|.pt`, newest step first; clocks and file times play no part."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_FILE.match(path.name)
        if match is not None and path.is_file():
            found.append((int(match.group(1)), path.name, path))
    return tuple(path for _, _, path in sorted(found, reverse=True))


def newest_valid(
    folder: Path, open_checkpoint: OpenCheckpoint
) -> tuple[Path, tuple[str, ...]] | None:
    """The newest checkpoint whose every checksum fits.

    Returns:
        Its path, and one line for each newer file that was skipped, with the reason; or None if the
        folder holds no checkpoint.

    Raises:
        PippinError: P303 if there are checkpoints and none is intact.
    """
    paths = list_checkpoints(folder)
    problems: list[str] = []
    for path in paths:
        try:
            ckpt = open_checkpoint(path)
            try:
                verify(ckpt)
            finally:
                ckpt.close()
        except PippinError as error:
            reason = " ".join([error.what, *error.found.splitlines()])
            problems.append(f"{path.name} was skipped: {error.code} {reason}")
        else:
            return path, tuple(problems)
    if not paths:
        return None
    raise PippinError(
        "P303",
        f"no checkpoint in {folder} can be read.",
        found="\n".join(problems),
        remedy=_last_resort(folder, open_checkpoint),
        kept="nothing was changed.",
    )


def _last_resort(folder: Path, open_checkpoint: OpenCheckpoint) -> str:
    """What is left where no checkpoint of a step is intact: the best, or a copy."""
    for path in (folder / name for name in BEST_FILES):
        if path.is_file() and is_intact(path, open_checkpoint):
            again = f"python train.py --resume {shlex.quote(str(path))} --overwrite"
            return f"{again}   (the best is intact; the damaged ones after it are removed)"
    return "put back a copy of one, or start anew: python train.py --save-dir FOLDER"


def is_intact(path: Path, open_checkpoint: OpenCheckpoint) -> bool:
    """Whether every checksum of a checkpoint fits."""
    try:
        ckpt = open_checkpoint(path)
        try:
            verify(ckpt)
        finally:
            ckpt.close()
    except PippinError:
        return False
    return True


def step_of(path: Path, open_checkpoint: OpenCheckpoint) -> int | None:
    """Optimizer step of a checkpoint; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        ckpt = open_checkpoint(path)
    except PippinError:
        return None
    try:
        return ckpt.meta.step
    finally:
        ckpt.close()


def with_intact(
    error: PippinError, path: Path, open_checkpoint: OpenCheckpoint, command: str
) -> PippinError:
    """The error of a damaged checkpoint that was named, with the newest intact one beside it.

    Args:
        error: Of any code; only that of a damaged file is changed.
        path: The file.
        open_checkpoint: Opens a file of either suffix.
        command: What to type instead, with {} for the path of an intact one.
    """
    if error.code != "P303":
        return error
    others = [p for p in list_checkpoints(path.parent) if p != path]
    found = next((p for p in others if is_intact(p, open_checkpoint)), None)
    if found is None:
        said = "there is no intact checkpoint beside it."
        remedy = _last_resort(path.parent, open_checkpoint)
    else:
        saved = datetime.fromtimestamp(found.stat().st_mtime)
        said = f"newest intact: {found}, saved {saved:%Y-%m-%d %H:%M}"
        remedy = command.replace("{}", shlex.quote(str(found)))
    return PippinError(
        error.code, error.what, found=f"{error.found}\n{said}", remedy=remedy, kept=error.kept
    )


def prune(folder: Path, keep: int, protect: Collection[Path] = ()) -> tuple[Path, ...]:
    """Delete all but the `keep` newest and those in `protect`; returns what was deleted."""
    protected = {path.resolve() for path in protect}
    old = [p for p in list_checkpoints(folder)[max(keep, 1) :] if p.resolve() not in protected]
    for path in old:
        path.unlink(missing_ok=True)
    return tuple(old)


def link_best(src: Path, dst: Path) -> Path:
    """Make `dst` the same file as `src`: a hard link, else a copy; atomic either way.

    Raises:
        PippinError: P307 if neither can be made.
    """
    temporary = temporary_path(dst)
    try:
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(src)
        publish(temporary, dst)
    except OSError:
        with atomic_file(dst) as fd, src.open("rb") as source, os.fdopen(os.dup(fd), "wb") as out:
            shutil.copyfileobj(source, out, 8 << 20)
    return dst
