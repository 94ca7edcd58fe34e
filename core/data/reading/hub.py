"""Datasets in the layout of the Hugging Face Hub, read as a stream through the `datasets` package.

`hf:NAME` is one of the Hub, `hf:/a/folder` one in a folder: data files whose names tell the splits, or a
README.md that lists configurations; it reads nothing outside the folder. Code that comes with a
dataset is never run: `datasets` 4 and later cannot, and earlier ones are refused. In a text file of
such a dataset each line is a record.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from core.data.reading.bad_lines import Tally
from core.data.reading.byte_streams import content_sha256, missing_package
from core.data.reading.documents import HUB_PREFIX, Document, text_documents
from core.data.reading.nearby import nearby_text
from core.data.reading.readers import Record, import_pyarrow
from core.data.reading.selection import (
    DEFAULT_OPTIONS,
    ReadOptions,
    bad_text_field,
    limited_records,
)
from core.errors import PippinError

_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_UNREACHABLE = "The network is down, or HF_HUB_OFFLINE is set"


@dataclass
class HubSource:
    """One split of a dataset, read as a stream.

    Attributes:
        path: Name of the dataset on the Hub, or a folder.
        options: Configuration, split and revision, and what to take from records.
        tally: What was left out in the current or last pass; consumers of `records` add to it.
        streams: Reading is dear: it should be done once only.
        bytes_read: Bytes of text in the current pass, but never more than `num_bytes` where known.
    """

    path: str
    options: ReadOptions = DEFAULT_OPTIONS
    tally: Tally = field(default_factory=Tally)
    streams: bool = True
    bytes_read: int = 0

    def __post_init__(self) -> None:
        if self._folder is not None and self.options.revision is not None:
            raise PippinError("P010", "revision is for datasets of the Hub, and this is a folder")
        looks_local = self.path.startswith(("/", ".", "~")) or not self.path
        if looks_local and self._folder is None:
            given = Path(self.path).expanduser()
            raise PippinError(
                "P201",
                f"there is no folder {given}",
                choices=nearby_text(given) if self.path else (),
            )

    @cached_property
    def name(self) -> str:
        """The last part of the dataset's name, and its configuration."""
        base = self._folder.resolve().name if self._folder else self.path.split("/")[-1]
        return "-".join(part for part in (base, self.options.config) if part)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the split as its card has them, or of the text in a folder; 0 if not known.

        About: of parquet files the unpacked size of the text's column, of others that of the files.
        """
        try:
            split, builder = self._split, self._builder
        except PippinError:
            return 0
        infos = builder.info.splits or {}
        if split in infos and infos[split].num_bytes:
            return int(infos[split].num_bytes)
        if self._folder is None:
            return 0
        files = (builder.config.data_files or {}).get(split, ())
        field_name = self.options.text_field
        return sum(_text_bytes(Path(f), field_name) for f in files if Path(f).is_file())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over options and content.

        Of a folder over names and contents of its files, with all that are read among them; of a
        dataset of the Hub over its name and commit, or where the Hub cannot be reached, over its
        name and the revision asked for. A configuration and split that are the default count as if
        they had been given.
        """
        whole = hashlib.sha256(f"hub 1\n{self._resolved().decides()}\n".encode())
        if self._folder is None:
            whole.update(f"{self.path} {self._commit()}\n".encode())
            return whole.hexdigest()
        files = {
            file.relative_to(self._folder).as_posix(): file for file in _all_files(self._folder)
        }
        # What is read may also lie below a dotfile or a linked folder, which the above leaves out.
        root = self._folder.resolve()
        read = [Path(os.path.normpath(file)) for file in _data_files(self._builder)]
        files |= {file.relative_to(root).as_posix(): file for file in read}
        for shown, file in sorted(files.items(), key=lambda item: Path(item[0])):
            name = os.fsencode(shown).hex()
            whole.update(f"{name} {content_sha256(file)}\n".encode())
        return whole.hexdigest()

    def documents(self) -> Iterator[Document]:
        """All documents in the order of the dataset; empty ones are left out and counted.

        Raises:
            PippinError: P201 for a dataset, configuration or split that is not there or cannot be
                reached, P202 for records without text.
        """
        wanted = [name for name in (self.options.text_field, self.options.score_field) if name]
        tally = self._begin()
        return text_documents(self._records(wanted, tally), self.options, tally)

    def records(self) -> Iterator[Record]:
        """All records in the order of the dataset, whatever their fields are."""
        tally = self._begin()
        return limited_records(self._records(None, tally), self.options, tally)

    def notes(self) -> tuple[str, ...]:
        """What was left out in the last full pass, in words."""
        return self.tally.notes()

    def _begin(self) -> Tally:
        self.tally, self.bytes_read = Tally(self.options.on_bad_line), 0
        return self.tally

    @cached_property
    def _folder(self) -> Path | None:
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    def _resolved(self) -> ReadOptions:
        """The options with the configuration and split that are read."""
        asked = replace(self.options, split=self.options.split or "train")
        if self._folder is None and _COMMIT.match(self.options.revision or ""):
            return asked  # of which the fingerprint is the same without a network
        try:
            config = str(self._builder.config.name)
            return replace(self.options, config=config, split=self._split)
        except PippinError:
            return asked

    def _commit(self) -> str:
        revision = self.options.revision or ""
        if _COMMIT.match(revision):
            return revision
        try:
            return str(self._builder.hash)
        except PippinError:
            return revision

    @cached_property
    def _builder(self) -> Any:
        """What knows the files of one configuration."""
        datasets = import_datasets()
        path = str(self._folder.resolve()) if self._folder else self.path
        options = self.options
        try:
            builder = datasets.load_dataset_builder(
                path, options.config, revision=None if self._folder else options.revision
            )
        except Exception as error:  # whatever a package of many parts may raise
            raise self._cannot_open(error, path) from error
        if self._folder is not None:
            _check_inside(_data_files(builder), self._folder.resolve())
        return builder

    def _cannot_open(self, error: Exception, path: str) -> PippinError:
        datasets = import_datasets()
        shown = f"{HUB_PREFIX}{self.path}"
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            what = f"there is no dataset {self.path} on the Hub, or it is private, or has no such revision"
            remedy = "for a private or gated one: hf auth login"
            return PippinError("P201", what, found=_first_line(error), remedy=remedy)
        if isinstance(error, (ConnectionError, TimeoutError)):
            return _unreachable(shown, error)
        if isinstance(error, ValueError):
            try:
                configs = datasets.get_dataset_config_names(path, revision=self.options.revision)
            except Exception:  # then the first error is the one to tell
                configs = []
            if self.options.config not in configs and len(configs) > (self.options.config is None):
                asked = self.options.config
                what = f"has no configuration {asked!r}" if asked else "has several configurations"
                return PippinError("P201", f"{shown} {what}; one is to be named", choices=configs)
        return PippinError("P201", f"{shown} cannot be opened: {_first_line(error)}")

    @cached_property
    def _splits(self) -> dict[str, Any]:
        try:
            return dict(self._builder.as_streaming_dataset())
        except PippinError:
            raise
        except Exception as error:  # as above
            raise self._cannot_open(error, self.path) from error

    @cached_property
    def _split(self) -> str:
        names, asked = list(self._splits), self.options.split
        if asked is None and len(names) == 1:
            return names[0]
        if (asked or "train") not in names:
            what = f"{HUB_PREFIX}{self.path} has no split {asked or 'train'!r}"
            raise PippinError("P201", what, found="one is to be named", choices=names)
        return asked or "train"

    def _records(self, wanted: Sequence[str] | None, tally: Tally) -> Iterator[Record]:
        data = self._splits[self._split]
        if wanted is not None and data.column_names:
            data = self._with_columns(data, wanted)
        limit = self.num_bytes
        count, shown = 0, f"{HUB_PREFIX}{self.path} {self._split}"
        rows = iter(data)
        while True:
            try:
                fields = next(rows)
            except StopIteration:
                return
            except (ConnectionError, TimeoutError) as error:
                raise _unreachable(shown, error) from error
            except Exception as error:  # a file that is damaged, or is no JSON
                what = f"{shown} cannot be read after record {count:,}: {_first_line(error)}"
                raise PippinError("P202", what) from error
            count += 1
            text = fields.get(self.options.text_field)
            self.bytes_read += len(text.encode()) if isinstance(text, str) else 0
            if limit:
                self.bytes_read = min(limit, self.bytes_read)
            yield Record(fields, f"{self.name}:{count}", None, f"{shown}, record {count:,}")

    def _with_columns(self, data: Any, wanted: Sequence[str]) -> Any:
        """Only some columns; a missing one is told of before anything is read."""
        names = data.column_names
        kinds = data.features or {}
        if wanted[0] not in names:
            # An example value for each column, so that those that hold text are the choices.
            strings = {n: "" for n in names if "string" in str(getattr(kinds.get(n), "dtype", ""))}
            example = {n: strings.get(n) for n in names}
            problem = bad_text_field(example, wanted[0], f"{HUB_PREFIX}{self.path}")
            if problem is not None:
                raise problem[1]
        if "string" not in str(getattr(kinds.get(wanted[0]), "dtype", "")):
            return data
        return data.select_columns(list(wanted)) if set(wanted) <= set(names) else data


