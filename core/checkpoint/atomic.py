"""Files that are complete or absent: a temporary name in the same folder, flushed, then renamed."""

import errno
import fcntl
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.durable import flush_folder, flush_to_disk
from core.errors import PippinError

# The names that a run gives to files in its folder; a run folder may be anybody's folder too.
_TEMPORARY = re.compile(
    r"\.tmp-(\d+)-(?:(?:step_\d{6,}|best)\.(?:npz|pt)|(?:config|training_state)\.json"
    r"|tokenizer\.(?:model|json|pippin\.json))\Z"
)


def temporary_path(path: Path) -> Path:
    """Where this process writes `path` before it is complete, e.g. `.tmp-4242-step_000500.npz`."""
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


@contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """A file descriptor whose content becomes `path` when the block ends without an exception.

    Raises:
        PippinError: P307 if anything fails; the temporary file is gone and `path` is as it was.
    """
    temporary = temporary_path(path)
    try:
        # Never truncated: what a killed process left may be a hard link to a good checkpoint.
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield fd
            flush_to_disk(fd)
        finally:
            os.close(fd)
        publish(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, PippinError) or not isinstance(error, Exception):
            raise
        raise _write_error(path, error) from error


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete file into place, and make the rename itself durable."""
    temporary.replace(path)
    # Renaming one hard link over another of the same file does nothing and leaves both.
    temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def _write_error(path: Path, error: Exception) -> PippinError:
    reason = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        reason = f"{os.strerror(error.errno)} (errno {error.errno})"
    elif not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {error}"
    found, remedy = _mend(path, error)
    kept = f"{path} is as it was before." if path.exists() else "earlier files are untouched."
    return PippinError(
        "P307",
        f"{path} could not be written: {reason}.",
        found=found,
        remedy=remedy,
        kept=f"{kept} The temporary file was removed.",
    )


def _mend(path: Path, error: Exception) -> tuple[str, str]:
    """What there is to know of the disk, and what mends it, whichever command was writing."""
    folder = shlex.quote(str(path.parent))
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EROFS:
        return "its disk is read-only.", "a folder on another disk"
    if number in (errno.EACCES, errno.EPERM):
        return "", f"ls -ld {folder}   (you may not write there), or another folder"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return f"the folder {path.parent} cannot be used", f"mkdir -p {folder}"
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes free on the disk"
    except OSError:
        free = f"the folder {path.parent} cannot be used"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return free, "free space on the disk, or a folder elsewhere"
    return free, "check the disk, and try again"


def clean_temporaries(folder: Path) -> tuple[Path, ...]:
    """Remove temporary files that a killed process left in `folder`; those of live ones stay.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(folder.glob(".tmp-*")):
        match = _TEMPORARY.match(path.name)
        if match is None or path.is_symlink() or not path.is_file():
            continue
        if _is_abandoned(path, int(match.group(1))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return tuple(removed)


def _is_abandoned(path: Path, pid: int) -> bool:
    if pid != os.getpid():
        return not _is_alive(pid)
    # In a container the killed run often had this very process id; a save under way holds a lock.
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
