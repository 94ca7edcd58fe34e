"""A JSON array is read as records, element by element; other JSON is refused.

Run: pytest tests/unit/test_data_json.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.data.chat import ChatSource
from core.data.reading import json_arrays, readers
from core.data.reading.bad_lines import Tally
from core.data.reading.sources import open_source
from core.errors import PippinError
from tests.data_helpers import PACKERS, TEXT, read, same_folder, write

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
@given(
    rows=st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=5),
    indent=st.sampled_from([None, 2]),
    plain=st.booleans(),
    block=st.integers(1, 40),
)
@pytest.mark.parametrize("packed", PACKERS)
def test_the_elements_come_back(
    tmp_path: Path,
    packed: str,
    rows: list[dict[str, Any]],
    indent: int | None,
    plain: bool,
    block: int,
) -> None:
    """Whatever block of the file is read at once: against what Python's own reader gives."""
    content = json.dumps(rows, indent=indent, ensure_ascii=plain).encode()
    path = write(tmp_path / f"x.json{packed}", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "BLOCK_BYTES", block)
        records = read(path)
    assert [r.fields for r in records] == json.loads(content)
    assert [r.origin for r in records] == [f"x.json{packed}:{i + 1}" for i in range(len(rows))]


def test_alpaca_is_chats(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(3)]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows, indent=1))
    source = ChatSource(open_source(path))
    assert source.content == "chat"
    assert [d.text.count("Say") for d in source.documents()] == [1, 1, 1]


def refused(content: bytes, folder: Path, name: str = "x.json") -> PippinError:
    with pytest.raises(PippinError) as error:
        read(write(folder / name, content))
    assert error.value.code == "P202"
    return error.value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "no JSON array of objects"),
        (b'"text"', "no JSON array of objects"),
        (b"", "no JSON array of objects"),
        (b"plain text", "no JSON array of objects"),
        (b'[{"text": "a"}, "b"]', "x.json:2 is no JSON object"),
        (b'[{"text": "a"}, 12]', "x.json:2 is no JSON object"),
        (b'[{"text": "a"}, {"text": "b", "text": "c"}]', "there twice"),
        (b'[{"text": NaN}]', "NaN is no JSON number"),
        (b'[{"text": "a"}, {"text": ', "record 2 is broken JSON"),
        (b'[{"text": "a"}, ]', "record 2 is broken JSON"),
        (b'[{"text": "a"} {"text": "b"}]', "after record 1"),
        (b'[{"text": "a"}', "after record 1"),
        (b'[{"text": "a"}] [1]', "after the end of the array"),
        (b'[{"text": "a"},\n{"text": "\xe9"}]', "x.json:2 is not valid UTF-8"),
        ('[{"text": "a"}]'.encode("utf-16-le"), "UTF-16"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 1_000_000])
def test_other_json_is_refused(
    content: bytes, words: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block < len(content) // 1000 or ("UTF-16" in words and block < 1_000_000):
        return  # the first is slow; UTF-16 is known by the first block, which is never so small
    monkeypatch.setattr(json_arrays, "BLOCK_BYTES", block)
    assert words in refused(content, tmp_path).what


def test_json_lines_under_the_wrong_name_are_told_of(tmp_path: Path) -> None:
    error = refused(b'{"text": "a"}\n{"text": "b"}\n', tmp_path)
    assert "each line is a record" in error.found
    assert f"cp '{tmp_path / 'x.json'}' '{tmp_path / 'x.jsonl'}'" in error.remedy


def test_what_is_bad_can_be_left_out(tmp_path: Path) -> None:
    tally = Tally("skip")
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"}, 3, {"t": NaN}, {"text": "b"}, {"te')
    records = list(readers.read_records(path, tally))
    assert [r.fields["text"] for r in records] == ["a", "b"]
    assert [r.origin for r in records] == ["x.json:1", "x.json:4"]
    assert sum(tally.bad.values()) == 3 and tally.first["no JSON object"] == "x.json:2"


def test_no_more_is_held_than_an_element_and_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An element beyond the limit ends the reading long before the end of the file."""
    monkeypatch.setattr(readers, "PART_BYTES", 2_000)
    monkeypatch.setattr(json_arrays, "BLOCK_BYTES", 500)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "a" * 900}] * 50))
    longest = 0
    more = json_arrays._Window._more

    def watched(self: json_arrays._Window) -> bool:
        nonlocal longest
        found = more(self)
        longest = max(longest, len(self.text))
        return found

    monkeypatch.setattr(json_arrays._Window, "_more", watched)
    assert len(read(path)) == 50
    assert longest <= 2_000
    path.write_text('[{"text": "' + "a" * 100_000 + '"}]')
    with pytest.raises(PippinError, match=r"longer than 0.002 MB"):
        read(path)
    assert longest <= 2_000 + 2 * 500
