"""Token files of other programs, found and checked: nanoGPT, llm.c, AnarchoBot, MyPT.

Files are memory-mapped and nothing in them is run: a pickle is never opened. What a file says of itself
(a header, a shape) is compared with its size before anything is allocated. Symbolic links and names
that begin with a dot are left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.data.foreign.files import (
    LLMC,
    TokenFile,
    llmc_kind,
    looks_uint32,
    open_anarchobot,
    open_llmc,
    open_raw,
    pickle_refused,
)
from core.data.split import SPLITS, Split
from core.errors import PippinError

__all__ = ["FORMATS", "Foreign", "TokenArrays", "detect", "read_foreign"]

FORMATS: dict[str, str] = {
    "nanogpt": "*.bin, uint16 without a header (nanoGPT)",
    "nanogpt-uint32": "*.bin, uint32 without a header",
    "llmc": "*.bin with llm.c's header (llm.c, modded-nanogpt)",
    "anarchobot": "shard_00000_x.npy with shard_00000_y.npy, or .npz with x and y (AnarchoBot)",
    "mypt": "train/ and val/ with shard_00000.bin, uint32 (MyPT)",
}

_MYPT_FILES = ("tokenizer_state.json", "dataset_metadata.json")
_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
Ids = NDArray[np.integer]


@dataclass(frozen=True)
class TokenArrays:
    """The tokens of one split.

    Attributes:
        parts: Memory-mapped arrays of ids, each `[n]`.
        follows: Whether each part goes on where the one before it ended; else a document ends there.
    """

    parts: tuple[Ids, ...]
    follows: tuple[bool, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(len(part) for part in self.parts)

    @property
    def breaks(self) -> NDArray[np.int64]:
        """Positions at which a part begins that does not follow, int64."""
        starts = np.cumsum([0, *(len(part) for part in self.parts)])[:-1]
        breaks: NDArray[np.int64] = starts[~np.array(self.follows, dtype=bool)].astype(np.int64)
        return breaks


@dataclass(frozen=True)
class Foreign:
    """Token files of another program.

    Attributes:
        format: A key of `FORMATS`.
        path: What was asked for.
        files: What is read, sorted.
        splits: The tokens; "train" where the names of the files say nothing.
        dtype: Of the ids.
        eos_candidates: Ids that the program puts between documents, most likely first.
        notes: What was ignored or guessed, in words.
    """

    format: str
    path: Path
    files: tuple[Path, ...]
    splits: Mapping[Split, TokenArrays]
    dtype: str
    eos_candidates: tuple[int, ...]
    notes: tuple[str, ...]


def detect(path: Path) -> str:
    """The format of a file or folder, by headers, names and sizes.

    Raises:
        PippinError: P201 where there is nothing known, P202 for pickles.
    """
    files, _ = _files(path)
    names = {file.name for file in files}
    if path.is_dir() and any(name in names for name in _MYPT_FILES):
        return "mypt"
    if any(re.search(r"_x\.npy$|\.npz$", name) for name in names) or path.suffix == ".npy":
        return "anarchobot"
    binaries = [file for file in files if _is_tokens(file)]
    if any(llmc_kind(file) for file in binaries):
        return "llmc"
    if binaries and all(re.fullmatch(r"shard_\d+\.bin", f.name) for f in binaries):
        return "mypt"
    if binaries:
        wide = looks_uint32(binaries[0]) and binaries[0].stat().st_size % 4 == 0
        return "nanogpt-uint32" if wide else "nanogpt"
    pickles = sorted(name for name in names if name.endswith((".mlx", ".pkl", ".pt")))
    if pickles:
        raise pickle_refused(pickles[0])
    known = "\n".join(f"{name}: {what}" for name, what in FORMATS.items())
    raise PippinError("P201", f"no token files are known in {path}", found=f"looked for\n{known}")


def read_foreign(path: Path, format: str | None = None) -> Foreign:
    """Open and check token files; nothing but headers and what must be compared is read.

    Args:
        path: A file or folder.
        format: A key of `FORMATS`; None finds it out.

    Raises:
        PippinError: P201 where there is nothing to read, P202 for another format or a pickle, P203 for
            truncated or contradictory files, P010 for an unknown format.
    """
    if format is not None and format not in FORMATS:
        raise PippinError("P010", f"there is no format {format!r}", choices=tuple(FORMATS))
    files, links = _files(path)
    name = format or detect(path)
    notes = [f"{links:,} symbolic links were left out"] if links else []
    if format is None and name == "nanogpt-uint32":
        notes.append("every second uint16 is 0 or nearly 0, so the ids are read as uint32")
    eos: tuple[int, ...] = (50256,)
    if name == "anarchobot":
        opened, eos = open_anarchobot(path, files), (3,)
    else:
        binaries = [file for file in files if _is_tokens(file)]
        if name == "llmc":
            opened = [open_llmc(file) for file in binaries]
            eos = LLMC[llmc_kind(binaries[0]) or (20240520, 1)][1] if binaries else eos
        else:
            dtype = "<u2" if name == "nanogpt" else "<u4"
            opened = [TokenFile(f, ((open_raw(f, dtype),),)) for f in binaries if not _is_empty(f)]
        notes += _ignored(files, name)
    if not opened:
        raise PippinError("P201", f"{path} holds no tokens of {FORMATS[name]}")
    splits, found = _joined(path, opened)
    dtypes = {part.dtype.name for arrays in splits.values() for part in arrays.parts}
    return Foreign(
        format=name,
        path=path,
        files=tuple(file.path for file in opened),
        splits=splits,
        dtype=", ".join(sorted(dtypes)),
        eos_candidates=eos,
        notes=(*notes, *found),
    )


def _files(path: Path) -> tuple[list[Path], int]:
    """Regular files of a path and of the folders just below it, and how many links were left out."""
    if path.is_file():
        return [path], 0
    if not path.is_dir():
        raise PippinError("P201", f"there is no file or folder {path}")
    found, links = [], 0
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            links += 1
        elif entry.is_file():
            found.append(entry)
        elif entry.is_dir():
            below = [e for e in sorted(entry.iterdir()) if not e.name.startswith(".")]
            links += sum(e.is_symlink() for e in below)
            found += [e for e in below if e.is_file() and not e.is_symlink()]
    if any(file.name == "manifest.json" for file in found if file.parent == path):
        content = (path / "manifest.json").read_bytes()[:2_000]
        if b"pippin-shards" in content:
            raise PippinError("P010", f"{path} is a folder of Pippin's own shards already")
    return found, links


def _is_tokens(path: Path) -> bool:
    return path.suffix == ".bin" and not re.search(r"(?:^|_)mask\.bin$", path.name)


def _is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def _ignored(files: Sequence[Path], format: str) -> list[str]:
    """What lies beside the tokens and is not read, in words."""
    notes = []
    for file in files:
        if file.suffix in (".pkl", ".mlx"):
            notes.append(f"{file.name} was ignored: it is a pickle, which would run code")
        elif re.search(r"(?:^|_)mask\.bin$", file.name):
            notes.append(f"{file.name} was ignored: masks are not read")
        elif file.suffix == ".bin" and _is_empty(file):
            notes.append(f"{file.name} is empty")
        elif format == "mypt" and file.name in _MYPT_FILES:
            notes += _described(file)
    return notes


def _described(path: Path) -> list[str]:
    """What MyPT's own description says of the tokenizer, for the user to compare."""
    try:
        if path.stat().st_size > 1_000_000:
            raise ValueError("larger than 1 MB")
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return [f"{path.name} was ignored: {str(error).splitlines()[0]}"]
    keys = ("token_kind", "base_vocab_size", "model_vocab_size", "vocab_size")
    said = [f"{key} {data[key]}" for key in keys if isinstance(data, dict) and key in data]
    return [f"{path.name}: {', '.join(said)}"] if said else []


