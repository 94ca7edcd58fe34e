"""Which files hold text: those that an input names, and what lies near one that names none."""

import difflib
import fnmatch
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from core.data.reading.file_kinds import FILE_KINDS, KINDS_IN_WORDS, PACKED, file_format
from core.data.reading.json_arrays import is_array_of_objects
from core.data.split import Split
from core.errors import PippinError

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
# Lies in the folder of each run, whose metrics, samples and reports nobody wants to train on.
_RUN_MARK = "training_state.json"


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
        skipped_hidden: Files and folders whose names begin with a dot.
        skipped_others: Files of kinds that are not read, `.json` that is no array of objects among them.
        skipped_copies: Links to files that are read anyway.
    """

    files: tuple[InputFile, ...]
    skipped_links: int = 0
    skipped_readmes: int = 0
    skipped_hidden: int = 0
    skipped_others: int = 0
    skipped_copies: int = 0


def find_files(given: Path) -> Found:
    """The files of one input: a file, a folder, or a pattern such as `data/**/*.jsonl`.

    Raises:
        PippinError: P201 where there is nothing to read, with what lies nearby.
    """
    if given.is_dir():
        found = _of_folder(given)
        if not found.files:
            counts = {"links were not followed": found.skipped_links}
            counts["files are of other kinds"] = found.skipped_others
            left_out = "".join(f"; {count:,} {what}" for what, count in counts.items() if count)
            raise PippinError(
                "P201",
                f"no text found in {given}",
                found=f"looked for {KINDS_IN_WORDS}{left_out}",
                choices=nearby_text(given),
            )
        return found
    if given.is_file():
        _check_kind(given)
        return Found((InputFile(given, given.name),))
    if given.exists():
        raise PippinError(
            "P201",
            f"{given} is no regular file",
            found="a device or a pipe, which cannot be read twice",
            remedy="write its content to a file, and give that",
        )
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
    below = _below(root, FILE_KINDS)
    splits = _named_splits(root, below.paths)
    if not splits:
        return below.found(root)
    files = tuple(InputFile(p, p.name, splits[p]) for p in below.paths if p in splits)
    readmes = len(below.paths) - len(files)
    return replace(below.found(root), files=files, skipped_readmes=readmes)


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
    below = _below(root, kinds, depth)
    below.paths = [path for path in below.paths if _matches(path.relative_to(root).parts, parts)]
    for path in below.paths:
        _check_kind(path)
    # What else lies in the folder is not what the pattern asks for.
    return replace(below.found(root), skipped_hidden=0, skipped_others=0)


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


@dataclass
class _Below:
    """Files below a folder sorted by path, and how many names were left out, by reason."""

    paths: list[Path]
    links: int = 0
    hidden: int = 0
    others: int = 0
    copies: int = 0

    def found(self, root: Path) -> Found:
        files = tuple(InputFile(p, p.relative_to(root).as_posix()) for p in self.paths)
        return Found(
            files,
            self.links,
            skipped_hidden=self.hidden,
            skipped_others=self.others,
            skipped_copies=self.copies,
        )


def _below(root: Path, kinds: tuple[str, ...], depth: int | None = None) -> _Below:
    """Files below a folder, and what was left out.

    Args:
        root: The folder.
        kinds: Endings of their names; () takes all.
        depth: Levels to look at; None is all.
    """
    inside = root.resolve()
    links: list[Path] = []
    below = _Below([])
    for folder, names, hidden in _folders(root, depth, _not_listed):
        below.hidden += hidden
        for name in sorted(names):
            path = folder / name
            if path.is_symlink() and path.is_dir():
                below.links += 1
            elif path.is_dir():
                continue
            elif kinds and not _is_text(path, kinds):
                below.others += 1
            elif not path.is_symlink():
                # Not a pipe or device, which could be waited for without end.
                below.paths += [path] if path.is_file() else []
            elif path.is_file() and path.resolve().is_relative_to(inside):
                links.append(path)
            else:
                below.links += 1
    # A link to a file that is read anyway would put its text in twice.
    seen = {path.resolve() for path in below.paths}
    for path in sorted(links):
        if path.resolve() in seen:
            below.copies += 1
            continue
        seen.add(path.resolve())
        below.paths.append(path)
    below.paths.sort(key=lambda p: p.relative_to(root).as_posix())
    return below


def _is_text(path: Path, kinds: tuple[str, ...]) -> bool:
    """Whether a file of a folder is to be read: many a `.json` there is none of records."""
    if not path.name.lower().endswith(kinds):
        return False
    if file_format(path)[0] != "json":
        return True
    return path.is_file() and is_array_of_objects(path)


def _folders(
    root: Path, depth: int | None, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str], int]]:
    """Each folder, the names in it that do not begin with a dot, and how many do."""
    for where, folders, files in os.walk(root, onerror=on_error):
        folder = Path(where)
        num_names = len(folders) + len(files)
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = folders + [name for name in files if not name.startswith(".")]
        yield folder, names, num_names - len(names)
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

    Looks into the nearest folder that exists and two levels below it, or else into the one above;
    never for long, nor into the root of the file system. Empty files and those of runs are no text.
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
    if folder.resolve() == Path(folder.resolve().anchor):
        return []
    found: list[Path] = []
    runs: set[Path] = set()
    looked_at = 0
    for where, names, _ in _folders(folder, 3):
        if _RUN_MARK in names:
            runs.add(where)
        if runs.isdisjoint((where, *where.parents)):
            found += [where / name for name in sorted(names) if _may_be_meant(where / name)]
        looked_at += len(names)
        if looked_at > _MAX_LOOKED_AT:
            break
    return found


def _may_be_meant(path: Path) -> bool:
    """Whether a file is worth being suggested: one with text in it."""
    try:
        return path.is_file() and path.stat().st_size > 0 and _is_text(path, FILE_KINDS)
    except (OSError, PippinError):
        return False
