"""What is taken from records: limits, scores, options.

Run: pytest tests/unit/test_data_selection.py
"""

from dataclasses import replace
from pathlib import Path

import pytest

from core.data.reading.sources import ReadOptions, open_source
from core.errors import PippinError


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in open_source(path, field).documents()]


def refused(path: Path, field: str = "text") -> PippinError:
    with pytest.raises(PippinError) as error:
        list(open_source(path, field).documents())
    return error.value


def test_num_documents_counts_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{t}"}}\n' for t in ["", "1", " ", "2"]))
    (tmp_path / "b.txt").write_text("3")

    def kept(count: int) -> list[str]:
        source = open_source(tmp_path, options=ReadOptions(num_documents=count))
        return [d.text for d in source.documents()]

    assert [kept(n) for n in (1, 2, 3, 4)] == [["1"], ["1", "2"], ["1", "2", "3"], ["1", "2", "3"]]


def test_scores_filter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    scores = ["3", "2.5", "1e0", "null", '"4"', "2"]
    path.write_text("".join(f'{{"text": "{i}", "q": {s}}}\n' for i, s in enumerate(scores)))
    options = ReadOptions(score_field="q", score_min=2.5)
    source = open_source(path, options=options)
    assert [d.text for d in source.documents()] == ["0", "1", "4"]
    assert source.notes() == ("3 records left out, as q is below 2.5",)
    assert [r.fields["text"] for r in source.records()] == ["0", "1", "4"]
    (tmp_path / "b.csv").write_text("text,q\nx,9\ny,1\n")
    assert [d.text for d in open_source(tmp_path / "b.csv", options=options).documents()] == ["x"]


def test_a_score_that_is_missing_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "p": 1, "q": 2}\n{"text": "b", "p": 1}\n{"text":"c","q":"x"}\n')
    options = ReadOptions(score_field="q", score_min=1)
    with pytest.raises(PippinError, match="'q' is missing") as error:
        list(open_source(path, options=options).documents())
    assert error.value.choices == ("p",) and f"{path}:2" in error.value.what
    source = open_source(path, options=replace(options, on_bad_line="skip"))
    assert [d.text for d in source.documents()] == ["a"]
    assert source.notes() == (
        "1 left out: the score field 'q' is missing (first: a.jsonl:2)",
        "1 left out: the score field 'q' is not a number (first: a.jsonl:3)",
    )


def test_options_that_contradict_are_all_named() -> None:
    with pytest.raises(PippinError) as error:
        ReadOptions(num_documents=0, score_min=1.0)
    assert error.value.code == "P010" and len(error.value.found.splitlines()) == 2


def test_hub_options_need_a_hub_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(PippinError, match="config, split is for datasets") as error:
        open_source(tmp_path, options=ReadOptions(config="en", split="train"))
    assert error.value.code == "P010"
    with pytest.raises(PippinError, match="on its own"):
        open_source(["hf:x", tmp_path])


def test_every_option_is_in_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    options = [
        ReadOptions(),
        ReadOptions(text_field="body"),
        ReadOptions(on_bad_line="skip"),
        ReadOptions(num_documents=3),
        ReadOptions(score_field="q", score_min=1),
        ReadOptions(score_field="q", score_min=2),
    ]
    prints = {open_source(tmp_path / "a.txt", options=one).fingerprint for one in options}
    assert len(prints) == len(options)
    by_name = open_source(tmp_path / "a.txt", "body").fingerprint
    assert by_name == open_source(tmp_path / "a.txt", options=options[1]).fingerprint
