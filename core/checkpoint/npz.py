"""The `.npz` envelope: one `<name>.npy` for each tensor, then `__meta__.npy`, the JSON as bytes.

`numpy.load(path, allow_pickle=False)` reads it. Bytes, because a unicode array makes `mx.load`
refuse the whole file. The `.npy` headers are written here, so that they never vary with numpy.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from core.checkpoint.archive import open_archive, write_archive
from core.checkpoint.meta import DTYPES, Checkpoint, Meta

_META_MEMBER = "__meta__.npy"
_MAGIC = b"\x93NUMPY\x01\x00"


def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """A version 1.0 `.npy` header; its length is a multiple of 64."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}, }}"
    length = -(-(len(_MAGIC) + 2 + len(text) + 1) // 64) * 64 - len(_MAGIC) - 2
    return _MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


class NpzEnvelope:
    """See `core.checkpoint.archive.Envelope`."""

    suffix = ".npz"
    meta_member = _META_MEMBER

    def tensor_member(self, index: int, name: str) -> str:
        """Member name of a tensor."""
        return f"{name}.npy"

    def tensor_header(self, shape: tuple[int, ...], dtype: str) -> bytes:
        """Bytes before the values."""
        return npy_header(DTYPES[dtype], shape)

    def trailer(self, meta: Meta) -> Sequence[tuple[str, bytes]]:
        """Members after the tensors."""
        text = meta.to_json().encode()
        return ((_META_MEMBER, npy_header("|u1", (len(text),)) + text),)

    def meta_text(self, member: bytes) -> bytes | None:
        """The JSON in the member `meta_member`, or None if there is none."""
        start = 10 + int.from_bytes(member[8:10], "little")
        return member[start:] if member.startswith(_MAGIC) else None


_ENVELOPE = NpzEnvelope()


def open_npz(path: Path) -> Checkpoint:
    """Open a `.npz` checkpoint; all but the tensors' values is checked, those at `read`.

    Raises:
        PippinError: P303 damaged, P305 newer format, P306 not a checkpoint.
    """
    return open_archive(path, _ENVELOPE)


def write_npz(path: Path, meta: Meta, tensors: Iterable[tuple[str, NDArray[Any]]]) -> Path:
    """Write a `.npz` checkpoint, complete or not at all; tensors are taken one at a time.

    Args:
        path: Final path; an existing file is replaced.
        meta: `dtypes`, `shapes` and `checksums` are filled in here.
        tensors: Names and float32, float16 or uint16 (bits of bfloat16) arrays, which must not
            change before the write is done.

    Raises:
        PippinError: P307 if it cannot be written.
    """
    return write_archive(path, meta, tensors, _ENVELOPE)
