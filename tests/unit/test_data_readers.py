"""Every format gives back what was written, in bounded memory, and says where it cannot.

Run: pytest tests/unit/test_data_readers.py
"""

import csv
import gzip
import io
import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.data import byte_streams, readers, selection
from core.data.bad_lines import Tally
from core.data.readers import Record, read_records
from core.data.sources import Document, ReadOptions, open_source
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


# Bad input


BAD_LINES = [
    (b'{"text": "a"', "broken JSON"),
    (b'{"text": "a", "n": NaN}', "broken JSON"),
    (b'{"text": "a", "n": -Infinity}', "broken JSON"),
    (b'{"text": "a", "text": "b"}', "broken JSON"),
    (b'{"a": {"b": 1, "b": 2}}', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'{"n": ' + b"9" * 5_000 + b"}", "broken JSON"),
    (b"[1]", "no JSON object"),
    (b"\xff{}", "not valid UTF-8"),
    (b'{"text": "' + b"a" * 2_000_000 + b'"}', "a record longer than 1 MB"),
]


@pytest.mark.parametrize(
    ("line", "reason"), BAD_LINES, ids=[f"{r} {i}" for i, (_, r) in enumerate(BAD_LINES)]
)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_bad_lines_stop_or_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str, line: bytes, reason: str
) -> None:
    if reason == "broken JSON" and b"999" in line and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python reads numbers of any length")
    monkeypatch.setattr(readers, "PART_BYTES", 1_000_000)
    good = b'{"text": "good"}\n'
    path = write(tmp_path / f"x.jsonl{packed}", good + line + b"\n" + good + line)
    error = refused(path)
    assert error.code == "P202" and f"{path}:2" in error.what
    assert "--on-bad-line skip" in error.remedy
    note = f"2 left out: {reason} (first: x.jsonl{packed}:2)"
    assert skipped(path) == (["good", "good"], (note,))


def test_bad_records_are_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        '{"text": "a"}',
        '{"text": 1}',
        '{"body": "b"}',
        '{"text": "\\ud800"}',
        '{"text": null}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, *lines[1:3]]))
    source = open_source(tmp_path, options=ReadOptions(on_bad_line="skip"))
    for _ in range(2):
        assert [d.text for d in source.documents()] == ["a"]
        assert source.notes() == (
            "2 left out: the text field 'text' is not a string but int (first: x.jsonl:2)",
            "2 left out: the text field 'text' is missing (first: x.jsonl:3)",
            "1 left out: a lone surrogate (first: x.jsonl:4)",
            "1 left out: the text field 'text' is not a string but null (first: x.jsonl:5)",
        )


def test_lone_surrogates_are_found_anywhere_in_a_record(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    deep = '{"messages": [{"role": "user", "content": "\\udc00"}]}'
    path.write_text(f'{{"\\ud83d\\ude00": "pair"}}\n{deep}\n{{"\\ud800": 1}}\n')
    source = open_source(path, options=ReadOptions(on_bad_line="skip"))
    assert [dict(r.fields) for r in source.records()] == [{"\U0001f600": "pair"}]
    assert source.notes() == ("2 left out: a lone surrogate (first: x.jsonl:2)",)
    with pytest.raises(PippinError, match=r"x\.jsonl:2 holds a lone surrogate"):
        list(open_source(path).records())


def test_undecodable_lines_of_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\ntw\xf6\nthree\n\xff\nfive")
    found, notes = skipped(tmp_path / "x.txt")
    assert found == ["one\nthree\nfive"]
    assert notes == ("2 left out: not valid UTF-8 (first: x.txt:2)",)


@pytest.mark.parametrize("coding", ["utf-16", "utf-32", "latin1"])
def test_the_remedy_converts(tmp_path: Path, coding: str) -> None:
    error = refused(write(tmp_path / "x.txt", "h\u00e9llo".encode(coding)))
    assert f"iconv -f {coding} -t utf-8 " in error.remedy
    error = refused(write(tmp_path / "x.txt.gz", "h\u00e9llo".encode(coding)))
    assert f"x.txt.gz' | iconv -f {coding} -t utf-8 > 'x.utf8.txt'" in error.remedy
    assert "gzip -dc" in error.remedy and "of the unpacked file" in error.found


@pytest.mark.parametrize("coding", ["utf-16le", "utf-16be"])
def test_utf16_without_a_mark_is_not_taken_for_text_with_nul(tmp_path: Path, coding: str) -> None:
    text = "Plain words, n\u00e4mlich: 12\n" * 3
    error = refused(write(tmp_path / "x.txt", text.encode(coding)))
    assert f"iconv -f {coding} -t utf-8 " in error.remedy and "x.txt:1" in error.what
    assert skipped(tmp_path / "x.txt")[1] == ("1 left out: text in UTF-16 (first: x.txt:1)",)
    for kept in ("\0" * 50, "a\0b\0", "a, b, c\0" * 20):
        assert read(write(tmp_path / "y.txt", kept.encode()))[0].fields["text"] == kept


def test_a_parquet_value_of_more_than_a_part_is_a_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "PART_BYTES", 1_000)
    pq.write_table(pa.table({"text": ["a" * 1_001, "b"]}), tmp_path / "x.parquet")
    assert [d.text for d in documents(tmp_path / "x.parquet", on_bad_line="skip")] == ["b"]
    with pytest.raises(PippinError, match=r"x\.parquet:1 is a record longer than"):
        documents(tmp_path / "x.parquet")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_under_another_name_are_recognised(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(PACKERS[suffix](b'{"text": "a"}' * 9))
    error = refused(path)
    assert f"whose name should end in {suffix}" in error.found and "iconv" not in error.remedy


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.csv.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_packed_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    rng = random.Random(1)
    lines = [f'{{"text": "{rng.getrandbits(64)}"}}' for _ in range(20_000)]
    if ".csv" in name:
        lines = ["text", *(line[10:-2] for line in lines)]
    data = bytearray("\n".join(lines).encode())
    if name.endswith(".zst"):
        packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(data))
    else:
        packed = bytearray(gzip.compress(data))
    if damage == "cut":
        del packed[-100:]
    elif damage == "flipped":
        packed[-200] ^= 0x10
    else:
        packed = bytearray(b"no packed file")
    path = tmp_path / name
    path.write_bytes(packed)
    error = refused(path)
    assert error.code == "P202" and f"{path} is damaged" in error.what
    found, notes = skipped(path)
    assert notes[-1].startswith("1 left out: damaged file, from there on (first: " + name)
    if "jsonl" in name and damage == "cut":
        assert found == [json.loads(line)["text"] for line in lines[: len(found)]]
        assert len(found) > 10_000


