"""Records from files: text, JSON, CSV and parquet, all but the last also packed by gzip or zstd.

Text is kept as it is: no newline, space or Unicode form is changed, and lines end at newlines alone; only
a byte order mark at the start of a file is dropped. Memory stays bounded whatever a file holds: at
most `PART_BYTES` are read or unpacked at once.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.data.reading.bad_lines import (
    Tally,
    in_other_unicode,
    not_utf8,
    other_unicode,
    parse_record,
    too_long,
)
from core.data.reading.byte_streams import DamagedError, Meter, missing_package, opened
from core.data.reading.file_kinds import file_format
from core.data.reading.json_arrays import (
    NoArrayError,
    array_elements,
    decoded_blocks,
    no_array,
)
from core.data.split import Split
from core.errors import PippinError

_BOM = b"\xef\xbb\xbf"
# A larger text file becomes several documents, cut at line ends; a larger record is a bad one.
PART_BYTES = 16_000_000
# Rows that repeat one long value are small in a file and large in memory.
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        fields: Its content by field; that of a text file is {"text": ...}.
        origin: Where it is, as its document keeps it: "book.txt", "data.jsonl:17" (line), or
            "data.parquet:17" (row, from 1), "data.json:17" (element, from 1).
        split: Where the source itself decides it, else None.
        where: The place with the whole path, for messages.
    """

    fields: Mapping[str, Any]
    origin: str
    split: Split | None = None
    where: str = ""


@dataclass(frozen=True)
class _Job:
    """One file to be read, and where to report to."""

    path: Path
    name: str
    split: Split | None
    tally: Tally
    meter: Meter
    columns: tuple[str, ...] | None

    def record(self, fields: Mapping[str, Any], number: int | None) -> Record:
        line = "" if number is None else f":{number}"
        return Record(fields, f"{self.name}{line}", self.split, f"{self.path}{line}")

    def reject(self, number: int, problem: tuple[str, PippinError]) -> None:
        self.tally.reject(problem[0], f"{self.name}:{number}", problem[1])


