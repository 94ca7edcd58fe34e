"""Waiting until something is on the disk itself, and not only in a cache."""

import errno
import fcntl
import os
from pathlib import Path

_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)


def flush_to_disk(fd: int) -> None:
    """fsync; on macOS F_FULLFSYNC, since fsync there leaves the data in the drive's own cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return
    os.fsync(fd)


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where its file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one piece: after a power cut, too, a reader sees the old or the new one.

    Raises:
        OSError: If the disk refuses; the old file is as it was.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            flush_to_disk(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
