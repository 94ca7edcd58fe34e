"""Text is read as it is, and what cannot be read is an error that says where.

Run: pytest tests/unit/test_data_sources.py
"""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data.reading import readers
from core.data.reading.nearby import InputFile
from core.data.reading.sources import FileSource, StorySource, open_source
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
    (tmp_path / "d.json").write_text("no")
    (tmp_path / "e.py").write_text("no")
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
        "1 files and folders whose names begin with a dot left out",
        "1 files given more than once, read once",
    )


def test_files_that_are_no_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "records.json").write_text('[{"text": "b"}]')
    for name in ("package.json", "x.png", "deep/y.py", ".DS_Store", ".git/config", "deep/.z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    source = open_source(tmp_path)
    assert [d.text for d in source.documents()] == ["a", "b"]
    assert source.notes() == (
        "3 files and folders whose names begin with a dot left out",
        "3 files of kinds that are not read left out",
    )
    assert open_source(tmp_path / "*.txt").notes() == ()


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
    assert error.remedy.startswith("data.text_field=content; or ")
    assert error.remedy.endswith("data.on_bad_line=skip")
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
    (tmp_path / "a.json").write_text("x")
    error = refused(tmp_path)
    assert error.code == "P201" and ".jsonl" in error.found


def test_empty_file_and_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    (tmp_path / "c.tar.gz").write_bytes(b"x")
    assert "0 bytes" in refused(tmp_path / "a.txt").found
    assert "is a .pdf file" in refused(tmp_path / "b.pdf").what
    assert "is a .tar.gz file" in refused(tmp_path / "c.tar.gz").what


def test_any_single_file_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print()")
    assert texts(tmp_path / "main.py") == ["print()"]


def test_large_files_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", 20)
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


def test_several_inputs_are_read_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "b/2.txt", "b/1.md", "a.txt"):
        (tmp_path / name).write_text(name)
    inputs = [tmp_path / "z.txt", tmp_path / "b", str(tmp_path / "*.txt"), tmp_path / "b" / "2.txt"]
    source = open_source(inputs)
    assert [d.text for d in source.documents()] == ["z.txt", "b/1.md", "b/2.txt", "a.txt"]
    assert source.notes() == ("2 files given more than once, read once",)
    other = open_source([inputs[1], inputs[0], inputs[2]])
    assert other.fingerprint != source.fingerprint
    assert source.num_bytes == sum(len(name) for name in ("z.txt", "b/2.txt", "b/1.md", "a.txt"))


NAMES = ("a.txt", "b.jsonl.gz", "c.py", ".d.txt", "e/f.txt", "e/g/h.txt", "e/g/i.JSONL", ".j/k.txt")


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*", "a.txt b.jsonl.gz"),
        ("*.txt", "a.txt"),
        ("*.py", "c.py"),
        ("**", "a.txt b.jsonl.gz e/f.txt e/g/h.txt e/g/i.JSONL"),
        ("**/*.txt", "a.txt e/f.txt e/g/h.txt"),
        ("e/**/*.txt", "e/f.txt e/g/h.txt"),
        ("e/*/h.*", "e/g/h.txt"),
        ("?/f.txt", "e/f.txt"),
        ("[a-b]*", "a.txt b.jsonl.gz"),
        ("**/g/**", "e/g/h.txt e/g/i.JSONL"),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, wanted: str) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    source = open_source(tmp_path / pattern)
    assert isinstance(source, FileSource)
    found = [file.path.relative_to(tmp_path).as_posix() for file in source.files]
    assert " ".join(found) == wanted


def test_patterns_are_relative_and_hold_no_links_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.txt").write_text("out")
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "out.txt")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    source = open_source("**/*.txt")
    assert [d.text for d in source.documents()] == ["a"]
    assert source.notes()[0].startswith("2 links out of the folder")


def test_a_name_with_wildcards_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("none")
    assert texts(tmp_path / "a[1].txt") == ["brackets"]


def test_a_pattern_without_a_match_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    error = refused(tmp_path / "*.jsonl")
    assert error.code == "P201" and error.choices == ((tmp_path / "a.txt").as_posix(),)
    assert "no folder" in refused(tmp_path / "none" / "*.txt").what


