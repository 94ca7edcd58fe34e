"""The file around the tensors: an uncompressed zip64 in which every bit is accounted for.

Both suffixes are such a zip; an `Envelope` says what differs. Tensors are streamed: one is hashed
in a thread while it and the next are written. All bytes but the tensors' values are a function
of the meta and the members' CRCs, so the reader builds them again and compares: a changed bit
anywhere, padding included, is found, and no size in a hostile header is believed or allocated.
Values are guarded by the sha256 in the meta.
"""

import hashlib
import os
import shlex
import struct
import zipfile
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.checkpoint import stored_zip
from core.checkpoint.atomic import atomic_file
from core.checkpoint.meta import (
    DTYPES,
    MAX_META_BYTES,
    TENSOR_NAME,
    Checkpoint,
    Meta,
    tensor_bytes,
)
from core.checkpoint.stored_zip import Member
from core.checkpoint.writer import MemberWriter
from core.errors import EXIT_FAULT, PippinError

_CHUNK_BYTES = 8 << 20
_DTYPE_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


class Envelope(Protocol):
    """What a suffix puts around tensors and meta. All of it is deterministic."""

    suffix: str
    meta_member: str

    def tensor_member(self, index: int, name: str) -> str:
        """Member name of the tensor with this index."""
        ...

    def tensor_header(self, shape: tuple[int, ...], dtype: str) -> bytes:
        """Bytes before the values."""
        ...

    def trailer(self, meta: Meta) -> Sequence[tuple[str, bytes]]:
        """Members after the tensors, whole; the last one is `meta_member`."""
        ...

    def meta_text(self, member: bytes) -> bytes | None:
        """The JSON in the member `meta_member`, or None if that is not ours."""
        ...


def write_archive(
    path: Path, meta: Meta, tensors: Iterable[tuple[str, NDArray[Any]]], envelope: Envelope
) -> Path:
    """Write a checkpoint, complete or not at all. See `core.checkpoint.npz.write_npz`."""
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    checksums: dict[str, str] = {}
    pending: deque[tuple[str, Future[str]]] = deque()
    with atomic_file(path) as fd, ThreadPoolExecutor(3) as pool:
        writer = MemberWriter(fd, pool)
        for index, (name, array) in enumerate(tensors):
            dtypes[name] = _storage_dtype(name, array, meta, seen=name in shapes)
            shapes[name] = tuple(int(n) for n in array.shape)
            header = envelope.tensor_header(shapes[name], dtypes[name])
            member_name = envelope.tensor_member(index, name)
            sha = writer.append(member_name, header, _little_endian_bytes(array))
            pending.append((name, sha))
            # Of the tensors before this one none is held when the next is made.
            while len(pending) > 1:
                earlier, sha = pending.popleft()
                checksums[earlier] = sha.result()
        checksums |= {name: sha.result() for name, sha in pending}
        final = replace(meta, dtypes=dtypes, shapes=shapes, checksums=checksums)
        for name, content in envelope.trailer(final):
            writer.append(name, b"", np.frombuffer(content, np.uint8))
        writer.write(stored_zip.directory(writer.members))
        writer.finish()
    return path


def _storage_dtype(name: str, array: NDArray[Any], meta: Meta, *, seen: bool) -> str:
    dtype = _DTYPE_NAMES.get(array.dtype.newbyteorder("<"))
    problem = ""
    if dtype is None:
        problem = f"its dtype is {array.dtype}; needed {', '.join(_DTYPE_NAMES.values())}"
    elif meta.dtypes.get(name, dtype) != dtype:
        problem = f"the meta says {meta.dtypes[name]}, the array is {dtype}"
    elif seen:
        problem = "it is there twice"
    elif not TENSOR_NAME.match(name):
        problem = "its name is not canonical"
    if dtype is None or problem:
        raise PippinError(
            "P001", f"tensor {name!r} cannot be saved: {problem}.", exit_code=EXIT_FAULT
        )
    return dtype


def _little_endian_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    plain = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return plain.reshape(-1).view(np.uint8)


