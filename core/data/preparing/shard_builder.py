"""Writing shards: tokens in, hashed files out, in little memory, and able to go on after a kill.

What `sync` returned is on the disk: a builder that starts from that state cuts its files there and
writes the very bytes that an undisturbed one would have written.
"""

import errno
import hashlib
import shlex
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from core.data.shards.manifest import FileInfo, SplitInfo
from core.data.split import Split
from core.durable import flush_to_disk
from core.errors import PippinError

SHARD_TOKENS = 100_000_000

State = dict[str, Any]


class SplitBuilder:
    """Writes one split into files of `shard_tokens` tokens. A document may lie across files."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        dtype: str,
        *,
        shard_tokens: int = SHARD_TOKENS,
        weighted: bool = False,
        state: State | None = None,
    ) -> None:
        """Write `<split>_00000.bin`, ..., `<split>_offsets.bin` into a folder.

        Args:
            folder: Exists, and is not yet read by anyone.
            split: Name of the split.
            dtype: "uint16" or "uint32".
            shard_tokens: Tokens of each file but the last.
            weighted: Write `<split>_weights_00000.bin`, ... too.
            state: What `sync` returned, to go on from there.

        Raises:
            PippinError: P203 where a file is shorter than the state says.
        """
        self._dtype = np.dtype(dtype).newbyteorder("<")
        held = state or {}
        self._ids = _Files(folder, split, self._dtype, shard_tokens, held.get("ids"))
        self._weights = None
        if weighted:
            name = f"{split}_weights"
            self._weights = _Files(folder, name, np.dtype("u1"), shard_tokens, held.get("weights"))
        offsets = folder / f"{split}_offsets.bin"
        self._offsets = _HashedFile(offsets, held.get("offsets"))
        self._documents = int(held.get("documents", 0))
        self.tokens = int(held.get("tokens", 0))
        self._trained = int(held.get("trained", 0))
        self._text_bytes = int(held.get("text_bytes", 0))
        self._entropy_bits: float | None = held.get("entropy_bits", 0.0)
        self.max_id = int(held.get("max_id", 0))
        if state is None:
            self._offsets.write(np.zeros(1, "<i8").tobytes(), 1)

    def add(
        self,
        ids: NDArray[np.unsignedinteger],
        ends: NDArray[np.int64],
        *,
        text_bytes: int,
        entropy_bits: float | None,
        weights: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append tokens, in which documents end.

        Args:
            ids: `[n]`, the end-of-document ids included.
            ends: int64 `[k]`, after which of them a document ends: 1 to n, rising. What follows the
                last one belongs to a document that goes on with the next call.
            text_bytes: Bytes of their text.
            entropy_bits: Of the text, None where not known.
            weights: uint8 `[n]`, 1 where a token is a target that counts; None: everywhere.

        Raises:
            PippinError: P204 for an id that the dtype cannot hold, P312 where the disk is full.
        """
        if len(ids) == 0:
            return
        largest = int(ids.max())
        if largest > np.iinfo(self._dtype).max:
            raise PippinError("P204", f"token id {largest} does not fit {self._dtype.name}")
        self.max_id = max(self.max_id, largest)
        self._ids.write(ids)
        if self._weights is not None:
            counted = np.ones(len(ids), np.uint8) if weights is None else weights
            self._weights.write(counted)
            self._trained += int(np.count_nonzero(counted))
        else:
            self._trained += len(ids)
        if len(ends):
            self._offsets.write((ends + self.tokens).astype("<i8").tobytes(), len(ends))
        self.tokens += len(ids)
        self._documents += len(ends)
        self._text_bytes += text_bytes
        if self._entropy_bits is None or entropy_bits is None:
            self._entropy_bits = None
        else:
            self._entropy_bits += entropy_bits

    def sync(self) -> State:
        """Wait until everything is on the disk, and return where that is, as JSON can hold it."""
        return {
            "ids": self._ids.sync(),
            "weights": None if self._weights is None else self._weights.sync(),
            "offsets": self._offsets.sync(),
            "documents": self._documents,
            "tokens": self.tokens,
            "trained": self._trained,
            "text_bytes": self._text_bytes,
            "entropy_bits": self._entropy_bits,
            "max_id": self.max_id,
        }

    def finish(self) -> SplitInfo:
        """Close the files and describe them."""
        return SplitInfo(
            files=self._ids.finish(),
            weights=() if self._weights is None else self._weights.finish(),
            offsets=self._offsets.finish(),
            tokens=self.tokens,
            trained_tokens=self._trained,
            documents=self._documents,
            text_bytes=self._text_bytes,
            entropy_bits=self._entropy_bits if self._documents else None,
        )

    def close(self) -> None:
        """Close unfinished files; for when something went wrong."""
        for files in (self._ids, self._weights, self._offsets):
            if files is not None:
                files.close()