def test_damage_does_not_stop_the_next_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 100)[:-9])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "c.txt").write_text("c")
    assert [d.text for d in documents(tmp_path, on_bad_line="skip")] == ["c"]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rng = random.Random(2)
    pq.write_table(pa.table({"text": [str(rng.getrandbits(99)) for _ in range(5_000)]}), path)
    whole = path.read_bytes()
    for content in (whole[:-5], whole[: len(whole) // 2], b"", b"PAR1" * 3):
        path.write_bytes(content)
        error = refused(path)
        assert error.code == "P202" and f"{path} is damaged" in error.what


def test_bad_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'text,n\na,1\nb\nc,2,3\n"d" e,4\n"\xff\n",5\nf,6\n"g\n')
    assert f"{path}:3" in refused(path).what
    found, notes = skipped(path)
    assert found == ["a", "f"]
    assert notes == (
        "2 left out: CSV rows that do not fit the header (first: x.csv:3)",
        "2 left out: broken CSV (first: x.csv:5)",
        "1 left out: not valid UTF-8 (first: x.csv:6)",
    )


def test_a_quote_that_is_never_closed_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", 1_000)
    (tmp_path / "x.csv").write_text('text\na\n"b\n' + "c\n" * 600 + "d\n")
    found, notes = skipped(tmp_path / "x.csv")
    assert found[0] == "a" and found[-1] == "d" and 90 < len(found) < 110
    assert notes == ("1 left out: broken CSV (first: x.csv:3)",)


@pytest.mark.parametrize("header", [b"a,b,a\n1,2,3\n", b"text\xff\n1\n"])
def test_a_bad_header_leaves_nothing_to_read(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(header)
    assert refused(tmp_path / "x.csv").code == "P202"
    assert skipped(tmp_path / "x.csv")[0] == []


def test_bad_parquet_values(tmp_path: Path) -> None:
    values = pa.array([b"a", b"\xff", b"c"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": values, "n": [1, 2, 3]}), tmp_path / "x.parquet")
    assert "x.parquet:2 (row)" in refused(tmp_path / "x.parquet").what
    note = "1 left out: not valid UTF-8 (first: x.parquet:2)"
    assert skipped(tmp_path / "x.parquet") == (["a", "c"], (note,))


def test_parquet_without_the_text_field_names_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["b"], "a.b": ["c"]}), path)
    for wanted in ("text", "n"):
        with pytest.raises(PippinError) as error:
            documents(path, text_field=wanted)
        assert error.value.choices == ("body", "a.b")
    assert [d.text for d in documents(path, text_field="a.b")] == ["c"]


WHOLE = {
    "x.txt": "a\n\u00e9\n".encode(),
    "x.jsonl": b'{"text": "a", "b": [1, {"c": "\\u00e9"}]}\n{"text": "b"}\n',
    "x.csv": b'text,n\na,1\n"b\n""c""",2\n',
}


@same_folder
@given(data=st.data())
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.parquet"])
@pytest.mark.parametrize("packed", PACKERS)
def test_any_damage_is_an_error_of_ours(
    tmp_path: Path, packed: str, name: str, data: st.DataObject
) -> None:
    if name == "x.parquet":
        pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        packed = ""
    else:
        content = PACKERS[packed](WHOLE[name])
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(bytes(changed) or b"x")
    try:
        whole = read(path)
    except PippinError as error:
        assert error.code == "P202"
        assert sum(1 for _ in read_records(path, Tally("skip"))) < 20
    else:
        assert [r.fields for r in read_records(path, Tally("skip"))] == [r.fields for r in whole]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", 1_000_000)
    monkeypatch.setattr(byte_streams, "_ZSTD_BYTES", 256)
    # 30 MB in one line, packed to some kB: a whole one would be far above what is allowed.
    path = write(
        tmp_path / f"x.jsonl{suffix}", b'{"text": "' + b"a" * 30_000_000 + b'"}\n{"text": "b"}'
    )
    text = write(tmp_path / f"x.txt{suffix}", b"a" * 30_000_000)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert skipped(path)[0] == ["b"]
        assert sum(len(r.fields["text"]) for r in read_records(text)) == 30_000_000
        assert tracemalloc.get_traced_memory()[1] < 25_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("package", "name"), [("zstandard", "x.txt.zst"), ("pyarrow", "x.parquet")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(tmp_path / name)
    assert error.code == "P502" and error.remedy == f"pip install '{package}'"
