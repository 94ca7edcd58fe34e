"""Where text comes from: files, folders and patterns, a dataset of the Hub, or the story corpus.

A source gives the same documents each time it is read; its fingerprint is over everything that
decides them. What cannot be read is an error that names file, line and byte, or is left out and
counted where that is asked for; what is left out on purpose (empty documents, links out of a folder)
is counted always. How files are read is `core.data.reading.readers`.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from core.data.reading.bad_lines import OnBadLine, Tally
from core.data.reading.byte_streams import Meter, content_sha256
from core.data.reading.documents import HUB_PREFIX, Document, text_documents
from core.data.reading.file_kinds import file_format
from core.data.reading.nearby import Found, InputFile, find_files, nearby_text
from core.data.reading.readers import Record, read_records
from core.data.reading.selection import (
    DEFAULT_OPTIONS,
    limited_records,
    sound,
)
from core.data.reading.selection import ReadOptions as ReadOptions
from core.data.split import Split
from core.errors import PippinError


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def name(self) -> str:
        """Short name, for folders and messages."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of what is read, about; 0 where that is not known."""
        ...

    @property
    def bytes_read(self) -> int:
        """How much of `num_bytes` the current pass has read; it only grows."""
        ...

    @property
    def streams(self) -> bool:
        """Whether reading is so dear that it should be done once only."""
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
    """Text of files, in a fixed order.

    Attributes:
        files: The files.
        name: Short name, for folders and messages.
        options: What to take from records.
        skipped: What was not read on purpose, in words.
        tally: What was left out in the current or last pass; consumers of `records` add to it.
        streams: Files can be read as often as is useful.
    """

    files: tuple[InputFile, ...]
    name: str
    options: ReadOptions = DEFAULT_OPTIONS
    skipped: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)
    streams: bool = False
    _meter: Meter = field(default_factory=Meter)
    # Shared by sources of the same files, as reading them all takes long.
    _hashes: dict[Path, str] = field(default_factory=dict)

    @cached_property
    def num_bytes(self) -> int:
        """Size of the files, as they are: of a packed one the packed size."""
        return sum(file.path.stat().st_size for file in self.files)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files that the current pass has read, in the measure of `num_bytes`."""
        return self._meter.num_bytes

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over options, formats, contents and names; where the files are does not matter.

        Names are those below the input, as they decide the order; that of a single file does not.
        """
        whole = hashlib.sha256(f"files 2\n{self.options.decides()}\n".encode())
        for file in self.files:
            name = file.name if len(self.files) > 1 else "".join(file_format(file.path))
            key = f"{os.fsencode(name).hex()} {file.split}"
            if file.path not in self._hashes:
                self._hashes[file.path] = content_sha256(file.path)
            whole.update(f"{key} {self._hashes[file.path]}\n".encode())
        return whole.hexdigest()

    def read_otherwise(self) -> "tuple[FileSource, ...]":
        """The same files with another `on_bad_line`, to compare fingerprints with."""
        other: OnBadLine = "skip" if self.options.on_bad_line == "error" else "error"
        return (replace(self, options=replace(self.options, on_bad_line=other)),)

    def documents(self) -> Iterator[Document]:
        """All documents in the order of the files; empty ones are left out and counted."""
        fields = [name for name in (self.options.text_field, self.options.score_field) if name]
        tally = self._begin()
        return text_documents(self._records(fields, tally, self._meter), self.options, tally)

    def records(self) -> Iterator[Record]:
        """All records in the order of the files, whatever their fields are.

        A record of which any string holds a lone surrogate is a bad one.
        """
        tally = self._begin()
        records = sound(self._records(None, tally, self._meter), tally)
        return limited_records(records, self.options, tally)

    def notes(self) -> tuple[str, ...]:
        """What was left out or dropped in the last full pass, in words."""
        return (*self.tally.notes(), *self.skipped)

    def _begin(self) -> Tally:
        self.tally, self._meter = Tally(self.options.on_bad_line), Meter()
        return self.tally

    def _records(
        self, columns: Sequence[str] | None, tally: Tally, meter: Meter
    ) -> Iterator[Record]:
        for file in self.files:
            is_text = file_format(file.path)[0] == "text"
            for record in read_records(
                file.path,
                tally,
                name=file.name,
                split=file.split,
                meter=meter,
                columns=columns,
            ):
                if is_text and self.options.text_field != "text":
                    yield replace(record, fields={self.options.text_field: record.fields["text"]})
                else:
                    yield record


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
    bytes_read: int = 0
    streams: bool = False

    @property
    def fingerprint(self) -> str:
        """sha256 of the generator's version, the sizes and the seed."""
        from core.data import corpus

        sizes = f"{self.num_bytes} {self.val_fraction} {self.test_fraction}"
        text = f"stories {corpus.VERSION} {sizes} {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """All stories, each time the same. Written once and kept in memory."""
        self.bytes_read = 0
        for story in self._stories:
            self.bytes_read += len(story.text)
            yield story

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


class RecordSource(Source, Protocol):
    """A source that also gives whole records: files, or a dataset of the Hub."""

    @property
    def options(self) -> ReadOptions:
        """What to take from records."""
        ...

    @property
    def tally(self) -> Tally:
        """What was left out in the current or last pass; consumers of `records` add to it."""
        ...

    def records(self) -> Iterator[Record]:
        """All records, each time the same."""
        ...


def open_source(
    inputs: str | Path | Sequence[str | Path],
    text_field: str = "text",
    *,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> RecordSource:
    """Find the text of one or several inputs, which are read in the order given.

    A folder is searched recursively for all kinds that are read. Names that begin with a dot, files of
    other kinds, and links that leave the folder or lead to folders are left out and counted. A
    folder that holds train.* and valid.* (or val, validation, test) gives each document its split. A
    pattern such as `data/**/*.jsonl` takes what matches. A single file of any other kind is read as
    plain text. What is reached twice is read once. `hf:NAME` is a dataset of the Hub,
    `hf:/a/folder` one in a folder.

    Args:
        inputs: Paths and patterns, or one "hf:..." .
        text_field: Field of records that holds the text; "text" leaves it to the options.
        options: What to take from records.

    Raises:
        PippinError: P201 where there is nothing to read, with what lies nearby; P010 for options
            without an effect.
    """
    given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    if text_field != "text":
        options = replace(options, text_field=text_field)
    names = [str(one)[len(HUB_PREFIX) :] for one in given if str(one).startswith(HUB_PREFIX)]
    if names:
        from core.data.reading.hub import HubSource

        if len(given) > 1:
            what = "a Hub dataset is read on its own, not together with other inputs"
            raise PippinError("P010", what, found=", ".join(map(str, given)))
        return HubSource(names[0], options)
    return _open_files([Path(one).expanduser() for one in given], options)


def _open_files(paths: Sequence[Path], options: ReadOptions) -> FileSource:
    without_effect = [n for n in ("config", "split", "revision") if getattr(options, n) is not None]
    if without_effect:
        what = f"{', '.join(without_effect)} is for datasets of the Hub, and the input is files"
        raise PippinError("P010", what, remedy=f"leave it out, or give {HUB_PREFIX}NAME as input")
    if not paths:
        raise PippinError("P201", "no input was given")
    found = [find_files(path) for path in paths]
    files: dict[Path, InputFile] = {}
    for file in (file for one in found for file in one.files):
        files.setdefault(file.path.resolve(), file)
    skipped = _skipped(found, len(files))
    source = FileSource(tuple(files.values()), _name(paths), options, skipped)
    if source.num_bytes == 0:
        shown = ", ".join(map(str, paths))
        empty = {file.path for file in source.files}
        nearby = [one for one in nearby_text(paths[0], 8) if Path(one) not in empty][:5]
        raise PippinError("P201", f"{shown} is empty", found="0 bytes of text", choices=nearby)
    return source


def _name(paths: Sequence[Path]) -> str:
    """The file's name without suffixes, or the folder's."""
    path = paths[0]
    if path.is_dir():
        return path.resolve().name
    packed = file_format(path)[1]
    return Path(path.stem).stem if packed else path.stem


def _skipped(found: Sequence[Found], num_files: int) -> tuple[str, ...]:
    counts: Mapping[str, Any] = {
        "links out of the folder, to folders or to nothing were not followed": sum(
            one.skipped_links for one in found
        ),
        "README files beside train and validation files left out": sum(
            one.skipped_readmes for one in found
        ),
        "files and folders whose names begin with a dot left out": sum(
            one.skipped_hidden for one in found
        ),
        "files of kinds that are not read left out": sum(one.skipped_others for one in found),
        "files given more than once, read once": sum(
            len(one.files) + one.skipped_copies for one in found
        )
        - num_files,
    }
    return tuple(f"{count:,} {what}" for what, count in counts.items() if count)
