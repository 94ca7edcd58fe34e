"""The `.pt` envelope of checkpoint v1, `{"meta": json, "tensors": {name: tensor}}` for torch.

The file is what `torch.save` would make of that dict, with native bfloat16:
`torch.load(path, weights_only=True, mmap=True)` reads it. It is written here byte by byte instead
for three reasons: tensors stream one at a time, `torch.save` wants all in memory together; their
checksums, which stand in the meta, are computed while they are written; and the pickle is a
function of the meta. So reading *never unpickles*: the pickle must be, byte for byte, the one that
Pippin writes, and torch, which checks no CRC, is not asked.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from core.checkpoint import Checkpoint, Meta, open_archive, write_archive

_PICKLE_MEMBER = "archive/data.pkl"
_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def _text(value: str) -> bytes:
    data = value.encode("ascii")
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tensor(index: int, shape: tuple[int, ...], dtype: str) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    size = 1
    strides: list[int] = []
    for n in reversed(shape):
        strides.insert(0, size)
        size *= n
    storage = _tuple(
        _text("storage"),
        _global("torch", _STORAGES[dtype]),
        _text(str(index)),
        _text("cpu"),
        _int(size),
    )
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = _tuple(
        storage + b"Q",
        _int(0),
        _tuple(*map(_int, shape)),
        _tuple(*map(_int, strides)),
        b"\x89",
        hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


# Protocol 2, an empty dict, and its first key; the JSON of the meta follows.
_PREFIX = b"\x80\x02}(" + _text("meta") + b"X"


def _pickle(meta: Meta) -> bytes:
    tensors = [
        _text(name) + _tensor(index, shape, meta.dtypes[name])
        for index, (name, shape) in enumerate(meta.shapes.items())
    ]
    body = _text(meta.to_json())[1:] + _text("tensors") + b"}(" + b"".join(tensors) + b"u"
    return _PREFIX + body + b"u."


class PtEnvelope:
    """See `core.checkpoint.archive.Envelope`."""

    suffix = ".pt"
    meta_member = _PICKLE_MEMBER

    def tensor_member(self, index: int, name: str) -> str:
        """Member name of a tensor: torch numbers them."""
        return f"archive/data/{index}"

    def tensor_header(self, shape: tuple[int, ...], dtype: str) -> bytes:
        """Values have no header of their own."""
        return b""

    def trailer(self, meta: Meta) -> Sequence[tuple[str, bytes]]:
        """Members after the tensors."""
        return (
            ("archive/version", b"3\n"),
            ("archive/byteorder", b"little"),
            (_PICKLE_MEMBER, _pickle(meta)),
        )

    def meta_text(self, member: bytes) -> bytes | None:
        """The JSON, which stands first in the pickle."""
        start = len(_PREFIX) + 4
        end = start + int.from_bytes(member[start - 4 : start], "little")
        return member[start:end] if member.startswith(_PREFIX) else None


_ENVELOPE = PtEnvelope()


def open_pt(path: Path) -> Checkpoint:
    """Open a `.pt` checkpoint; all but the tensors' values is checked, those at `read`.

    Raises:
        PippinError: P303 damaged, P305 newer format, P306 not a checkpoint. Nothing is unpickled.
    """
    return open_archive(path, _ENVELOPE)


def write_pt(path: Path, meta: Meta, tensors: Iterable[tuple[str, NDArray[Any]]]) -> Path:
    """Write a `.pt` checkpoint, complete or not at all; tensors are taken one at a time.

    Args:
        path: Final path; an existing file is replaced.
        meta: `dtypes`, `shapes` and `checksums` are filled in here.
        tensors: Names and float32, float16 or uint16 (bits of bfloat16) arrays, which must not
            change before the write is done.

    Raises:
        PippinError: P307 if it cannot be written.
    """
    return write_archive(path, meta, tensors, _ENVELOPE)