def _joined(path: Path, files: Sequence[TokenFile]) -> tuple[dict[Split, TokenArrays], list[str]]:
    """The files of each split, one after the other, and what is to be said of them."""
    notes, splits = [], {}
    by_split: dict[Split, list[TokenFile]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.path, path), []).append(file)
    for split in SPLITS:
        parts: list[Ids] = []
        follows: list[bool] = []
        before: TokenFile | None = None
        gaps, breaks = 0, 0
        for file in sorted(by_split.get(split, []), key=lambda f: _order(f.path)):
            step = None if before is None else _step(before.path, file.path)
            gaps += max(0, (step or 1) - 1)
            goes_on = step == 1
            for i, run in enumerate(file.runs):
                starts_on = goes_on and i == 0
                if starts_on and file.first_repeats:
                    starts_on = bool(parts) and parts[-1][-1] == run[0][0]
                    if starts_on:  # that token is the last target of the file before
                        del parts[-1], follows[-1]
                breaks += i > 0
                parts += run
                follows += [starts_on, *[True] * (len(run) - 1)]
            before = file
        if gaps:
            notes.append(f"{gaps:,} files are missing in the numbering of {split}")
        if breaks:
            notes.append(f"{breaks:,} rows of {split} do not go on from the row before")
        if parts:
            splits[split] = TokenArrays(tuple(np.asarray(p) for p in parts), tuple(follows))
    return splits, notes


def _split_of(file: Path, root: Path) -> Split:
    """By the name of the file or of its folder; a file alone or one that says nothing is training."""
    if file == root:
        return "train"
    names = [file.stem, *([file.parent.name] if file.parent != root else [])]
    for name in names:
        for word in re.findall(r"[a-z]+", name.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _order(path: Path) -> tuple[str, str, int]:
    prefix, number = _numbered(path)
    return str(path.parent), prefix, -1 if number is None else number


def _numbered(path: Path) -> tuple[str, int | None]:
    """What comes before the number in a name, and the number."""
    found = re.fullmatch(r"(.*?)(\d+)(?:_x)?", path.stem)
    return (found.group(1), int(found.group(2))) if found else (path.stem, None)


def _step(before: Path, after: Path) -> int | None:
    """By how much the number grows, where both are of one numbering."""
    (a, i), (b, j) = _numbered(before), _numbered(after)
    same = a == b and before.parent == after.parent and i is not None and j is not None
    return j - i if same and i is not None and j is not None else None
