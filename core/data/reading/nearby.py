"""Which files hold text: those that an input names, and what lies near one that names none."""

import difflib
import fnmatch
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from core.data.preparing.split import Split
from core.errors import PippinError

_FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
PACKED = (".gz", ".zst")
# Parquet is packed inside: around it, .gz would only hide the index at its end.
FILE_KINDS = (*_FORMATS, *(f"{s}{p}" for s in _FORMATS if s != ".parquet" for p in PACKED))
KINDS_IN_WORDS = f"{' '.join(_FORMATS)}, and all but parquet also with {' or '.join(PACKED)}"
# Kinds for which "not UTF-8" would be a poor explanation.
_OTHER_KINDS = frozenset(
    ".7z .arrow .bin .bz2 .docx .epub .npy .npz .pdf .pt .safetensors .tar .tgz .xz .zip".split()
)

_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "valid": "val",
    "val": "val",
    "validation": "val",
    "test": "test",
}
_MAX_LOOKED_AT = 2_000


@dataclass(frozen=True)
class InputFile:
    """One file to read.

    Attributes:
        path: Where it is.
        name: Its name below the input, for messages and the fingerprint.
        split: Where the file's name decides it, else None.
    """

    path: Path
    name: str
    split: Split | None = None


@dataclass(frozen=True)
class Found:
    """The files of some inputs.

    Attributes:
        files: In the order in which they are read.
        skipped_links: Links that lead out of a folder, to folders or to nothing.
        skipped_readmes: README files beside train.* and valid.*.
    """

    files: tuple[InputFile, ...]
    skipped_links: int = 0
    skipped_readmes: int = 0


def file_format(path: Path) -> tuple[str, str]:
    """Format and packing of a file by its name.

    Returns:
        "text", "jsonl", "csv" or "parquet", and "", ".gz" or ".zst". What is unknown is text.
    """
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    inner = Path(path.stem) if packed else path
    return _FORMATS.get(inner.suffix.lower(), "text"), packed


def find_files(given: Path) -> Found:
    """The files of one input: a file, a folder, or a pattern such as `data/**/*.jsonl`.

    Raises:
        PippinError: P201 where there is nothing to read, with what lies nearby.
    """
    if given.is_dir():
        found = _of_folder(given)
        if not found.files:
            hidden = f"; {found.skipped_links} links were not followed"
            raise PippinError(
                "P201",
                f"no text found in {given}",
                found=f"looked for {KINDS_IN_WORDS}{hidden if found.skipped_links else ''}",
                choices=nearby_text(given),
            )
        return found
    if given.is_file():
        _check_kind(given)
        return Found((InputFile(given, given.name),))
    if not any(mark in str(given) for mark in "*?["):
        raise PippinError("P201", f"there is no file or folder {given}", choices=nearby_text(given))
    found = _of_pattern(given)
    if not found.files:
        raise PippinError(
            "P201",
            f"no file matches {given}",
            found="* stands for names within a folder, ** for folders; give the pattern in quotes",
            choices=nearby_text(_fixed_part(given)),
        )
    return found


def _of_folder(root: Path) -> Found:
    paths, skipped = _below(root, FILE_KINDS)
    splits = _named_splits(root, paths)
    if not splits:
        return Found(tuple(InputFile(p, p.relative_to(root).as_posix()) for p in paths), skipped)
    files = tuple(InputFile(p, p.name, splits[p]) for p in paths if p in splits)
    return Found(files, skipped, len(paths) - len(files))


def _named_splits(root: Path, paths: list[Path]) -> dict[Path, Split]:
    """The splits of a folder that holds train.* and others of that kind, and a README at most."""
    data = [path for path in paths if _stem(path) != "readme"]
    if any(path.parent != root or _stem(path) not in _SPLIT_NAMES for path in data):
        return {}
    splits = {path: _SPLIT_NAMES[_stem(path)] for path in data}
    return splits if "train" in splits.values() and len(set(splits.values())) > 1 else {}


def _stem(path: Path) -> str:
    packed = path.suffix.lower() in PACKED
    return (Path(path.stem).stem if packed else path.stem).lower()


