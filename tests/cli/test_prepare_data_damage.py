"""tools/prepare_data.py: damage is found before anything is said to be there, and can be replaced.

Run: pytest tests/cli/test_prepare_data_damage.py
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data.shards.manifest import load_manifest, open_shards
from tools import prepare_data

MAKE = ("docs.jsonl", "--tokenizer", "byte", "--out", "s")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    monkeypatch.chdir(tmp_path)
    records = [{"text": f"Document {i}: {'abc' * (i % 7 + 1)}"} for i in range(200)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def run(*args: object, code: int = 0) -> str:
        found = prepare_data.main([str(a) for a in args])
        said = capsys.readouterr()
        assert found == code, said.out + said.err
        return str(said.out if code == 0 else said.err)

    return run


def shorten() -> None:
    os.truncate("s/train_00000.bin", 1000)


def flip() -> None:
    path = Path("s/val_00000.bin")
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def drop_tokenizer() -> None:
    Path("s/tokenizer.pippin.json").unlink()


@pytest.mark.parametrize("damage", [shorten, flip, drop_tokenizer])
def test_damaged_shards_are_not_said_to_be_there(tool: Any, damage: Any) -> None:
    tool(*MAKE)
    before = {path.name: path.read_bytes() for path in Path("s").glob("*.bin")}
    damage()
    said = tool(*MAKE, code=2)
    assert said.startswith("P203") and "--overwrite" in said
    tool(*MAKE, "--overwrite")
    assert {path.name: path.read_bytes() for path in Path("s").glob("*.bin")} == before
    assert "exactly this already" in tool(*MAKE)


def test_info_compares_sizes(tool: Any) -> None:
    tool(*MAKE)
    shorten()
    said = tool("info", "s", code=2)
    assert said.startswith("P203") and "train_00000.bin: 1,000 bytes instead of" in said


@pytest.mark.parametrize("verb", ["verify", "show", "stats", "info"])
def test_a_missing_tokenizer_is_damage(tool: Any, verb: str) -> None:
    tool(*MAKE)
    drop_tokenizer()
    said = tool(verb, "s", code=2)
    assert said.startswith("P203") and "tokenizer.pippin.json" in said and "--tokenizer" not in said


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"format": "pippin-shards", "version": 1}'])
def test_shards_of_another_version_are_replaced_where_asked(tool: Any, content: str) -> None:
    tool(*MAKE)
    expected = Path("s/manifest.json").read_text()
    Path("s/manifest.json").write_text(content)
    said = tool(*MAKE, code=2)
    assert said.startswith("P203") and "--overwrite" in said
    assert Path("s/manifest.json").read_text() == content
    tool(*MAKE, "--overwrite")
    assert Path("s/manifest.json").read_text() == expected


def test_folders_of_others_are_never_replaced(tool: Any) -> None:
    Path("s").mkdir()
    Path("s/manifest.json").write_text('{"name": "a web page"}')
    assert tool(*MAKE, "--overwrite", code=2).startswith("P311")
    assert [path.name for path in Path("s").iterdir()] == ["manifest.json"]


def test_shards_with_something_of_others_are_not_replaced(tool: Any) -> None:
    tool(*MAKE)
    Path("s/notes.txt").write_text("mine")
    said = tool(*MAKE, "--overwrite", code=2)
    assert said.startswith("P311") and "notes.txt" in said
    assert Path("s/notes.txt").read_text() == "mine" and load_manifest(Path("s"))
    Path("s/notes.txt").rename("notes.txt")
    tool(*MAKE, "--overwrite")


def test_folders_beside_the_shards_survive(tool: Any) -> None:
    for name in (".tmp-mine", ".work-thesis"):
        Path(name).mkdir()
        os.utime(name, (0, 0))
    tool(*MAKE)
    np.array([*b"text of others", 256] * 60, np.uint16).tofile("ids.bin")
    tool("import", "ids.bin", "--tokenizer", "s", "--out", "i")
    assert Path(".tmp-mine").is_dir() and Path(".work-thesis").is_dir()
    assert not [path.name for path in Path("i").glob(".*")]


def test_a_link_out_of_the_folder_is_found(tool: Any) -> None:
    tool(*MAKE)
    Path("s/train_00000.bin").rename("elsewhere.bin")
    Path("s/train_00000.bin").symlink_to(Path("elsewhere.bin").resolve())
    said = tool("verify", "s", code=2)
    assert said.startswith("P203") and "link out of the folder" in said


CHAT = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}


@pytest.mark.parametrize(
    ("first", "flags"),
    [
        ({"id": 1}, ()),
        ({"id": 1}, ("--format", "chat")),
        ({"text": "a title"}, ("--format", "chat")),
    ],
)
def test_one_unknown_record_does_not_decide(
    tool: Any, first: dict[str, Any], flags: tuple[str, ...]
) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"{i}"}, *CHAT["messages"][1:]]}
        for i in range(80)
    ]
    Path("c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [first, *chats]))
    said = tool("c.jsonl", *MAKE[1:], "--on-bad-line", "skip", *flags)
    manifest = load_manifest(Path("s"))
    assert manifest.content == "chat" and manifest.source.documents == 80
    assert "1 left out" in said and "c.jsonl:1" in said


def test_a_bad_first_record_of_chats_is_named(tool: Any) -> None:
    Path("c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"id": 1}, CHAT, CHAT]))
    said = tool("c.jsonl", *MAKE[1:], "--format", "chat", code=2)
    assert said.startswith("P202") and "c.jsonl:1" in said


@pytest.mark.parametrize(
    "args",
    [
        (*MAKE, "--seed", "99999999999999999999"),
        (
            "import",
            "docs.jsonl",
            "--tokenizer",
            "s",
            "--out",
            "i",
            "--seed",
            "99999999999999999999",
        ),
        (*MAKE, "--vocab-size", "5000"),
        ("plan", "docs.jsonl", "--tokenizer", "char", "--vocab-size", "5000"),
        (*MAKE, "--tokens-per-shard", "1"),
        ("plan", "docs.jsonl", "--tokens-per-shard", "999"),
    ],
)
def test_flags_without_an_effect_or_sense_are_refused(tool: Any, args: tuple[str, ...]) -> None:
    assert tool(*args, code=2).startswith("P012")


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_a_file_is_no_folder_of_shards(tool: Any, verb: str) -> None:
    said = tool(verb, "docs.jsonl", code=2)
    assert said.startswith("P203") and "a file, not a folder" in said


def test_an_empty_split_has_no_statistics(tool: Any) -> None:
    tool(*MAKE, "--test-fraction", 0)
    assert open_shards(Path("s"), "test").num_tokens == 0
    said = tool("stats", "s", "--split", "test", code=2)
    assert said.startswith("P201") and "--split train" in said
    assert not list(Path().glob("*.png"))


def test_shards_of_a_newer_version_are_not_to_be_replaced(tool: Any) -> None:
    tool(*MAKE)
    path = Path("s/manifest.json")
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    for args in (MAKE, ("info", "s"), ("verify", "s")):
        said = tool(*args, code=2)
        assert said.startswith("P203") and "git pull" in said
        assert "--overwrite" not in said and "rm -r" not in said


def test_import_can_be_quiet(tool: Any) -> None:
    tool(*MAKE)
    np.arange(256, dtype="<u2").tofile("train.bin")
    args = ("import", "train.bin", "--tokenizer", "s", "--format", "nanogpt")
    assert tool(*args, "--out", "loud") != ""
    assert tool(*args, "--out", "quiet", "--quiet") == ""
    assert load_manifest(Path("quiet")).tokens == load_manifest(Path("loud")).tokens > 0