def test_names_that_differ_in_case_only_are_all_read(tmp_path: Path) -> None:
    (tmp_path / "Run.txt").write_text("Run")
    (tmp_path / "run.TXT").write_text("run")
    assert texts(tmp_path) == (["Run", "run"] if len(list(tmp_path.iterdir())) == 2 else ["run"])


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path) == ["b"]


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep").mkdir()
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    error = refused(tmp_path)
    assert error.code == "P201" and "deep cannot be read: Permission denied" in error.what


def test_train_and_valid_files_give_the_split(tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl.gz"):
        packed = gzip.compress if name.endswith(".gz") else bytes
        (tmp_path / name).write_bytes(packed(json.dumps({"text": name}).encode()))
    (tmp_path / "README.md").write_text("about")
    source = open_source(tmp_path)
    found = {d.text: d.split for d in source.documents()}
    assert found == {"train.jsonl": "train", "valid.jsonl": "val", "test.jsonl.gz": "test"}
    assert [r.split for r in source.records()] == ["test", "train", "val"]
    assert source.notes() == ("1 README files beside train and validation files left out",)
    assert source.fingerprint != open_source(tmp_path / "*.jsonl*").fingerprint


@pytest.mark.parametrize("second", ["val.txt", "validation.csv", "VALID.jsonl"])
def test_other_names_of_validation(tmp_path: Path, second: str) -> None:
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / second).write_text('{"text": "b"}' if "json" in second else "text\nb")
    assert {d.split for d in open_source(tmp_path).documents()} == {"train", "val"}


@pytest.mark.parametrize("other", ["more.jsonl", "deep/valid.jsonl", "train.jsonl"])
def test_any_other_file_means_no_split(tmp_path: Path, other: str) -> None:
    for name in ("train.txt", "valid.txt" if "train" not in other else "train.md", other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}')
    assert {d.split for d in open_source(tmp_path).documents()} == {None}


def test_bytes_read_grows_to_the_size_of_the_files(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}"} for i in range(3_000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    source = open_source(tmp_path)
    for _ in range(2):
        seen = [source.bytes_read for _ in source.documents()]
        assert len(seen) == 9_000 and seen == sorted(seen) and len(set(seen)) > 3
        assert source.bytes_read == source.num_bytes
    assert not source.streams


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    source = FileSource((InputFile(tmp_path / name, name),), "x")
    for read in (lambda: list(source.documents()), lambda: source.fingerprint):
        with pytest.raises(PippinError) as error:
            read()
        assert error.value.code == "P201"
        assert name in error.value.what


def test_a_link_to_a_file_beside_it_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / ".kept").mkdir()
    (tmp_path / ".kept" / "c.txt").write_text("two")
    for name in ("c.txt", "d.txt"):
        (tmp_path / name).symlink_to(tmp_path / ".kept" / "c.txt")
    source = open_source(tmp_path)
    assert [document.text for document in source.documents()] == ["one", "two"]
    assert "2 files given more than once, read once" in source.notes()
    both = open_source([tmp_path, tmp_path / "a.txt"])
    assert "3 files given more than once, read once" in both.notes()


def test_suggested_are_files_with_text(tmp_path: Path) -> None:
    """No empty ones, none of runs, no settings."""
    here = tmp_path / "here"
    (here / "checkpoints" / "run-1" / "logs").mkdir(parents=True)
    (here / "empty.txt").write_text("")
    (here / "settings.json").write_text("{}")
    for name in ("training_state.json", "tokenizer.pippin.json", "model_card.md", "logs/m.jsonl"):
        (here / "checkpoints" / "run-1" / name).write_text('{"text": "x"}')
    assert refused(here / "x.txt").choices == ()
    (here / "records.json").write_text('[{"text": "a"}]')
    assert refused(here / "x.txt").choices == ((here / "records.json").as_posix(),)


def test_a_device_or_pipe_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path / "pipe"):
        error = refused(path)
        assert error.code == "P201" and error.what == f"{path} is no regular file"
        assert error.choices == ()


def test_the_root_of_the_file_system_is_not_searched() -> None:
    assert refused(Path("/no-such-folder-here/x.txt")).choices == ()
