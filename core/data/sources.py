"""Where text comes from: a file, a folder, a .jsonl, or the story corpus.

A source is read several times and must give the same documents each time; its fingerprint is over
the bytes. What cannot be read is an error that names file, line and byte; what is left out on
purpose (empty documents, links out of the folder) is counted. Text is kept as it is: no newline,
space or Unicode form is changed; only a byte order mark at the start of a file is dropped.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from core.data.nearby import FILE_KINDS, JSON_LINES, nearby_text
from core.data.split import Split
from core.errors import PippinError

_BOM = b"\xef\xbb\xbf"
# A larger text file becomes several documents, cut at line ends, so that memory stays bounded.
PART_BYTES = 64_000_000
# Kinds for which "not UTF-8" would be a poor explanation.
_OTHER_KINDS = {
    ".parquet",
    ".arrow",
    ".gz",
    ".zst",
    ".zip",
    ".pdf",
    ".docx",
    ".epub",
    ".npy",
    ".bin",
}


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: The text, at least one character that is not white space.
        origin: Where it is: "book.txt", "data.jsonl:17", "story 12".
        entropy_bits: Upper bound of its information where it was generated, else None.
        split: Where the source itself decides it, else None.
    """

    text: str
    origin: str
    entropy_bits: float | None = None
    split: Split | None = None


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def name(self) -> str:
        """Short name, for folders and messages."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of text, about: the size of the files."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the documents, in hex."""
        ...

    def documents(self) -> Iterator[Document]:
        """All documents, each time the same."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What was left out or dropped in the last full pass, in words."""
        ...