def _text_bytes(path: Path, field_name: str) -> int:
    """Bytes of one column of a parquet file, unpacked; of any other file its size."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    pyarrow = import_pyarrow()
    try:
        meta = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return path.stat().st_size  # what is wrong is told when it is read
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    text = [c.total_uncompressed_size for c in columns if c.path_in_schema == field_name]
    return int(sum(text) or sum(c.total_uncompressed_size for c in columns))


def _all_files(folder: Path) -> list[Path]:
    """Files below, also those that are links (as in a cache of the Hub), but none of dotfiles."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where) / name for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _data_files(builder: Any) -> list[str]:
    """What a builder reads, of all splits: paths, or addresses."""
    return [str(file) for files in (builder.config.data_files or {}).values() for file in files]


def _check_inside(files: Sequence[str], folder: Path) -> None:
    """Refuse a dataset in a folder that would read what is not its own.

    Args:
        files: Paths or addresses, from `_data_files`.
        folder: The dataset's, resolved. In a cache of the Hub its files are links into the `blobs` of
            the same dataset.

    Raises:
        PippinError: P201.
    """
    own = [folder, *_blobs(folder)]
    for file in files:
        path = Path(os.path.normpath(file))
        target = path.resolve()
        below = path.is_relative_to(folder) and any(target.is_relative_to(one) for one in own)
        if below and path.is_file():
            continue
        local = "://" not in file
        raise PippinError(
            "P201",
            f"{HUB_PREFIX}{folder} would read what is not below that folder: {target if local else file}",
            found="its README.md or a link names it",
            remedy=f"put a copy of it into the folder, or give it as the input itself: {target}"
            if local
            else "download it into the folder, and name it in README.md",
        )


def _blobs(folder: Path) -> list[Path]:
    """Where a cache of the Hub keeps the files of the dataset that a folder belongs to."""
    snapshots = [one for one in (folder, *folder.parents) if one.parent.name == "snapshots"]
    caches = [one.parent.parent for one in snapshots[:1]]
    return [one / "blobs" for one in caches if one.name.startswith("datasets--")]


def _unreachable(shown: str, error: Exception) -> PippinError:
    return PippinError(
        "P201",
        f"{shown} cannot be reached: {_first_line(error)}",
        found=_UNREACHABLE,
        remedy="download it where there is a network (hf download --repo-type dataset NAME "
        f"--local-dir FOLDER), then read {HUB_PREFIX}/path/to/FOLDER",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def import_datasets() -> Any:
    """The package, imported when first needed.

    Raises:
        PippinError: P502 where it is missing, or so old that it may run code of a dataset.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package("datasets", "reads datasets of the Hub", error, ">=4") from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise PippinError(
            "P502",
            f"the package datasets is {datasets.__version__}, which may run code of a dataset",
            remedy="pip install 'datasets>=4'",
        )
    return datasets
