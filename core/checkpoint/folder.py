"""The checkpoints of a run folder: the newest that verifies is the truth; no pointer file."""

import os
import shutil
from collections.abc import Collection
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
from core.paths import STEP_FILE

__all__ = ["clean_temporaries", "link_best", "list_checkpoints", "newest_valid", "prune"]


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
    raise PippinError("P303", f"no checkpoint in {folder} can be read.", found="\n".join(problems))


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
