"""Which files and folders are Pippin's own, so that nothing else is ever removed.

The folder that shards are made in may be anybody's, a home folder too. A name alone proves nothing
there: a folder is left over only where its name has the exact form, a mark of Pippin lies in it,
nobody holds its lock, and every file in it has a name that Pippin gives. Files are removed one by
one, by these names; a folder that then still holds something stays.
"""

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from core.data.preparing.shard_builder import not_writable
from core.data.shards.manifest import MANIFEST, VERIFIED
from core.errors import PippinError

PROGRESS = "progress.json"
LOCK = ".lock"
_MARK = b"a folder of Pippin: shards are being made in it\n"
_STALE_S = 24 * 3600
_STALE_WORK_S = 14 * 24 * 3600

_WORK = re.compile(r"\.work-.+-[0-9a-f]{12}\Z")
_PRIVATE = re.compile(r"\.tmp-(old-)?\d+-[0-9a-f]{8}\Z")
_DATA = re.compile(r"(train|val|test)_((weights_)?\d{5,}|offsets)\.bin\Z")
_TOKENIZER = re.compile(r"(\.tmp-\d+-)?tokenizer\.(model|json|pippin\.json)\Z")
_VERIFIED = re.compile(re.escape(VERIFIED) + r"(\.\d+)?\Z")
_FIXED = {MANIFEST, LOCK, PROGRESS, f"{PROGRESS}.tmp"}
# Written by the file manager of macOS wherever it looked.
_OF_THE_SYSTEM = {".DS_Store"}


def is_own_name(name: str) -> bool:
    """Whether Pippin gives a file this name in a folder of shards."""
    patterns = (_DATA, _TOKENIZER, _VERIFIED)
    return name in _FIXED or any(pattern.match(name) for pattern in patterns)


def foreign_names(folder: Path) -> tuple[str, ...]:
    """Names in a folder of shards that Pippin did not give, sorted."""
    return tuple(
        sorted(
            path.name
            for path in folder.iterdir()
            if path.name not in _OF_THE_SYSTEM
            and not (is_own_name(path.name) and (path.is_symlink() or path.is_file()))
        )
    )


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards by its files, though its manifest cannot be read."""
    return (folder / MANIFEST).is_file() and any(_DATA.match(p.name) for p in folder.iterdir())


def remove_folder(folder: Path) -> None:
    """Remove the files that Pippin wrote into a folder, and the folder if nothing else is in it.

    A link is removed, and what it leads to is not touched. What cannot be removed stays.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        foreign = set(foreign_names(folder))
        # The lock last: a removal that is killed is still known as one of ours.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            if path.name not in foreign:
                path.unlink(missing_ok=True)
        if not foreign:
            folder.rmdir()
    except OSError:
        return


def lock_folder(folder: Path) -> BinaryIO | None:
    """The lock of a folder, made where it is not there; None while another process holds it.

    Raises:
        PippinError: P312 where it cannot be made.
    """
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Never through a link: its content is replaced by the mark.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.fdopen(os.open(path, flags, 0o666), "r+b")
        except OSError as error:
            raise not_writable(folder, error) from error
        if not _taken(lock):
            lock.close()
            return None
        try:
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return _marked(lock, folder)
        except OSError:
            pass
        # Whoever held it has just given the folder its name, and the lock went with it.
        lock.close()


def _marked(lock: BinaryIO, folder: Path) -> BinaryIO:
    try:
        lock.write(_MARK)
        lock.truncate()
        lock.flush()
    except OSError as error:
        lock.close()
        raise not_writable(folder, error) from error
    return lock


def _taken(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def private_folder(beside: Path) -> Iterator[Path]:
    """A new folder beside another, of this process alone; it is removed again if it is still there.

    Args:
        beside: The folder that it will become.

    Raises:
        PippinError: P312 where it cannot be made.
    """
    folder = beside.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise not_writable(folder, error) from error
    lock = lock_folder(folder)
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()
        remove_folder(folder)


def remove_stale(parent: Path) -> None:
    """Remove what killed processes left in a folder and nobody went on with."""
    for pattern, age in ((_PRIVATE, _STALE_S), (_WORK, _STALE_WORK_S)):
        for path in parent.glob(".*"):
            try:
                if pattern.match(path.name) and _is_left_over(path, age):
                    _remove_unless_locked(path)
            except (OSError, PippinError):  # of another user, say: it is no hindrance
                continue


def _is_left_over(folder: Path, age_s: float) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    if time.time() - folder.stat().st_mtime <= age_s:
        return False
    return _is_marked(folder) and not foreign_names(folder)


def _is_marked(folder: Path) -> bool:
    """Whether Pippin's lock or progress lies in it, as it writes them."""
    lock = folder / LOCK
    if lock.is_file() and not lock.is_symlink() and lock.stat().st_size == len(_MARK):
        return lock.read_bytes() == _MARK
    try:  # versions before the mark wrote an empty lock
        state = json.loads((folder / PROGRESS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and set(state) == {"blocks", "amount", "splits"}


def _remove_unless_locked(folder: Path) -> None:
    lock = lock_folder(folder)
    if lock is not None:
        with lock:
            remove_folder(folder)
