"""Files of records for the tests of readers."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from core.data.reading.bad_lines import Tally
from core.data.reading.documents import Document
from core.data.reading.readers import Record, read_records
from core.data.reading.sources import ReadOptions, open_source
from core.errors import PippinError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
same_folder = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, data: bytes) -> Path:
    """Write packed as the name says."""
    path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](data))
    return path


def read(path: Path) -> list[Record]:
    return list(read_records(path))


def documents(path: Path, **options: Any) -> list[Document]:
    return list(open_source(path, options=ReadOptions(**options)).documents())


def refused(path: Path) -> PippinError:
    with pytest.raises(PippinError) as error:
        read(path)
    return error.value


def skipped(path: Path) -> tuple[list[Any], tuple[str, ...]]:
    tally = Tally("skip")
    found = [record.fields.get("text") for record in read_records(path, tally)]
    return found, tally.notes()