@dataclass
class FileSource:
    """Text files below `root`, or the one file `root`."""

    root: Path
    files: tuple[Path, ...]
    text_field: str = "text"
    skipped_links: int = 0
    _counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Name of the file without its suffix, or of the folder."""
        return self.root.stem if self.root.is_file() else self.root.resolve().name

    @cached_property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names below the root, sizes and contents; moving the root does not matter."""
        whole = hashlib.sha256(f"files 1\n{self.text_field}\n".encode())
        for path in self.files:
            content = hashlib.sha256()
            with _opened(path) as stream:
                while block := stream.read(1 << 20):
                    content.update(block)
            size = path.stat().st_size
            whole.update(b"%s\0%d\0%s\n" % (self._hashed_name(path), size, content.digest()))
        return whole.hexdigest()

    def documents(self) -> Iterator[Document]:
        """All documents in the order of the file names; empty ones are left out and counted."""
        self._counts = Counter()
        for path in self.files:
            lines = path.suffix.lower() in JSON_LINES
            for document in self._records(path) if lines else self._parts(path):
                if document.text.strip():
                    yield document
                else:
                    self._counts["empty"] += 1

    def notes(self) -> tuple[str, ...]:
        """What was left out or dropped in the last full pass, in words."""
        words = {
            "empty": "empty documents left out",
            "bom": "files began with a byte order mark, dropped",
            "cut": f"files larger than {PART_BYTES // 10**6} MB cut at line ends",
        }
        found = [
            f"{self._counts[key]:,} {text}" for key, text in words.items() if self._counts[key]
        ]
        if self.skipped_links:
            what = "links out of the folder, to folders or to nothing were not followed"
            found.append(f"{self.skipped_links:,} {what}")
        return tuple(found)

    def _relative(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def _hashed_name(self, path: Path) -> bytes:
        """Within a folder the name decides the order; of a single file only the kind matters."""
        single = path == self.root
        return path.suffix.lower().encode() if single else os.fsencode(self._relative(path))

    def _parts(self, path: Path) -> Iterator[Document]:
        name, offset, line = self._relative(path), 0, 1
        with _opened(path) as stream:
            while block := stream.read(PART_BYTES):
                block += stream.readline()
                self._counts["cut"] += int(offset == 0 and len(block) < self._size(path))
                text = self._decode(block, path, line, offset)
                yield Document(text, name if offset == 0 else f"{name}:{line}")
                offset += len(block)
                line += block.count(b"\n")

    def _records(self, path: Path) -> Iterator[Document]:
        name, offset = self._relative(path), 0
        with _opened(path) as stream:
            # By bytes, not by str.splitlines: that would cut a record at U+2028.
            for number, raw in enumerate(stream, start=1):
                text = self._decode(raw, path, number, offset)
                offset += len(raw)
                if text.strip():
                    yield Document(self._text_of(text, path, number), f"{name}:{number}")

    def _size(self, path: Path) -> int:
        return path.stat().st_size

    def _decode(self, block: bytes, path: Path, line: int, offset: int) -> str:
        if offset == 0 and block.startswith(_BOM):
            self._counts["bom"] += 1
            block, offset = block[len(_BOM) :], len(_BOM)
        try:
            return block.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, block, line, offset, error) from error

    def _text_of(self, line: str, path: Path, number: int) -> str:
        where = f"{path}:{number}"
        try:
            record = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise PippinError("P202", f"{where} is not valid JSON: {reason}") from error
        if not isinstance(record, dict):
            raise PippinError(
                "P202", f"{where} is no JSON object", found=f"needed: {{{self.text_field!r}: ...}}"
            )
        text = record.get(self.text_field)
        if not isinstance(text, str):
            raise self._no_text(record, where)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PippinError(
                "P202",
                f"{where} holds a lone surrogate, which is no character",
                found=f"U+{ord(text[error.start]):04X} at character {error.start:,} of the text",
            ) from error
        return text

    def _no_text(self, record: dict[str, Any], where: str) -> PippinError:
        texts = [key for key, value in record.items() if isinstance(value, str)]
        present = self.text_field in record
        problem = "is not a string" if present else "is missing"
        return PippinError(
            "P202",
            f"{where}: the text field {self.text_field!r} {problem}",
            found="" if texts else "the record has no field that holds a string",
            choices=texts,
            remedy=f"data.text_field={texts[0]}" if texts else "",
        )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file, of which every fault of the disk or of permission is P201."""
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise PippinError("P201", f"{path} cannot be read: {error.strerror}") from error


@dataclass
class StorySource:
    """Stories written by `core.data.corpus`: endless, simple, and of known entropy.

    The corpus says what is for validation; the test is its held-out stories, whose combinations of
    name, thing and plot occur in no other.
    """

    num_bytes: int
    seed: int
    val_fraction: float
    test_fraction: float
    name: str = "stories"

    @property
    def fingerprint(self) -> str:
        """sha256 of the generator's version, the sizes and the seed."""
        from core.data import corpus

        sizes = f"{self.num_bytes} {self.val_fraction} {self.test_fraction}"
        text = f"stories {corpus.VERSION} {sizes} {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """All stories, each time the same. Written once and kept in memory."""
        return iter(self._stories)

    def notes(self) -> tuple[str, ...]:
        """Nothing is left out."""
        return ()

    @cached_property
    def _stories(self) -> list[Document]:
        from core.data import corpus

        shares: tuple[tuple[Split, str, float], ...] = (
            ("train", "train", 1 - self.val_fraction - self.test_fraction),
            ("val", "val", self.val_fraction),
            ("test", "held_out", self.test_fraction),
        )
        return [
            Document(story.text, f"{name} story {story.index}", story.entropy_bits, split)
            for split, name, share in shares
            if share > 0
            for story in corpus.stories(round(share * self.num_bytes), self.seed, split=name)
        ]


def open_source(path: str | Path, text_field: str = "text") -> FileSource:
    """Find the text files of a path.

    A folder is searched recursively for .txt, .md and .jsonl; names that begin with a dot are left
    out, and links that leave the folder or lead to folders are counted and not followed. A single file
    of any other kind is read as plain text.

    Raises:
        PippinError: P201 where there is nothing to read, with what lies nearby.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files, skipped = _files_below(root)
        if not files:
            hidden = f"; {skipped} links were not followed" if skipped else ""
            raise PippinError(
                "P201",
                f"no text found in {root}",
                found=f"looked for {' '.join(FILE_KINDS)}{hidden}",
                choices=nearby_text(root),
            )
        source = FileSource(root, files, text_field, skipped)
    elif root.is_file():
        if root.suffix.lower() in _OTHER_KINDS:
            raise PippinError(
                "P201",
                f"{root} is a {root.suffix} file, which is not read",
                found=f"needed: {' '.join(FILE_KINDS)}, UTF-8",
                choices=nearby_text(root.parent),
            )
        source = FileSource(root, (root,), text_field)
    else:
        raise PippinError("P201", f"there is no file or folder {root}", choices=nearby_text(root))
    if source.num_bytes == 0:
        raise PippinError(
            "P201", f"{root} is empty", found="0 bytes of text", choices=nearby_text(root)
        )
    return source


def _files_below(root: Path) -> tuple[tuple[Path, ...], int]:
    inside = root.resolve()
    regular, links, skipped = [], [], 0
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        skipped += sum((Path(folder) / name).is_symlink() for name in names)
        for name in files:
            path = Path(folder) / name
            if name.startswith(".") or path.suffix.lower() not in FILE_KINDS:
                continue
            if not path.is_symlink():
                regular.append(path)
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
    return tuple(sorted(regular, key=lambda p: p.relative_to(root).as_posix())), skipped


def _not_utf8(
    path: Path, block: bytes, line: int, offset: int, error: UnicodeDecodeError
) -> PippinError:
    at = line + block.count(b"\n", 0, error.start)
    looks = "utf-16" if block[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return PippinError(
        "P202",
        f"{path}:{at} is not valid UTF-8",
        found=f"byte 0x{block[error.start]:02X} at offset {offset + error.start:,} of the file",
        remedy=f"iconv -f {looks} -t utf-8 '{path}' > '{path.stem}.utf8{path.suffix}'",
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the field {counts.most_common(1)[0][0]!r} is there twice")
    return record
