"""A disk that is full or cannot be written, in the words a user needs."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from core.errors import PippinError


def disk_error(path: Path, error: OSError, *, kept: str) -> PippinError:
    """P312 for a file or folder of a run, with the free space of its disk.

    Args:
        path: What could not be written.
        error: Why.
        kept: What was kept, or that nothing was started.
    """
    free = ""
    with contextlib.suppress(OSError, StopIteration):
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        free = f"{shutil.disk_usage(place).free / 1e9:.1f} GB are free on its disk."
    return PippinError(
        "P312",
        f"{path} cannot be written: {error.strerror or error}.",
        found=free,
        remedy="free some space, or python train.py --save-dir FOLDER   (another place)",
        kept=kept,
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system says while `path` is written becomes P312.

    Raises:
        PippinError: P312.
    """
    try:
        yield
    except OSError as error:
        kept = "checkpoints that were complete are untouched."
        raise disk_error(path, error, kept=kept) from error