class _Files:
    """A sequence of files of at most `limit` items each."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype[Any], limit: int, state: State | None
    ) -> None:
        self._folder, self._name, self._dtype, self._limit = folder, name, dtype, limit
        held = state or {"done": [], "current": None}
        self._done = [FileInfo.model_validate(info) for info in held["done"]]
        for info in self._done:
            _require_size(folder / info.name, info.bytes)
        self._current: _HashedFile | None = None
        if held["current"] is not None:
            self._current = _HashedFile(self._path(), held["current"])

    def _path(self) -> Path:
        return self._folder / f"{self._name}_{len(self._done):05d}.bin"

    def write(self, items: NDArray[Any]) -> None:
        rest = items.astype(self._dtype)
        while len(rest):
            if self._current is None:
                self._current = _HashedFile(self._path())
            now = rest[: self._limit - self._current.items]
            self._current.write(now.tobytes(), len(now))
            if self._current.items == self._limit:
                self._end()
            rest = rest[len(now) :]

    def _end(self) -> None:
        if self._current is not None:
            self._done.append(self._current.finish())
            self._current = None

    def sync(self) -> State:
        return {
            "done": [info.model_dump() for info in self._done],
            "current": None if self._current is None else self._current.sync(),
        }

    def finish(self) -> tuple[FileInfo, ...]:
        self._end()
        return tuple(self._done)

    def close(self) -> None:
        if self._current is not None:
            self._current.close()


def _require_size(path: Path, size: int) -> None:
    """A finished file that a resumed build counts on must still be there, whole."""
    found = path.stat().st_size if path.is_file() else -1
    if found != size:
        state = "is gone" if found < 0 else f"has {found:,} bytes"
        raise PippinError("P203", f"{path} {state}, and {size:,} bytes were written")


class _HashedFile:
    """One file with its sha256; with a state, the file of that state, cut to its length."""

    def __init__(self, path: Path, state: State | None = None) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self.items = self._bytes = 0
        try:
            self._stream: BinaryIO = path.open("wb" if state is None else "r+b")
            if state is not None:
                self._go_on(int(state["items"]), int(state["bytes"]))
        except OSError as error:
            raise not_writable(path, error) from error

    def _go_on(self, items: int, size: int) -> None:
        left = size
        while left and (block := self._stream.read(min(left, 1 << 20))):
            self._digest.update(block)
            left -= len(block)
        if left:
            raise PippinError("P203", f"{self._path} is shorter than the {size:,} bytes written")
        self._stream.seek(size)
        self._stream.truncate()
        self.items, self._bytes = items, size

    def write(self, content: bytes, items: int) -> None:
        try:
            self._stream.write(content)
        except OSError as error:
            raise not_writable(self._path, error) from error
        self._digest.update(content)
        self.items += items
        self._bytes += len(content)

    def sync(self) -> State:
        try:
            self._stream.flush()
            flush_to_disk(self._stream.fileno())
        except OSError as error:
            raise not_writable(self._path, error) from error
        return {"items": self.items, "bytes": self._bytes}

    def finish(self) -> FileInfo:
        self.sync()
        try:
            self._stream.close()
        except OSError as error:
            raise not_writable(self._path, error) from error
        return FileInfo(
            name=self._path.name,
            items=self.items,
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
        )

    def close(self) -> None:
        try:
            self._stream.close()
        except OSError:
            return


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk.

    Raises:
        PippinError: P312 where it cannot be written.
    """
    file = _HashedFile(path)
    try:
        file.write(content, 1)
        file.finish()
    finally:
        file.close()


def not_writable(path: Path, error: OSError) -> PippinError:
    """The error for a full disk or a folder that may not be written."""
    return PippinError(
        "P312",
        f"{path} cannot be written: {error.strerror or error}",
        remedy="another folder, or its permissions: ls -ld " + shlex.quote(str(path.parent))
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        else "make room and type the same again; or a folder on a disk with room",
        kept="What was finished before is untouched, and no shards are half written.",
    )