def read_records(
    path: Path,
    tally: Tally | None = None,
    *,
    name: str = "",
    split: Split | None = None,
    meter: Meter | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[Record]:
    """All records of a file, in its order.

    Args:
        path: The file; its name decides how it is read.
        tally: Decides what becomes of bad records, and counts them; None raises for the first.
        name: The file's name in origins; "" is its own.
        split: Put into each record.
        meter: Grows by the size of the file (packed, where it is) while it is read.
        columns: Fields that will be used: of a parquet file only these are read. None is all.

    Raises:
        PippinError: P201 for a file that cannot be opened; P202 for bad text or records and damaged
            files, unless the tally skips them; P502 for a missing package.
    """
    kind, _ = file_format(path)
    job = _Job(
        path,
        name or path.name,
        split,
        tally or Tally(),
        meter or Meter(),
        None if columns is None else tuple(columns),
    )
    try:
        yield from _READERS[kind](job)
    except DamagedError as error:
        detail = f"{path} is damaged or cut short: {error}"
        problem = PippinError("P202", detail, remedy="download or pack the file again")
        job.tally.reject("damaged file, from there on", job.name, problem)


def _texts(job: _Job) -> Iterator[Record]:
    """A text file as one record, or as several where it is longer than a part."""
    number, offset, line, rest = 0, 0, 1, b""
    with opened(job.path, job.meter) as stream:
        while block := rest + stream.read(PART_BYTES - len(rest)):
            if offset == 0 and _is_other_unicode(job, block):
                return
            end = _cut(block) if len(block) == PART_BYTES else len(block)
            block, rest = block[:end], block[end:]
            number += 1
            if number == 2:
                job.tally.done[f"files larger than {PART_BYTES // 10**6} MB cut at line ends"] += 1
            text = _decoded(job, block, line, offset)
            yield job.record({"text": text}, line if offset else None)
            offset += len(block)
            line += block.count(b"\n")


def _is_other_unicode(job: _Job, head: bytes) -> bool:
    """Whether a file is in UTF-16 or UTF-32 by its beginning; then it is rejected."""
    coding = other_unicode(head)
    if coding:
        job.reject(1, in_other_unicode(job.path, coding))
    return bool(coding)


def _cut(block: bytes) -> int:
    """Where to cut: after the last newline, else before a character that is not whole."""
    if end := block.rfind(b"\n") + 1:
        return end
    for back in range(1, 4):
        lead = block[-back]
        if lead >= 0xC0:
            length = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            return len(block) if length == back else len(block) - back
        if lead < 0x80:
            break
    return len(block)


def _decoded(job: _Job, block: bytes, line: int, offset: int) -> str:
    block, offset = _without_mark(job, block, offset)
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        if job.tally.on_bad_line == "error":
            job.reject(line, not_utf8(job.path, block, line, offset, error))
    kept = []
    for raw in io.BytesIO(block):
        try:
            kept.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            job.reject(line, not_utf8(job.path, raw, line, offset, error))
        line += 1
        offset += len(raw)
    return "".join(kept)


def _without_mark(job: _Job, block: bytes, offset: int) -> tuple[bytes, int]:
    """The block without a byte order mark at the start of the file, and its place."""
    if offset or not block.startswith(_BOM):
        return block, offset
    job.tally.done["files began with a byte order mark, dropped"] += 1
    return block[len(_BOM) :], len(_BOM)


def _lines(job: _Job, stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and bytes of each line; those longer than a part are rejected.

    Of a file in UTF-16 or UTF-32, which is rejected, there are none.
    """
    number, offset = 0, 0
    # By bytes, not by str.splitlines: that would cut a record at U+2028.
    while raw := stream.readline(PART_BYTES + 1):
        number += 1
        if offset == 0 and _is_other_unicode(job, raw):
            return
        size = len(raw)
        if size <= PART_BYTES:
            place = offset
            if offset == 0:
                raw, place = _without_mark(job, raw, offset)
            yield number, place, raw
        else:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(PART_BYTES)
                size += len(raw)
            job.reject(number, too_long(f"{job.path}:{number}", PART_BYTES))
        offset += size


def _json_lines(job: _Job) -> Iterator[Record]:
    with opened(job.path, job.meter) as stream:
        for number, offset, raw in _lines(job, stream):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                job.reject(number, not_utf8(job.path, raw, number, offset, error))
                continue
            if not line.strip():
                continue
            parsed = parse_record(line, f"{job.path}:{number}")
            if isinstance(parsed, tuple):
                job.reject(number, parsed)
            else:
                yield job.record(parsed, number)


def _json_array(job: _Job) -> Iterator[Record]:
    """Elements of a JSON file that is one array."""
    with opened(job.path, job.meter) as stream:
        blocks = decoded_blocks(job.path, stream, job.tally, job.name)
        try:
            for number, element in enumerate(array_elements(blocks, PART_BYTES), start=1):
                parsed = parse_record(element, f"{job.path}:{number}")
                if isinstance(parsed, tuple):
                    job.reject(number, parsed)
                else:
                    yield job.record(parsed, number)
        except NoArrayError as error:
            job.reject(1, no_array(job.path, str(error)))


@dataclass
class _CsvLines:
    """Lines for `csv.reader`, which knows when a row is complete.

    Attributes:
        problem: Reason and error of bytes that are no UTF-8 since this was last set to None.
        row_bytes: Bytes of lines since this was last set to 0.
    """

    job: _Job
    lines: Iterator[tuple[int, int, bytes]]
    number: int = 0
    row_bytes: int = 0
    problem: tuple[str, PippinError] | None = None

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        self.number, offset, raw = next(self.lines)
        self.row_bytes += len(raw)
        if self.row_bytes > PART_BYTES:
            raise csv.Error(f"the row is longer than {PART_BYTES / 1e6:g} MB")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problem = not_utf8(self.job.path, raw, self.number, offset, error)
            # So that a row that goes on in the next line still ends where it ends.
            return raw.decode("utf-8", errors="surrogateescape")


def _csv_rows(job: _Job) -> Iterator[Record]:
    """Rows of a CSV by the names in its first row; values are strings."""
    # Per process: the default of 128 KiB is less than a document.
    csv.field_size_limit(PART_BYTES)
    with opened(job.path, job.meter) as stream:
        lines = _CsvLines(job, _lines(job, stream))
        rows = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            first = lines.number + 1
            lines.row_bytes, lines.problem, broken = 0, None, ""
            row: list[str] = []
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                broken = str(error)
            where = f"{job.path}:{first}"
            problem = lines.problem
            if problem is None and broken:
                problem = ("broken CSV", PippinError("P202", f"{where}: {broken}"))
            if problem is not None:
                job.reject(first, problem)
                if header is None:
                    return  # without names no row can be read
            elif header is None:
                header = _checked_names(row, where) if row else None
            elif row and len(row) != len(header):
                wrong = f"the row has {len(row)} fields, the header has {len(header)}"
                reason = "CSV rows that do not fit the header"
                job.reject(first, (reason, PippinError("P202", f"{where}: {wrong}")))
            elif row:
                yield job.record(dict(zip(header, row)), first)


def _checked_names(names: list[str], where: str) -> list[str]:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DamagedError(f"{where}: two columns are named {twice!r}")
    return names


def _parquet_rows(job: _Job) -> Iterator[Record]:
    pyarrow = import_pyarrow()
    with opened(job.path):
        pass  # what cannot be opened is P201, as for other files
    size, number = job.path.stat().st_size, 0
    before = job.meter.num_bytes
    try:
        with pyarrow.parquet.ParquetFile(job.path, pre_buffer=False) as file:
            columns = _columns(file.schema_arrow, job)
            total = max(1, file.metadata.num_rows)
            for group in range(file.metadata.num_row_groups):
                rows = _rows_at_once(file.metadata.row_group(group))
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                    for fields in _values(job, batch, number + 1, pyarrow):
                        number += 1
                        if fields is not None:
                            yield job.record(fields, number)
                    job.meter.num_bytes = before + size * number // total
    # A damaged column name is not even an ArrowException.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(" ".join(str(error).split())[:200]) from error
    job.meter.num_bytes = before + size


def _columns(schema: Any, job: _Job) -> list[str] | None:
    """What to read: the columns asked for where all is well with them, else all, to tell of them."""
    names = _checked_names(schema.names, str(job.path))
    wanted = list(job.columns or ())
    # A dot in a name would be taken for a path into a nested column.
    if not wanted or any("." in name for name in names) or not set(wanted) <= set(names):
        return None
    return wanted if "string" in str(schema.field(wanted[0]).type) else None


def _rows_at_once(group: Any) -> int:
    """Rows of a row group that hold a part at most, about."""
    per_row = max(1, group.total_byte_size // max(1, group.num_rows))
    return int(max(1, min(_BATCH_ROWS, PART_BYTES // per_row)))


def _values(job: _Job, batch: Any, first: int, pyarrow: Any) -> Iterator[dict[str, Any] | None]:
    """Rows of a batch; None for one that was rejected."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, pyarrow.ArrowException):
        pass  # one of them holds what Python cannot: which one?
    for i in range(batch.num_rows):
        try:
            row = batch.slice(i, 1).to_pylist()[0]
        except (ValueError, pyarrow.ArrowException) as error:
            reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else "a bad value"
            found = f"{job.path}:{first + i} (row) holds {reason}: {error}"
            job.reject(first + i, (reason, PippinError("P202", found)))
            row = None
        yield row


_READERS: dict[str, Callable[[_Job], Iterator[Record]]] = {
    "text": _texts,
    "jsonl": _json_lines,
    "json": _json_array,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
}


def import_pyarrow() -> Any:
    """The package with its parquet module, imported when first needed."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package("pyarrow", "reads .parquet", error) from error
    return pyarrow
