"""A disk that is full or cannot be written, in the words a user needs; before a run and during it."""

import contextlib
import errno
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import PippinError
from core.paths import BEST_FILES
from core.training import format as fmt

# What more room mends; EDQUOT is a user's own limit.
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def disk_error(path: Path, error: OSError, *, kept: str) -> PippinError:
    """P312 for a file or folder of a run, with what mends it.

    Args:
        path: What could not be written.
        error: Why.
        kept: What was kept, or that nothing was started.
    """
    found, remedy = "", "python train.py --save-dir FOLDER   (another place)"
    if error.errno in FORBIDDEN:
        remedy = "python train.py --save-dir FOLDER   (a place that you may write)"
    elif error.errno in NO_FOLDER:
        file = next((p for p in (path, *path.parents) if p.is_file()), path)
        found = f"{file} is a file, and a run needs a folder."
        remedy = "python train.py --save-dir FOLDER   (a name that is free)"
    else:
        free = free_bytes(path)
        found = "" if free is None else f"{fmt.gigabytes(free)} are free on its disk."
        if error.errno in FULL:
            remedy = f"free some space, or {remedy}"
    what = f"{path} cannot be written: {error.strerror or error}."
    return PippinError("P312", what, found=found, remedy=remedy, kept=kept)


def free_bytes(path: Path) -> int | None:
    """Bytes that are free on the disk of a file or folder that need not exist; None if unknown."""
    with contextlib.suppress(OSError, StopIteration):
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        return shutil.disk_usage(place).free
    return None


def files_to_come(*, held: int, saves: int, keep: int, best_held: bool = False) -> int:
    """Checkpoint files that a run adds at its fullest moment: while it writes one, before it prunes.

    The best is a link to a checkpoint, so it takes room of its own only once that one is pruned.

    Args:
        held: Checkpoints in the folder that stay.
        saves: Checkpoints to come.
        keep: `train.ckpt_keep`.
        best_held: Whether a file of the best takes room already.
    """
    if saves == 0:
        return 0
    before = held + saves - 1
    best = before > keep and not best_held
    return max(min(before, keep) + best + 1 - held, 1)


def saves_between(first_step: int, stop_step: int, interval: int) -> int:
    """Checkpoints of the steps after `first_step`: at each interval, and at `stop_step`."""
    whole = stop_step // interval - first_step // interval
    return whole + (stop_step % interval != 0 and stop_step > first_step)


@dataclass(frozen=True)
class DiskPlan:
    """What the checkpoints of a run take on the disk of its folder; logs and plots are not counted.

    Attributes:
        folder: The run folder; need not exist.
        saves: Checkpoints to come.
        keep: `train.ckpt_keep`.
        each_bytes: Size of one.
        held: Checkpoints in the folder that stay.
        dropped: Those that are removed before the run writes its first.
    """

    folder: Path
    saves: int
    keep: int
    each_bytes: int
    held: Collection[Path] = ()
    dropped: Collection[Path] = ()

    def added_files(self, keep: int | None = None) -> int:
        """Files that are added at the fullest moment, with another `train.ckpt_keep` if given."""
        best = any((self.folder / name).is_file() for name in BEST_FILES)
        return files_to_come(
            held=len(self.held),
            saves=self.saves,
            keep=self.keep if keep is None else keep,
            best_held=best and len(self.held) > 0,
        )

    def added_bytes(self, keep: int | None = None) -> int:
        """Bytes of `added_files`."""
        return self.added_files(keep) * self.each_bytes

    def free_bytes(self) -> int | None:
        """Bytes that are free for it; None where that is not known."""
        free = free_bytes(self.folder)
        return None if free is None else free + sum(p.stat().st_size for p in self.dropped)

    def refuse(self) -> None:
        """Refuse a run whose checkpoints the disk has no room for.

        Raises:
            PippinError: P312, with a `train.ckpt_keep` that fits if there is one.
        """
        free = self.free_bytes()
        if free is None or self.added_bytes() <= free:
            return
        fits = next((k for k in range(self.keep, 0, -1) if self.added_bytes(k) <= free), None)
        remedy = f"train.ckpt_keep={fits}"
        if fits is None:
            least = fmt.gigabytes(self.added_bytes())
            remedy = f"python train.py --save-dir FOLDER   (on a disk with {least} free)"
        raise PippinError(
            "P312",
            f"the checkpoints of this run take {fmt.gigabytes(self.added_bytes())}, and the disk of "
            f"{self.folder} has {fmt.gigabytes(free)} free.",
            found=f"{self.added_files():,} files of {fmt.gigabytes(self.each_bytes)} at once, with "
            f"train.ckpt_keep={self.keep}",
            choices=("--force   (tries it all the same)",),
            remedy=remedy,
            kept="nothing was started.",
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
