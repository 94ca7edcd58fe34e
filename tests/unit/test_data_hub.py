"""Datasets in the layout of the Hub give their split, and errors name what there is.

Run: pytest tests/unit/test_data_hub.py
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when the packages are imported: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data.reading import hub
from core.data.reading.hub import HubSource
from core.data.reading.sources import ReadOptions, open_source
from core.errors import PippinError

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train.parquet
  - split: test
    path: en/test.parquet
- config_name: de
  data_files:
  - split: train
    path: de/*.parquet
---
A data set.
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """Two configurations, one with two splits, the other with two files and another text field."""
    folder = tmp_path / "set"
    for part in ("en", "de"):
        (folder / part).mkdir(parents=True)
    for split in ("train", "test"):
        rows = [f"{split} {i}" for i in range(4)]
        table = pa.table({"text": [*rows, " "], "body": ["b"] * 5, "score": [3, 1, None, 2, 9]})
        pq.write_table(table, folder / "en" / f"{split}.parquet")
    for number in (1, 2):
        table = pa.table({"inhalt": [f"Satz {number}{i}\u2028\n\u00fc" for i in range(3)]})
        pq.write_table(table, folder / "de" / f"{number}.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def read(folder: Path, **options: Any) -> list[str]:
    source = open_source(f"hf:{folder}", options=ReadOptions(**options))
    return [document.text for document in source.documents()]


def refused(folder: Path | str, **options: Any) -> PippinError:
    with pytest.raises(PippinError) as error:
        list(open_source(f"hf:{folder}", options=ReadOptions(**options)).documents())
    return error.value


def test_configuration_split_and_field(configs: Path) -> None:
    assert read(configs, config="en") == [f"train {i}" for i in range(4)]
    assert read(configs, config="en", split="test") == [f"test {i}" for i in range(4)]
    wanted = [f"Satz {n}{i}\u2028\n\u00fc" for n in (1, 2) for i in range(3)]
    assert read(configs, config="de", text_field="inhalt") == wanted
    assert read(configs, config="de", text_field="inhalt", num_documents=4) == wanted[:4]


def test_the_size_is_that_of_the_text(tmp_path: Path) -> None:
    """Packed in the file, and beside a column that is not read."""
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [f"{i} " + "the same words again " * 100 for i in range(500)]
    table = pa.table({"text": texts, "other": ["x" * 5_000] * 500})
    pq.write_table(table, folder / "train.parquet", use_dictionary=False)
    source = open_source(f"hf:{folder}")
    size = sum(len(text) for text in texts)
    assert (folder / "train.parquet").stat().st_size < 0.2 * size
    assert source.num_bytes == pytest.approx(size, rel=0.01)
    assert [d.text for d in source.documents()] == texts
    assert source.bytes_read == size


def test_what_is_left_out_is_counted(configs: Path) -> None:
    options = ReadOptions(config="en", score_field="score", score_min=2)
    source = open_source(f"hf:{configs}", options=options)
    assert [d.text for d in source.documents()] == ["train 0", "train 3"]
    assert set(source.notes()) == {
        "2 records left out, as score is below 2",
        "1 empty documents left out",
    }
    assert source.name == "set-en" and source.streams
    assert 0 < source.bytes_read <= source.num_bytes


def test_records_have_all_fields(configs: Path) -> None:
    source = open_source(f"hf:{configs}", options=ReadOptions(config="en", num_documents=2))
    first, second = source.records()
    assert first.fields == {"text": "train 0", "body": "b", "score": 3}
    assert first.origin == "set-en:1" and second.where.endswith("train, record 2")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """JSON lines, whose names tell the splits."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, texts in (("train", ["a\u2028", "\u00fc\n"]), ("test", ["b"])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def _listed(folder: Path, path: str) -> Path:
    """A dataset whose README.md names one file for training."""
    folder.mkdir(exist_ok=True)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
    (folder / "README.md").write_text(f"{card}    path: {path}\n---\n")
    return folder


@pytest.mark.parametrize("way", ["relative", "absolute", "folder", "link"])
def test_a_folder_reads_nothing_outside_itself(way: str, tmp_path: Path) -> None:
    outside = tmp_path / "secrets" / "secret.jsonl"
    outside.parent.mkdir()
    outside.write_text('{"text": "mine"}\n')
    paths = {
        "relative": "../secrets/secret.jsonl",
        "absolute": str(outside),
        "folder": "in/*.jsonl",
    }
    folder = _listed(tmp_path / "set", paths.get(way, "train.jsonl"))
    if way == "link":
        (folder / "train.jsonl").symlink_to(outside)
    if way == "folder":
        (folder / "in").symlink_to(outside.parent)
    error = refused(folder)
    assert error.code == "P201" and "not below that folder" in error.what
    assert str(outside) in error.what and str(outside) in error.remedy
    with pytest.raises(PippinError, match="not below"):
        _ = open_source(f"hf:{folder}").fingerprint


def test_an_address_is_not_below_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PippinError, match=r"not below that folder: https://example.org/a.jsonl"):
        hub._check_inside(["https://example.org/a.jsonl"], tmp_path)


@pytest.mark.parametrize(
    ("cache", "blobs", "fine"),
    [
        ("datasets--me--set", "datasets--me--set", True),
        ("datasets--me--set", "datasets--me--other", False),
        ("backup", "backup", False),
    ],
)
def test_a_cache_of_the_hub_links_into_its_own_blobs(
    cache: str, blobs: str, fine: bool, tmp_path: Path
) -> None:
    blob = tmp_path / blobs / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text('{"text": "kept"}\n')
    (tmp_path / cache / "snapshots").mkdir(parents=True)
    folder = _listed(tmp_path / cache / "snapshots" / "abc", "train.jsonl")
    (folder / "train.jsonl").symlink_to(blob)
    if not fine:
        assert "not below that folder" in refused(folder).what
        return
    assert read(folder) == ["kept"]
    before = open_source(f"hf:{folder}").fingerprint
    blob.write_text('{"text": "more"}\n')
    assert open_source(f"hf:{folder}").fingerprint != before


