"""What cannot be read is an error that names file and line, or is left out and counted.

Run: pytest tests/unit/test_data_bad_input.py
"""

import gzip
import json
import random
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from core.data.reading import byte_streams, readers, selection
from core.data.reading.bad_lines import Tally
from core.data.reading.readers import read_records
from core.data.reading.sources import ReadOptions, open_source
from core.errors import PippinError
from tests.data_helpers import PACKERS, documents, read, refused, same_folder, skipped, write

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
    assert "data.on_bad_line=skip" in error.remedy
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
    assert "gzip -dc" in error.remedy
    assert ("of the unpacked file" in error.found) == (coding == "latin1")


@pytest.mark.parametrize("coding", ["utf-16", "utf-32", "utf-16le", "utf-16be"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.json"])
def test_other_unicode_is_left_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, coding: str
) -> None:
    """Its lines after the first are valid UTF-8 with a NUL beside each letter."""
    monkeypatch.setattr(readers, "PART_BYTES", 200)
    content = {
        "x.txt": "plain words\n" * 50,
        "x.jsonl": '{"text": "plain words"}\n' * 50,
        "x.csv": "text,number\n" + "plain words,1\n" * 50,
        "x.json": json.dumps([{"text": "plain words"}] * 50),
    }[name]
    error = refused(write(tmp_path / name, content.encode(coding)))
    assert f"{name}:1" in error.what and f"iconv -f {coding} -t utf-8 " in error.remedy
    found, notes = skipped(tmp_path / name)
    assert found == []
    assert notes[0] == f"1 left out: text in {coding[:6].upper()} (first: {name}:1)"


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


def test_a_parquet_file_with_a_damaged_column_name_is_p202(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    path.write_bytes(path.read_bytes().replace(b"text", b"\x80ext"))
    with pytest.raises(PippinError) as info:
        read(path)
    assert info.value.code == "P202"
