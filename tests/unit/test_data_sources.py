"""Text is read as it is, and what cannot be read is an error that says where.

Run: pytest tests/unit/test_data_sources.py
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import sources
from core.data.sources import FileSource, StorySource, open_source
from core.data.split import assign_documents, cut_document, document_key, keep_apart
from core.errors import PippinError


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in open_source(path, field).documents()]


def refused(path: Path, field: str = "text") -> PippinError:
    with pytest.raises(PippinError) as error:
        list(open_source(path, field).documents())
    return error.value


def test_folder_is_sorted_and_recursive(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("2")
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "c.jsonl").write_text('{"text": "3"}\n{"text": "4"}\n')
    (tmp_path / "d.csv").write_text("no")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    source = open_source(tmp_path)
    found = [(d.text, d.origin) for d in source.documents()]
    assert found == [("1", "a.txt"), ("2", "b/one.md"), ("3", "c.jsonl:1"), ("4", "c.jsonl:2")]
    assert list(source.documents()) == list(source.documents())


def test_bytes_are_kept_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    text = "a\r\n\tb\u2028c\x00\ufeff  \n\n"
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = open_source(tmp_path)
    assert [d.text for d in source.documents()] == [text]
    assert source.notes() == ("1 files began with a byte order mark, dropped",)


def test_jsonl_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    records = ["a\u2028b\u0085c", "d\re\x0b", "\x00", "\ufeffe"]
    lines = [json.dumps({"text": r, "other": 1}, ensure_ascii=False) for r in records]
    path.write_bytes(b"\xef\xbb\xbf" + ("\r\n\n".join(lines) + "\n").encode())
    assert texts(path) == records
    assert [d.origin for d in open_source(path).documents()][1] == "x.jsonl:3"


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": "\\n"}\n')
    source = open_source(tmp_path)
    for _ in range(2):
        assert [d.text for d in source.documents()] == ["x"]
        assert source.notes() == ("3 empty documents left out",)


def test_links_out_of_the_folder_are_counted_and_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (inside / "a.txt").write_text("a")
    (inside / "out.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "again.txt").symlink_to(inside / "a.txt")
    (inside / "gone.txt").symlink_to(inside / "none.txt")
    (inside / ".blob").write_text("kept elsewhere inside")
    (inside / "b.txt").symlink_to(inside / ".blob")
    source = open_source(inside)
    assert [d.text for d in source.documents()] == ["a", "kept elsewhere inside"]
    assert source.notes() == (
        "4 links out of the folder, to folders or to nothing were not followed",
    )


def test_latin1_names_file_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfok\nol\xe9\n")
    error = refused(path)
    assert error.code == "P202"
    assert f"{path}:2" in error.what
    assert "0xE9 at offset 8" in error.found
    assert "iconv -f latin1" in error.remedy


def test_utf16_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("hello".encode("utf-16"))
    assert "iconv -f utf-16" in refused(path).remedy


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'{"text": "a", "n": NaN}', "NaN"),
        (b'{"text": "a", "text": "b"}', "'text' is there twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'"text"', "no JSON object"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": 3}', "is not a string"),
        (b'{"body": "a", "n": 3}', "is missing"),
        (b'{"text": "\xe9"}', "not valid UTF-8"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    error = refused(path)
    assert error.code == "P202"
    assert f"{path}:2" in error.what
    assert words in error.render()


def test_missing_field_names_the_fields_there_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"content": "a", "n": 1, "title": "b"}\n')
    error = refused(path)
    assert error.choices == ("content", "title")
    assert error.remedy == "data.text_field=content"
    assert texts(path, "title") == ["b"]


def test_jsonl_offset_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    first = b'{"text": "fine"}\n'
    path.write_bytes(first + b'{"text": "\xff"}\n')
    assert f"offset {len(first) + 10}" in refused(path).found


def test_nothing_there_names_what_is_nearby(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "story.txt").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    error = refused(tmp_path / "books" / "stories.txt")
    assert error.code == "P201"
    assert error.choices == ((tmp_path / "books" / "story.txt").as_posix(),)
    deeper = refused(tmp_path / "none" / "deep" / "x.txt")
    assert (tmp_path / "notes.md").as_posix() in deeper.choices


def test_folder_without_text_names_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    error = refused(tmp_path)
    assert error.code == "P201" and ".jsonl" in error.found


def test_empty_file_and_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert "0 bytes" in refused(tmp_path / "a.txt").found
    assert ".parquet" in refused(tmp_path / "b.parquet").what


def test_any_single_file_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print()")
    assert texts(tmp_path / "main.py") == ["print()"]


def test_large_files_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", 10)
    text = "".join(f"line {i} \u00e9\n" for i in range(20)) + "end"
    (tmp_path / "x.txt").write_text(text)
    source = open_source(tmp_path / "x.txt")
    found = list(source.documents())
    assert "".join(d.text for d in found) == text and len(found) > 5
    assert all(d.text.endswith("\n") for d in found[:-1])
    assert found[1].origin == f"x.txt:{found[0].text.count(chr(10)) + 1}"
    assert "cut at line ends" in source.notes()[0]


def test_fingerprint_is_over_names_and_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.txt").write_text("one")
        (folder / "b.txt").write_text("two")
    before = open_source(first).fingerprint
    assert before == open_source(second).fingerprint
    assert before != open_source(first, "body").fingerprint
    (second / "b.txt").write_text("tWo")
    assert before != open_source(second).fingerprint
    (second / "b.txt").write_text("two")
    (second / "b.txt").rename(second / "c.txt")
    assert before != open_source(second).fingerprint


def test_fingerprint_of_one_file_ignores_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    a, b = open_source(tmp_path / "a.txt"), open_source(tmp_path / "b.txt")
    assert a.fingerprint == b.fingerprint


def test_stories_are_fixed_by_size_and_seed() -> None:
    source = StorySource(60_000, 3, 0.1, 0.05)
    found = list(source.documents())
    again = StorySource(60_000, 3, 0.1, 0.05)
    assert found == list(again.documents()) and source.fingerprint == again.fingerprint
    assert source.fingerprint != StorySource(60_000, 4, 0.1, 0.05).fingerprint
    assert source.fingerprint != StorySource(60_001, 3, 0.1, 0.05).fingerprint
    sizes: Counter[str] = Counter()
    for document in found:
        assert document.entropy_bits is not None and document.entropy_bits > 0
        sizes[str(document.split)] += len(document.text)
    for split, wanted in (("train", 51_000), ("val", 6_000), ("test", 3_000)):
        assert wanted <= sizes[split] < wanted + 3_000


# Split


def keys_of(items: list[str], seed: int = 1) -> np.ndarray:
    return np.array([document_key(t.encode(), seed) for t in items], np.uint64)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=200, max_size=400),
    val=st.sampled_from([0.02, 0.1, 0.3]),
    test=st.sampled_from([0.0, 0.02, 0.2]),
    seed=st.integers(0, 50),
)
def test_shares_are_met_by_bytes(sizes: list[int], val: float, test: float, seed: int) -> None:
    items = [f"{i}" for i in range(len(sizes))]
    split = assign_documents(keys_of(items, seed), np.array(sizes, np.int64), val, test)
    assert split is not None
    shares = np.bincount(split, weights=sizes, minlength=3) / sum(sizes)
    assert 0.5 * val <= shares[1] <= 1.03 * val
    assert 0.5 * test <= shares[2] <= 1.03 * test


def test_equal_documents_are_on_one_side() -> None:
    items = [f"text {i % 150}" for i in range(600)]
    split = assign_documents(keys_of(items), np.full(600, 7, np.int64), 0.2, 0.2)
    assert split is not None and set(split.tolist()) == {0, 1, 2}
    sides = {text: {int(s) for t, s in zip(items, split) if t == text} for text in items}
    assert all(len(side) == 1 for side in sides.values())


def test_split_depends_on_the_seed_and_not_on_the_position() -> None:
    items = [f"text {i}" for i in range(300)]
    sizes = np.full(300, 10, np.int64)
    one = assign_documents(keys_of(items, 1), sizes, 0.1, 0.1)
    other = assign_documents(keys_of(items, 2), sizes, 0.1, 0.1)
    back = assign_documents(keys_of(items[::-1], 1), sizes, 0.1, 0.1)
    assert one is not None and other is not None and back is not None
    assert one.tolist() != other.tolist()
    assert one.tolist() == back.tolist()[::-1]


def test_few_or_huge_documents_must_be_cut() -> None:
    sizes = np.full(49, 10, np.int64)
    assert assign_documents(keys_of([str(i) for i in range(49)]), sizes, 0.1, 0.1) is None
    # 60 documents of which two are nearly everything: no whole document is near 2%.
    sizes = np.array([10**6, 10**6] + [1] * 58, np.int64)
    assert assign_documents(keys_of([str(i) for i in range(60)]), sizes, 0.02, 0.02) is None


def test_what_is_also_trained_on_leaves_validation() -> None:
    keys = np.array([5, 6, 7, 5, 6], np.uint64)
    assert keep_apart(keys, np.array([0, 1, 1, 2, 2], np.int8)).tolist() == [0, 1, 1, 0, 2]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\u6f22"), max_size=600),
    val=st.floats(0.01, 0.45),
    test=st.floats(0, 0.45),
)
def test_cut_documents_join_to_the_text(text: str, val: float, test: float) -> None:
    parts = cut_document(text, val, test)
    assert "".join(parts) == text
    if test == 0:
        assert parts[2] == ""


def test_cuts_are_at_line_ends_and_near_the_shares() -> None:
    text = "".join(f"line number {i}\n" for i in range(2000))
    train, val, test = cut_document(text, 0.1, 0.05)
    assert train.endswith("\n") and val.endswith("\n")
    assert len(val) / len(text) == pytest.approx(0.1, abs=0.002)
    assert len(test) / len(text) == pytest.approx(0.05, abs=0.002)


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    source = FileSource(tmp_path, (tmp_path / name,))
    for read in (lambda: list(source.documents()), lambda: source.fingerprint):
        with pytest.raises(PippinError) as error:
            read()
        assert error.value.code == "P201"
        assert name in error.value.what