def test_the_fingerprint_is_of_what_is_read(tmp_path: Path) -> None:
    """Also where a walk through the folder would leave it out."""
    folder = _listed(tmp_path / "set", ".kept/train.jsonl")
    (folder / ".kept").mkdir()
    file = folder / ".kept" / "train.jsonl"
    file.write_text('{"text": "one"}\n')
    assert read(folder) == ["one"]
    before = open_source(f"hf:{folder}").fingerprint
    file.write_text('{"text": "two"}\n')
    assert open_source(f"hf:{folder}").fingerprint != before


def test_splits_by_file_names(plain: Path) -> None:
    assert read(plain) == ["a\u2028", "\u00fc\n"]
    assert read(plain, split="test") == ["b"]
    (plain / "train.jsonl").unlink()
    assert read(plain) == ["b"]  # the only split there is


def test_unknown_configuration_names_those_there_are(configs: Path) -> None:
    error = refused(configs, config="fr")
    assert error.code == "P201" and error.choices == ("en", "de") and "'fr'" in error.what
    assert refused(configs).choices == ("en", "de")


def test_unknown_split_names_those_there_are(configs: Path) -> None:
    error = refused(configs, config="en", split="valid")
    assert error.code == "P201" and error.choices == ("train", "test")


def test_missing_text_field_names_the_columns(configs: Path, plain: Path) -> None:
    error = refused(plain, text_field="content")
    assert error.code == "P202" and error.choices == ("text",)
    error = refused(configs, config="en", text_field="content")
    assert error.code == "P202" and error.choices == ("text", "body")
    error = refused(configs, config="de")
    assert error.choices == ("inhalt",)
    assert "is not a string" in refused(configs, config="en", text_field="score").what


def test_records_that_are_no_text_are_skipped_on_request(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table = pa.table({"text": ["a", None, "c"]})
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    assert "record 2" in refused(tmp_path / "set").what
    assert read(tmp_path / "set", on_bad_line="skip") == ["a", "c"]


def test_damage_says_where(configs: Path, plain: Path) -> None:
    (plain / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    error = refused(plain)
    assert error.code == "P202" and "cannot be read after record 0" in error.what
    (configs / "de" / "2.parquet").write_bytes(b"PAR1")
    error = refused(configs, config="de", text_field="inhalt")
    assert error.code == "P202" and "cannot be read after record 3" in error.what


def test_no_network_says_what_to_do() -> None:
    error = refused("nobody/nothing")
    assert error.code == "P201" and "cannot be reached" in error.what
    assert "HF_HUB_OFFLINE" in error.found and "hf download" in error.remedy


def test_no_such_folder(tmp_path: Path) -> None:
    error = refused(tmp_path / "none")
    assert error.code == "P201" and "there is no folder" in error.what
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").code == "P201"


def test_code_in_a_dataset_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    try:
        read(folder)
    except PippinError as error:
        assert error.code == "P201"
    assert not (tmp_path / "ran").exists()


def test_a_folder_has_no_revision(configs: Path) -> None:
    assert refused(configs, config="en", revision="v1").code == "P010"


def test_fingerprint_of_a_folder_is_over_content(configs: Path, tmp_path: Path) -> None:
    options = ReadOptions(config="en")
    before = HubSource(str(configs), options).fingerprint
    shutil.copytree(configs, tmp_path / "moved")
    assert HubSource(str(tmp_path / "moved"), options).fingerprint == before
    others = [
        ReadOptions(config="de"),
        ReadOptions(config="en", split="test"),
        ReadOptions(config="en", num_documents=2),
    ]
    assert len({HubSource(str(configs), o).fingerprint for o in others} | {before}) == 4
    (configs / "de" / "1.parquet").unlink()
    assert HubSource(str(configs), options).fingerprint != before


def test_what_is_the_default_may_be_given(configs: Path, plain: Path) -> None:
    """The same records are the same data set."""

    def of(folder: Path, **options: Any) -> str:
        return HubSource(str(folder), ReadOptions(**options)).fingerprint

    assert of(configs, config="en") == of(configs, config="en", split="train")
    assert of(configs, config="de") == of(configs, config="de", split="train")
    assert of(configs, config="en") != of(configs, config="en", split="test")
    assert of(plain) == of(plain, split="train") == of(plain, config="default")
    with pytest.raises(PippinError, match="no split 'dev'"):
        read(configs, config="en", split="dev")


def test_fingerprint_of_the_hub_needs_no_network() -> None:
    def of(revision: str | None) -> str:
        return HubSource("nobody/nothing", ReadOptions(revision=revision)).fingerprint

    assert of(None) == of(None)
    assert len({of(None), of("v1"), of("0" * 40)}) == 3
    pinned = ReadOptions(revision="0" * 40, split="train")
    assert HubSource("nobody/nothing", pinned).fingerprint == of("0" * 40)
    assert HubSource("nobody/nothing").num_bytes == 0


def test_a_missing_or_old_package_is_named(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "__version__", "3.6.0")
        assert refused(configs).code == "P502"
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refused(configs)
    assert error.code == "P502" and error.remedy == "pip install 'datasets>=4'"
