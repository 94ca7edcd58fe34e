"""One token file of another program: its ids, memory-mapped, after its size was compared.

Nothing in a file is run, and nothing is allocated because a header says so.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.data.foreign.npy import open_npy, open_npz
from core.errors import PippinError

# llm.c: magic and version -> dtype and the ids that stand between documents.
LLMC = {(20240520, 1): ("<u2", (50256,)), (20240801, 7): ("<u4", (128000, 128001))}
_LLMC_HEADER_BYTES = 256 * 4
_SAMPLE = 65_536
# No vocabulary is as large as this.
_ABSURD_ID = 1 << 24
_PIECE_TOKENS = 1 << 20

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class TokenFile:
    """A file with its tokens; `first_repeats`: its first token may be the last of the file before."""

    path: Path
    runs: tuple[tuple[Ids, ...], ...]
    first_repeats: bool = False


def open_raw(path: Path, dtype: str) -> Ids:
    """A file of ids without a header.

    Raises:
        PippinError: P202 where its ids look like those of another dtype, P203 where it is truncated.
    """
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    _refuse_pointer(path)
    wide = item == 4
    if size % item:
        raise _damaged(
            path, f"{size:,} bytes are no multiple of {item}: truncated, or of other ids"
        )
    if wide and any(int(sample.max()) >= _ABSURD_ID for sample in _samples(path, "<u4")):
        raise PippinError(
            "P202",
            f"{path} does not look like uint32",
            found="its ids would reach beyond 16 million",
            remedy="--format nanogpt   (uint16)",
        )
    if not wide and looks_uint32(path):
        raise PippinError(
            "P202",
            f"{path} looks like uint32, not uint16",
            found="every second uint16 is 0 or nearly 0",
            remedy="--format nanogpt-uint32",
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _samples(path: Path, dtype: str) -> list[Ids]:
    """Beginning, middle and end of a file of ids."""
    ids = np.memmap(path, dtype=dtype, mode="r", shape=(path.stat().st_size // int(dtype[-1]),))
    middle = len(ids) // 4 * 2  # even, so that halves of uint32 stay in step
    found = (ids[:_SAMPLE], ids[middle : middle + _SAMPLE], ids[-(len(ids) % 2) - _SAMPLE :])
    return [np.asarray(sample) for sample in found if len(sample)]


def looks_uint32(path: Path) -> bool:
    """Whether these are uint32: every second uint16 is 0 or, for ids above 65,535, nearly.

    Ids of a text have the same range at even and at odd places.
    """
    samples = _samples(path, "<u2") if path.stat().st_size >= 16 else []
    if not samples:
        return False
    low, high = (max(int(sample[i::2].max()) for sample in samples) for i in (0, 1))
    if high == 0:
        return low > 0
    return len(samples[0]) >= 64 and high < 16 and low >= 256


def llmc_kind(path: Path) -> tuple[int, int] | None:
    """Magic and version of a file that has llm.c's header."""
    with path.open("rb") as stream:
        head = np.frombuffer(stream.read(8), dtype="<i4")
    kind = tuple(head.tolist())
    return kind if len(kind) == 2 and kind in LLMC else None


def open_llmc(path: Path) -> TokenFile:
    """A file with llm.c's header, which must agree with its size.

    Raises:
        PippinError: P202 for another header, P203 where header and size differ.
    """
    _refuse_pointer(path)
    kind, size = llmc_kind(path), path.stat().st_size
    if kind is None or size < _LLMC_HEADER_BYTES:
        raise PippinError(
            "P202",
            f"{path} has no header of llm.c",
            found="needed: magic 20240520 with version 1, or 20240801 with version 7",
            remedy="--format nanogpt   (no header)",
        )
    dtype = np.dtype(LLMC[kind][0])
    with path.open("rb") as stream:
        items = int(np.frombuffer(stream.read(12), dtype="<i4")[2])
    needed = _LLMC_HEADER_BYTES + items * dtype.itemsize
    if items < 0 or needed != size:
        raise _damaged(
            path, f"its header says {items:,} tokens, {needed:,} bytes; it has {size:,} bytes"
        )
    if not items:
        return TokenFile(path, ())
    ids = np.memmap(path, dtype=dtype, mode="r", offset=_LLMC_HEADER_BYTES, shape=(items,))
    return TokenFile(path, ((ids,),))


def open_anarchobot(path: Path, files: Sequence[Path]) -> list[TokenFile]:
    """Pairs of x and y, y being x one token later.

    Raises:
        PippinError: P202 for other arrays or a pickle, P203 where one of a pair is missing or they differ.
    """
    opened = []
    if path.is_file():
        partner = re.sub(r"_[xy]\.npy$", "", path.name)
        files = [path] if path.suffix == ".npz" else sorted(path.parent.glob(f"{partner}_[xy].npy"))
    present = {file for file in files}
    for file in files:
        if file.suffix == ".npz":
            _refuse_pointer(file)
            pair = open_npz(file, ("x", "y"))
        elif file.name.endswith("_x.npy"):
            other = file.with_name(file.name[: -len("x.npy")] + "y.npy")
            if other not in present:
                raise _damaged(file, f"{other.name} is missing")
            for one in (file, other):
                _refuse_pointer(one)
            pair = [open_npy(file), open_npy(other)]
        elif file.name.endswith("_y.npy"):
            if file.with_name(file.name[: -len("y.npy")] + "x.npy") not in present:
                raise _damaged(file, "its _x.npy is missing")
            continue
        elif file.suffix == ".mlx":
            raise pickle_refused(file.name)
        else:
            continue
        opened.append(TokenFile(file, _runs(file, *pair), first_repeats=True))
    return opened


def _runs(path: Path, x: Ids, y: Ids) -> tuple[tuple[Ids, ...], ...]:
    """The text of rows that overlap by a token, cut where a row does not go on from the one before."""
    if x.shape != y.shape or x.ndim != 2:
        raise _damaged(path, f"x is {x.shape} and y is {y.shape}; needed: [rows, tokens], twice")
    if x.size == 0:
        return ()
    rows = max(1, _PIECE_TOKENS // x.shape[1])
    for a in range(0, len(x), rows):
        wrong = np.any(y[a : a + rows, :-1] != x[a : a + rows, 1:], axis=1)
        if wrong.any():
            raise _damaged(path, f"row {a + int(np.argmax(wrong)):,} of y is not x one token later")
    ends = np.flatnonzero(np.append(x[1:, 0] != y[:-1, -1], True)) + 1
    firsts = [0, *ends[:-1].tolist()]
    return tuple((x[a:b].reshape(-1), y[b - 1, -1:]) for a, b in zip(firsts, ends.tolist()))


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise PippinError(
                "P202",
                f"{path} is a pointer of Git LFS, not the file itself",
                remedy="git lfs pull   (in its repository)",
            )


def pickle_refused(name: str) -> PippinError:
    """The error for a file that could only be read by running it."""
    return PippinError(
        "P202",
        f"{name} is a pickle, which would run code, so it is not opened",
        found="A .mlx of AnarchoBot is a stream of pickled rows.",
        remedy="write the ids as .npy or .bin with the program that made it",
    )


def _damaged(path: Path, found: str) -> PippinError:
    return PippinError("P203", f"{path} is damaged", found=found)
