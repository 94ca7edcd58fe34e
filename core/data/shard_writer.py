"""Writing shards: documents in, files of tokens out, hashed on the way, in little memory."""

import hashlib
import os
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from core.data.shards import FileInfo, SplitInfo
from core.data.split import Split
from core.errors import PippinError

SHARD_TOKENS = 100_000_000


class SplitWriter:
    """Writes one split into files of `shard_tokens` tokens. A document may lie across two files."""

    def __init__(
        self, folder: Path, split: Split, dtype: str, *, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        """Write files `<split>_00000.bin`, ... and `<split>_offsets.bin` into a folder.

        Args:
            folder: Exists, and is not yet read by anyone.
            split: Name of the split.
            dtype: "uint16" or "uint32".
            shard_tokens: Tokens of each file but the last.
        """
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._files: list[FileInfo] = []
        self._current: _FileWriter | None = None
        self._offsets = array("q", [0])
        self._text_bytes = 0
        self._entropy_bits: float | None = 0.0
        self.max_id = 0

    def add(self, ids: NDArray[np.uint32], text_bytes: int, entropy_bits: float | None) -> None:
        """Append a document.

        Args:
            ids: uint32 `[n]`, n >= 1, the end-of-document id included.
            text_bytes: Bytes of its text.
            entropy_bits: Of its text, None where not known.

        Raises:
            PippinError: P204 for an id that the dtype cannot hold, P312 where the disk is full.
        """
        largest = int(ids.max())
        if largest > np.iinfo(self._dtype).max:
            raise PippinError("P204", f"token id {largest} does not fit {self._dtype.name}")
        self.max_id = max(self.max_id, largest)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += text_bytes
        if self._entropy_bits is None or entropy_bits is None:
            self._entropy_bits = None
        else:
            self._entropy_bits += entropy_bits
        rest = ids.astype(self._dtype)
        while len(rest):
            rest = self._append(rest)

    def finish(self) -> SplitInfo:
        """Write what is left and the offsets."""
        self._end_file()
        offsets = np.frombuffer(self._offsets, dtype=np.int64).astype("<i8")
        file = _FileWriter(self._folder / f"{self._split}_offsets.bin")
        file.write(offsets.tobytes(), len(offsets))
        return SplitInfo(
            files=tuple(self._files),
            offsets=file.finish(),
            tokens=self._offsets[-1],
            documents=len(self._offsets) - 1,
            text_bytes=self._text_bytes,
            entropy_bits=self._entropy_bits if len(self._offsets) > 1 else None,
        )

    def close(self) -> None:
        """Close an unfinished file; for when something went wrong."""
        if self._current is not None:
            self._current.close()

    def _append(self, ids: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        """Write what fits the current file; returns the rest."""
        if self._current is None:
            name = f"{self._split}_{len(self._files):05d}.bin"
            self._current = _FileWriter(self._folder / name)
        now = ids[: self._shard_tokens - self._current.items]
        self._current.write(now.tobytes(), len(now))
        if self._current.items == self._shard_tokens:
            self._end_file()
        return ids[len(now) :]

    def _end_file(self) -> None:
        if self._current is not None:
            self._files.append(self._current.finish())
            self._current = None


class _FileWriter:
    """One new file with its sha256."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self.items = 0
        self._bytes = 0
        try:
            self._stream: BinaryIO = path.open("xb")
        except OSError as error:
            raise not_writable(path, error) from error

    def write(self, content: bytes, items: int) -> None:
        self._digest.update(content)
        self.items += items
        self._bytes += len(content)
        try:
            self._stream.write(content)
        except OSError as error:
            raise not_writable(self._path, error) from error

    def finish(self) -> FileInfo:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
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
    """Write a new file and wait until it is on the disk.

    Raises:
        PippinError: P312 where it cannot be written.
    """
    file = _FileWriter(path)
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
        remedy="data.shards_dir=FOLDER, on a disk with room",
        kept="No shards were left half written.",
    )