class ArchiveCheckpoint:
    """An open checkpoint file. See `core.checkpoint.meta.Checkpoint`."""

    def __init__(self, path: Path, file: IO[bytes], meta: Meta, offsets: dict[str, int]) -> None:
        self.path = path
        self.meta = meta
        self.names = tuple(meta.shapes)
        self._file = file
        self._offsets = offsets

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.meta.shapes[name]

    def dtype(self, name: str) -> str:
        """Storage dtype of a tensor."""
        return self.meta.dtypes[name]

    def read(self, name: str) -> NDArray[Any]:
        """Read a tensor and compare its checksum."""
        out = np.empty(self.shape(name), np.dtype(DTYPES[self.dtype(name)]))
        view = out.reshape(-1).view(np.uint8).data
        sha = hashlib.sha256()
        done = 0
        while done < len(view):
            chunk = view[done : done + _CHUNK_BYTES]
            count = os.preadv(self._file.fileno(), [chunk], self._offsets[name] + done)
            if count == 0:
                raise damaged(self.path, f"tensor {name}: the file ends inside it")
            sha.update(chunk[:count])
            done += count
        if sha.hexdigest() != self.meta.checksums[name]:
            raise damaged(
                self.path,
                f"tensor {name}: sha256 is {sha.hexdigest()}, needed {self.meta.checksums[name]}",
            )
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_archive(path: Path, envelope: Envelope) -> Checkpoint:
    """Open a checkpoint; checks every byte but the tensors' values. See `open_npz`."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise PippinError(
            "P306",
            f"{path} cannot be opened: {error.strerror}.",
            remedy=f"ls -l {shlex.quote(str(path))}   (is it there, and may you read it)",
            kept="nothing was changed.",
        ) from error
    try:
        return _open(path, file, envelope)
    except OSError as error:
        file.close()
        raise damaged(path, f"reading failed: {error.strerror}") from error
    except BaseException:
        file.close()
        raise


def _open(path: Path, file: IO[bytes], envelope: Envelope) -> Checkpoint:
    start = os.pread(file.fileno(), 4, 0)
    if not start:
        raise damaged(path, "the file is empty")
    if start != stored_zip.LOCAL_SIGNATURE:
        raise foreign(path, f"it begins with {start!r}, so it is no zip")
    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(path, archive.infolist(), os.fstat(file.fileno()).st_size)
            content = _meta_member(path, archive, envelope)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, struct.error) as error:
        raise damaged(path, f"the zip cannot be read ({error}): truncated?") from error
    text = envelope.meta_text(content)
    if text is None:
        raise foreign(path, f"member {envelope.meta_member} holds no meta of Pippin")
    meta = Meta.from_json(text.decode("ascii", "replace"), source=str(path))
    offsets = _check_layout(path, file.fileno(), members, meta, envelope)
    return ArchiveCheckpoint(path, file, meta, offsets)


def _members(path: Path, infos: Sequence[zipfile.ZipInfo], size: int) -> list[Member]:
    """The zip's members, each at the place where the writer would have put it."""
    members: list[Member] = []
    for info in infos:
        shown = info.filename[:80]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise foreign(path, f"member {shown!r} is compressed or encrypted")
        if not info.filename.isascii():
            raise foreign(path, f"member name {shown!r} is not ASCII")
        if info.file_size > size:
            raise damaged(path, f"member {shown!r} has {info.file_size:,} bytes")
        offset = members[-1].end if members else 0
        members.append(Member(info.filename, offset, info.file_size, info.CRC))
    return members


def _meta_member(path: Path, archive: zipfile.ZipFile, envelope: Envelope) -> bytes:
    infos = archive.infolist()
    if not infos or infos[-1].filename != envelope.meta_member:
        raise foreign(path, f"its last member is not {envelope.meta_member}")
    if infos[-1].file_size > 2 * MAX_META_BYTES:
        raise foreign(path, f"its meta has {infos[-1].file_size:,} bytes")
    return archive.read(infos[-1])


def _check_layout(
    path: Path, fd: int, members: Sequence[Member], meta: Meta, envelope: Envelope
) -> dict[str, int]:
    """Compare all but the values with what the writer writes; returns the values' offsets."""
    trailer = envelope.trailer(meta)
    names = list(meta.shapes)
    expected = [envelope.tensor_member(i, name) for i, name in enumerate(names)]
    expected += [name for name, _ in trailer]
    found = [m.name for m in members]
    if found != expected:
        odd = sorted(set(found) ^ set(expected)) or ["their order"]
        raise damaged(path, f"members differ from the meta: {', '.join(odd[:5])}")
    offsets = {}
    for name, member in zip(names, members):
        header = envelope.tensor_header(meta.shapes[name], meta.dtypes[name])
        needed = len(header) + tensor_bytes(meta.shapes[name], meta.dtypes[name])
        if member.size != needed:
            raise damaged(path, f"tensor {name}: {member.size:,} bytes, needed {needed:,}")
        _compare(path, fd, member.offset, member.local_header() + header, f"header of {name}")
        offsets[name] = member.data_offset + len(header)
    for (name, content), member in zip(trailer, members[len(names) :]):
        if member.size != len(content):
            raise damaged(path, f"member {name}: {member.size:,} bytes, needed {len(content):,}")
        _compare(path, fd, member.offset, member.local_header() + content, f"member {name}")
    tail = stored_zip.directory(members)
    _compare(path, fd, members[-1].end, tail, "the zip's directory")
    if os.fstat(fd).st_size != members[-1].end + len(tail):
        raise damaged(path, "there are bytes after the zip's end")
    return offsets


def _compare(path: Path, fd: int, offset: int, expected: bytes, what: str) -> None:
    found = os.pread(fd, len(expected), offset)
    if found == expected:
        return
    if b"'descr': '|O'" in found:
        raise foreign(path, f"{what} asks for Python objects, which could run code")
    raise damaged(path, f"{what} differs from what the meta requires")


def damaged(path: Path, found: str) -> PippinError:
    """P303 with the size of the file."""
    return PippinError(
        "P303",
        f"the checkpoint {path} is damaged.",
        found=f"{found}\nfile size {_size(path)}",
        remedy="take another checkpoint of the run, or a copy of this one",
        kept="nothing was changed.",
    )


def foreign(path: Path, found: str) -> PippinError:
    """P306: nothing of the file was run."""
    return PippinError(
        "P306",
        f"{path} is not a Pippin checkpoint.",
        found=f"{found}\nfile size {_size(path)}",
        remedy="give a step_*.npz or step_*.pt of a run, or the run's folder",
        kept="nothing in it was run.",
    )


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size:,} bytes"
    except OSError:
        return "unknown"
