"""Arrays of ids in .npy and .npz: the header compared with the file before anything is allocated."""

import io
import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from core.errors import PippinError

__all__ = ["open_npy", "open_npz"]

_DTYPES = ("uint16", "int32", "uint32")
# A compressed member cannot be mapped, so it must fit the memory.
_MAX_COMPRESSED_BYTES = 1 << 30


def open_npy(path: Path) -> NDArray[np.integer]:
    """Map an array of ids.

    Raises:
        PippinError: P202 for no .npy, objects or another dtype, P203 for a file that is not as long as
            its header says.
    """
    with path.open("rb") as stream:
        shape, dtype, offset = _header(stream, str(path))
    _check_size(str(path), shape, dtype, path.stat().st_size - offset)
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def open_npz(path: Path, names: Sequence[str]) -> list[NDArray[np.integer]]:
    """Map arrays of ids; those that are compressed are read into memory.

    Raises:
        PippinError: As `open_npy`, for each array; P203 for a missing one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [_member(archive, path, name) for name in names]
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise PippinError("P203", f"{path} is no intact .npz", found=str(error)) from error


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> NDArray[np.integer]:
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError as error:
        present = tuple(member.removesuffix(".npy") for member in archive.namelist()[:8])
        raise PippinError("P203", f"{path} has no array {name!r}", choices=present) from error
    where = f"{path}, {name}"
    with archive.open(info) as stream:
        shape, dtype, offset = _header(stream, where)
    _check_size(where, shape, dtype, info.file_size - offset)
    if 0 in shape:
        return np.zeros(shape, dtype)
    if info.compress_type == zipfile.ZIP_STORED:
        start = _data_start(path, info) + offset
        if start + math.prod(shape) * dtype.itemsize > path.stat().st_size:
            raise PippinError("P203", f"{where} reaches beyond the end of the file")
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)
    if info.file_size > _MAX_COMPRESSED_BYTES:
        raise PippinError(
            "P202",
            f"{where} is compressed and holds {info.file_size:,} bytes, too many for the memory",
            remedy="write it with numpy.savez, which does not compress",
        )
    content = archive.read(info)
    return np.frombuffer(content, dtype=dtype, offset=offset).reshape(shape)


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: its local header has a length of its own."""
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        head = stream.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise PippinError("P203", f"{path} is no intact .npz", found="a local header is missing")
    name, extra = struct.unpack("<HH", head[26:30])
    return info.header_offset + 30 + int(name) + int(extra)


def _header(stream: BinaryIO | Any, where: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and length of the header."""
    head = io.BytesIO(stream.read(12_000))
    try:
        version = np.lib.format.read_magic(head)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
        else:
            raise ValueError(f"version {version}")
    except (ValueError, SyntaxError, RecursionError, EOFError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise PippinError("P202", f"{where} is no .npy", found=first) from error
    if dtype.name not in _DTYPES or dtype.hasobject:
        raise PippinError("P202", f"{where} holds {dtype.name}, not token ids", choices=_DTYPES)
    if fortran and len(shape) > 1:
        raise PippinError("P202", f"{where} is stored by columns", remedy="numpy.ascontiguousarray")
    if any(n < 0 for n in shape):
        raise PippinError("P203", f"{where} is damaged", found=f"its shape is {shape}")
    return tuple(int(n) for n in shape), dtype, head.tell()


def _check_size(where: str, shape: tuple[int, ...], dtype: np.dtype[Any], found: int) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if needed != found:
        raise PippinError(
            "P203",
            f"{where} is damaged",
            found=f"its header says {shape} of {dtype.name}, {needed:,} bytes; it has {found:,}",
        )