def _of_pattern(pattern: Path) -> Found:
    """A pattern that names a suffix takes all files of it; `*` takes what is known to be text."""
    root = _fixed_part(pattern)
    parts = pattern.parts[len(root.parts) :] if root != Path() else pattern.parts
    kinds = () if "." in parts[-1].rstrip("*") else FILE_KINDS
    if not root.is_dir():
        raise PippinError("P201", f"there is no folder {root}", choices=nearby_text(root))
    depth = None if "**" in parts else len(parts)
    paths, skipped = _below(root, kinds, depth)
    matching = [path for path in paths if _matches(path.relative_to(root).parts, parts)]
    for path in matching:
        _check_kind(path)
    return Found(tuple(InputFile(p, p.relative_to(root).as_posix()) for p in matching), skipped)


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part of a pattern that has a wildcard."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
    return Path(*parts[:first])


def _matches(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":
        # `data/**` means all files below, as a shell has it.
        rest = parts[1:] or ("*",)
        return any(_matches(names[i:], rest) for i in range(len(names)))
    if not names or not fnmatch.fnmatchcase(names[0], parts[0]):
        return False
    return _matches(names[1:], parts[1:])


def _below(root: Path, kinds: tuple[str, ...], depth: int | None = None) -> tuple[list[Path], int]:
    """Files below a folder sorted by path, and the number of links that were not followed.

    Args:
        root: The folder.
        kinds: Endings of their names; () takes all.
        depth: Levels to look at; None is all.
    """
    inside = root.resolve()
    regular: list[Path] = []
    links: list[Path] = []
    skipped = 0
    for folder, names in _folders(root, depth, _not_listed):
        for name in sorted(names):
            path = folder / name
            if path.is_symlink() and path.is_dir():
                skipped += 1
            elif path.is_dir() or (kinds and not name.lower().endswith(kinds)):
                continue
            elif not path.is_symlink():
                # Not a pipe or device, which could be waited for without end.
                regular += [path] if path.is_file() else []
            elif path.is_file() and path.resolve().is_relative_to(inside):
                links.append(path)
            else:
                skipped += 1
    # A link to a file that is read anyway would put its text in twice.
    seen = {path.resolve() for path in regular}
    for path in sorted(links):
        if path.resolve() not in seen:
            seen.add(path.resolve())
            regular.append(path)
    return sorted(regular, key=lambda p: p.relative_to(root).as_posix()), skipped


def _folders(
    root: Path, depth: int | None, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Each folder and the names in it that do not begin with a dot."""
    for where, folders, files in os.walk(root, onerror=on_error):
        folder = Path(where)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, folders + [name for name in files if not name.startswith(".")]
        if depth is not None and len(folder.relative_to(root).parts) + 1 >= depth:
            folders.clear()


def _not_listed(error: OSError) -> None:
    raise PippinError(
        "P201", f"the folder {error.filename} cannot be read: {error.strerror}"
    ) from error


def _check_kind(path: Path) -> None:
    """Raise P201 for a file that is known to be no text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed_parquet = suffixes[-2:-1] == [".parquet"] and suffixes[-1] in PACKED
    packed_tar = suffixes[-2:-1] == [".tar"]
    if path.suffix.lower() in _OTHER_KINDS or packed_parquet or packed_tar:
        raise PippinError(
            "P201",
            f"{path} is a {''.join(suffixes[-2:])} file, which is not read",
            found=f"needed: {KINDS_IN_WORDS}; UTF-8",
            choices=nearby_text(path.parent),
        )


def nearby_text(path: Path, count: int = 5) -> tuple[str, ...]:
    """Text files near a path, those with the most similar name first.

    Looks into the nearest folder that exists and two levels below it; never for long.
    """
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():
        folder = folder.parent
    candidates = _text_below(folder)
    if not candidates and folder != folder.parent:
        candidates = _text_below(folder.parent)
    similarity = {
        c: difflib.SequenceMatcher(None, c.name.lower(), path.name.lower()).ratio()
        for c in candidates
    }
    best = sorted(candidates, key=lambda c: (-similarity[c], c.as_posix()))
    return tuple(c.as_posix() for c in best[:count])


def _text_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    looked_at = 0
    for where, names in _folders(folder, 3):
        found += [
            where / name
            for name in sorted(names)
            if name.lower().endswith(FILE_KINDS) and not (where / name).is_dir()
        ]
        looked_at += len(names)
        if looked_at > _MAX_LOOKED_AT:
            break
    return found
