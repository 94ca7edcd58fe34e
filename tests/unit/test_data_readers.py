"""Every format gives back what was written, in bounded memory, and says where it cannot.

Run: pytest tests/unit/test_data_readers.py
"""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.data.reading import readers
from core.data.reading.bad_lines import Tally
from core.data.reading.readers import Record, read_records
from tests.data_helpers import PACKERS, TEXT, documents, read, same_folder, write

# Round trips


@same_folder
@given(text=TEXT.filter(lambda t: not t.startswith("\ufeff") and t))
@pytest.mark.parametrize("packed", PACKERS)
def test_text_comes_back(tmp_path: Path, packed: str, text: str) -> None:
    records = read(write(tmp_path / f"x.txt{packed}", text.encode()))
    assert [dict(r.fields) for r in records] == [{"text": text}]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


@same_folder
@given(rows=st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=5), plain=st.booleans())
@pytest.mark.parametrize("packed", PACKERS)
def test_json_lines_come_back(
    tmp_path: Path, packed: str, rows: list[dict[str, Any]], plain: bool
) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=plain) + "\n" for row in rows)
    records = read(write(tmp_path / f"x.jsonl{packed}", lines.encode()))
    assert [r.fields for r in records] == rows
    assert [r.origin for r in records] == [f"x.jsonl{packed}:{i + 1}" for i in range(len(rows))]


# Before 3.11 the csv module takes no NUL.
CSV_TEXT = TEXT if sys.version_info >= (3, 11) else TEXT.filter(lambda t: "\0" not in t)


@same_folder
@given(
    rows=st.lists(st.tuples(CSV_TEXT, CSV_TEXT), max_size=5), end=st.sampled_from(["\n", "\r\n"])
)
@pytest.mark.parametrize("packed", PACKERS)
def test_csv_comes_back(tmp_path: Path, packed: str, rows: list[tuple[str, str]], end: str) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "b"), *rows])
    records = read(write(tmp_path / f"x.csv{packed}", buffer.getvalue().encode()))
    assert [(r.fields["text"], r.fields["b"]) for r in records] == rows


@same_folder
@given(
    rows=st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=2)), min_size=1, max_size=9),
    group=st.integers(1, 4),
)
def test_parquet_comes_back(tmp_path: Path, rows: list[tuple[str, list[str]]], group: int) -> None:
    table = pa.table(
        {
            "text": pa.array([r[0] for r in rows], pa.string()),
            "n": list(range(len(rows))),
            "deep": pa.array([{"role": r[1]} for r in rows]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=group)
    assert [dict(r.fields) for r in read(tmp_path / "x.parquet")] == table.to_pylist()
    only = list(read_records(tmp_path / "x.parquet", columns=["text"]))
    assert [dict(r.fields) for r in only] == [{"text": r[0]} for r in rows]
    assert only[-1].origin == f"x.parquet:{len(rows)}"


@same_folder
@given(texts=st.lists(TEXT, max_size=6))
def test_each_format_gives_the_same_documents(tmp_path: Path, texts: list[str]) -> None:
    if sys.version_info < (3, 11):
        texts = [text.replace("\0", "") for text in texts]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([["text"], *[[t] for t in texts]])
    wanted = [t for t in texts if t.strip()]
    paths = [write(tmp_path / f"x.jsonl{p}", lines or b"\n") for p in PACKERS]
    paths += [write(tmp_path / f"x.csv{p}", buffer.getvalue().encode()) for p in PACKERS]
    paths.append(tmp_path / "x.parquet")
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), paths[-1])
    for path in paths:
        assert [d.text for d in documents(path)] == wanted


@same_folder
@given(
    text=st.text(st.sampled_from("ab\n\u00e9\u6f22\U0001f600"), max_size=200),
    part=st.integers(10, 40),
)
def test_parts_join_to_the_text(tmp_path: Path, text: str, part: int) -> None:
    write(tmp_path / "x.txt.gz", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PART_BYTES", part)
        found = [r.fields["text"] for r in read(tmp_path / "x.txt.gz")]
    assert "".join(found) == text
    assert all(len(t.encode()) <= part for t in found)
    # Within a line only where the line alone fills the part, or nearly: no character is halved.
    whole = [t.endswith("\n") or ("\n" not in t and len(t.encode()) > part - 4) for t in found[:-1]]
    assert all(whole)


# Marks, line ends, names


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.txt.gz", "x.jsonl.zst"])
def test_a_byte_order_mark_is_dropped_and_counted(tmp_path: Path, name: str) -> None:
    content = {"txt": "a", "jsonl": '{"text": "a"}', "csv": "text\na\n"}[name.split(".")[1]]
    tally = Tally()
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert [dict(r.fields) for r in read_records(path, tally)] == [{"text": "a"}]
    assert tally.notes() == ("1 files began with a byte order mark, dropped",)


def test_csv_keeps_what_is_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'id,text\n1,"a, ""b""\r\nc\nd"\n\n2,e\xe2\x80\xa8f\n')
    records = read(path)
    assert [r.fields["text"] for r in records] == ['a, "b"\r\nc\nd', "e\u2028f"]
    assert [r.origin for r in records] == ["x.csv:2", "x.csv:6"]


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\n" + "a" * 300_000 + "\n")
    assert len(read(tmp_path / "x.csv")[0].fields["text"]) == 300_000


def test_origin_and_where(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"text": "a"}\n')
    (record,) = read_records(path, name="sub/x.jsonl", split="val")
    assert record == Record({"text": "a"}, "sub/x.jsonl:2", "val", f"{path}:2")


def test_several_frames_and_members_are_one_file(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        parts = [PACKERS[suffix](part) for part in (b"one ", b"", b"two")]
        (tmp_path / f"x.txt{suffix}").write_bytes(b"".join(parts))
        assert read(tmp_path / f"x.txt{suffix}")[0].fields["text"] == "one two"


def test_a_packed_file_of_unknown_kind_is_text(tmp_path: Path) -> None:
    assert read(write(tmp_path / "x.log.gz", b"a"))[0].fields["text"] == "a"
