"""Bytes of files, unpacked where they are packed by gzip or zstd; what is damaged is told apart."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from core.data.reading.file_kinds import file_format
from core.errors import PippinError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFER_BYTES = 1 << 20
# Each 4 bytes of zstd unpack to at most 128 KiB, so 1 KiB to at most 32 MiB, which are held twice.
_ZSTD_BYTES = 1_024


class DamagedError(Exception):
    """A packed or parquet file is not what its name says, or ends too early."""


@dataclass
class Meter:
    """Bytes of files consumed so far, before unpacking."""

    num_bytes: int = 0


@contextmanager
def opened(path: Path, meter: Meter | None = None, *, unpack: bool = True) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked; a meter sees the packed ones.

    Raises:
        DamagedError: For a packed file that is not what its name says, or ends too early.
        PippinError: P201 for every fault of the disk or of permission; P502 for a missing package.
    """
    packed = file_format(path)[1] if unpack else ""
    seen = meter or Meter()
    try:
        with path.open("rb", buffering=0) as file:
            counted = _buffered(lambda size: _count(seen, file.read(size)))
            if packed == ".gz":
                # read1, not read: that would lose what came before damage.
                yield _buffered(gzip.GzipFile(fileobj=counted, mode="rb").read1)
            elif packed == ".zst":
                yield _buffered(_Unzstd(counted).read)
            else:
                yield counted
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        raise PippinError("P201", f"{path} cannot be read: {error.strerror or error}") from error


def _count(meter: Meter, data: bytes) -> bytes:
    meter.num_bytes += len(data)
    return data


def _buffered(read: Callable[[int], bytes]) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Raw(read), _BUFFER_BYTES))


class _Raw(io.RawIOBase):
    """A stream of what a function gives: at most as many bytes as asked for, none at the end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer", /) -> int:
        target = memoryview(buffer).cast("B")
        data = self._read(len(target))
        target[: len(data)] = data
        return len(data)


class _Unzstd:
    """The unpacked content of a zstd file of one or more frames; one that is cut short is damaged.

    The package's own reader takes a file that ends within a frame for a whole one.
    """

    def __init__(self, packed: BinaryIO) -> None:
        self._zstd = import_zstandard()
        self._packed = packed
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def read(self, size: int) -> bytes:
        while not self._output:
            self._input = self._input or self._packed.read(_ZSTD_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise DamagedError("the file ends within a zstd frame")
                return b""
            self._unpack()
        data, self._output = bytes(self._output[:size]), self._output[size:]
        return data

    def _unpack(self) -> None:
        self._frame = self._frame or self._zstd.ZstdDecompressor().decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._zstd.ZstdError as error:
            raise DamagedError(str(error)) from error
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None


def content_sha256(path: Path) -> str:
    """sha256 of a file's bytes in hex.

    Raises:
        PippinError: P201 where it cannot be read.
    """
    content = hashlib.sha256()
    with opened(path, unpack=False) as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def import_zstandard() -> Any:
    """The package, imported when first needed."""
    try:
        import zstandard
    except ImportError as error:
        raise missing_package("zstandard", "reads .zst", error) from error
    return zstandard


def missing_package(package: str, does: str, error: ImportError, version: str = "") -> PippinError:
    """P502 with the line that installs a package."""
    return PippinError(
        "P502",
        f"the package {package}, which {does}, cannot be imported: {error}",
        remedy=f"pip install '{package}{version}'",
    )
