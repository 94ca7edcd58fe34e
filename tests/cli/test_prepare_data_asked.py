"""tools/prepare_data.py: what was asked for is what is there, and messages name the tool's own flags.

Run: pytest tests/cli/test_prepare_data_asked.py
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from core.data.shards.manifest import load_manifest, open_shards
from core.data.tokenizers.tokenizer import load_tokenizer
from tests.cli.runs import TINY, train_here
from tools import prepare_data
from tools.preparing.looking import show_info


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    monkeypatch.chdir(tmp_path)
    records = [{"body": f"Document {i}: {'abc' * (i % 7 + 1)}"} for i in range(200)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(5_000)))

    def run(*args: object, code: int = 0) -> str:
        found = prepare_data.main([str(a) for a in args])
        said = capsys.readouterr()
        assert found == code, said.out + said.err
        return str(said.out if code == 0 else said.err)

    return run


MAKE = ("book.txt", "--tokenizer", "byte", "--out", "s")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("--test-fraction", "0.2"), "test_fraction: there 0.02, asked 0.2"),
        (("--val-fraction", "0.2"), "val_fraction: there 0.02, asked 0.2"),
        (("--seed", "2"), "seed: there 1, asked 2"),
        (("--tokens-per-shard", "1000"), "tokens per shard: there"),
        (("--max-tokens", "1000"), "how it is read"),
        (("--tokenizer", "char"), "the tokenizer: there byte, asked char"),
    ],
)
def test_shards_made_otherwise_are_not_the_ones_asked_for(
    tool: Any, other: tuple[str, ...], named: str
) -> None:
    tool(*MAKE)
    before = Path("s/manifest.json").read_bytes()
    said = tool(*MAKE, *other, code=2)
    assert said.startswith("P311") and named in said and "--overwrite" in said
    assert Path("s/manifest.json").read_bytes() == before
    tool(*MAKE, *other, "--overwrite")
    assert "exactly this already" in tool(*MAKE, *other)


def test_small_files_of_shards_are_recognised(tool: Any) -> None:
    tool(*MAKE, "--tokens-per-shard", "1000")
    files = load_manifest(Path("s")).splits["train"].files
    assert len(files) > 30 and {file.items for file in files[:-1]} == {1000}
    assert "exactly this already" in tool(*MAKE, "--tokens-per-shard", "1e3")
    assert "tokens per shard: there 1,000" in tool(*MAKE, code=2)


def test_json_is_one_object(tool: Any) -> None:
    for _ in range(2):
        made = json.loads(tool(*MAKE, "--json"))
        assert made.pop("folder") == "s"
        assert made == json.loads(Path("s/manifest.json").read_text())
    ids = np.array([*b"first text", 256, *b"another", 256] * 40, np.uint16)
    ids.tofile("ids.bin")
    made = json.loads(tool("import", "ids.bin", "--tokenizer", "s", "--out", "i", "--json"))
    assert made["splits"]["train"]["tokens"] + made["splits"]["val"]["tokens"] == len(ids)


def test_shown_rows_as_json(tool: Any) -> None:
    tool("docs.jsonl", "--text-field", "body", *MAKE[1:])
    rows = json.loads(tool("show", "s", "--rows", 2, "--json"))
    stream, tokenizer = open_shards(Path("s"), "train"), load_tokenizer(Path("s"))
    for number, row in enumerate(rows):
        ids = stream.tokens(*stream.offsets[number : number + 2].tolist()).tolist()
        assert row["document"] == number and row["ids"] == ids
        assert row["text"] == tokenizer.decode(ids) and set(row["weights"]) == {1.0}
    assert "--rows" in tool("show", "s", "--rows", 0, code=2)


def test_names_that_look_like_markup(tool: Any) -> None:
    folder = Path("[b]x")
    folder.mkdir()
    (folder / "[red]y.txt").write_text("a line of text\n" * 500)
    said = tool("[b]x", "--tokenizer", "byte", "--out", "[/s]")
    assert "--input_file '[/s]'" in said and "[b]x, 1 documents" in said
    assert "[/s]" in tool("info", "[/s]")


def test_long_lines_are_not_wrapped(tool: Any) -> None:
    out = "a/" * 60 + "shards"
    said = tool(*MAKE[:-1], out)
    assert f"python train.py --input_file {out}\n" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--max-tokens", "inf"), "P012"),
        (("--max-tokens", "1e400"), "P012"),
        (("--workers", "nan"), "P012"),
        (("--num-documents", "0.5"), "P012"),
    ],
)
def test_numbers_that_are_none(tool: Any, args: tuple[str, ...], said: str) -> None:
    assert tool(*MAKE, *args, code=2).startswith(said)


def test_a_plot_that_cannot_be_written(tool: Any) -> None:
    tool(*MAKE)
    said = tool("stats", "s", "--plot", "none/here/x.png", code=2)
    assert said.startswith("P312") and "none/here/x.png" in said
    assert tool("stats", "s", "--plot", "x.foo", code=2).startswith("P012")


def test_remedies_are_in_the_words_of_each_command(tool: Any, capsys: Any) -> None:
    make = ("docs.jsonl", "--tokenizer", "byte", "--out", "d")
    said = tool(*make, code=2)
    assert "--text-field body; or leave out what is bad with --on-bad-line skip" in said
    assert "data." not in said
    assert train_here("--input_file", "docs.jsonl", "--backend", "cpu", *TINY, "--dry-run") == 2
    said = capsys.readouterr().err
    assert "try: data.text_field=body; or leave out what is bad with data.on_bad_line=skip" in said


def test_chats_given_to_training_are_prepared(tool: Any, capsys: Any) -> None:
    """A folder as mlx-lm has it, unchanged."""
    for name, count in (("train", 60), ("valid", 9)):
        Path("chats").mkdir(exist_ok=True)
        turns = [
            [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": "!"}]
            for i in range(count)
        ]
        lines = "".join(json.dumps({"messages": one}) + "\n" for one in turns)
        Path("chats", f"{name}.jsonl").write_text(lines)
    args = ("--input_file", "chats", "--backend", "cpu", *TINY, "--dry-run")
    assert train_here(*args) == 0
    assert "nothing was trained" in capsys.readouterr().out
    (folder,) = Path("shards").glob("chats-*")
    assert json.loads((folder / "manifest.json").read_text())["content"] == "chat"


def test_training_leaves_out_bad_lines_where_asked(tool: Any, capsys: Any) -> None:
    lines = Path("docs.jsonl").read_text().splitlines()
    lines[6] = '{"body": "broken'
    Path("docs.jsonl").write_text("\n".join(lines) + "\n")
    args = ("--input_file", "docs.jsonl", "--backend", "cpu", *TINY, "data.text_field=body")
    assert train_here(*args, "--dry-run") == 2
    assert "docs.jsonl:7" in capsys.readouterr().err
    assert train_here(*args, "data.on_bad_line=skip", "--dry-run") == 0
    said = capsys.readouterr()
    assert "1 left out: broken JSON (first: docs.jsonl:7)" in said.out + said.err


def test_billions_fit_the_terminal(tool: Any) -> None:
    tool(*MAKE)
    held = load_manifest(Path("s"))
    train = held.splits["train"].model_copy(
        update={"tokens": 12_345_678_901, "documents": 234_567_890, "text_bytes": 10**11}
    )
    out = io.StringIO()
    console = Console(file=out, width=80, soft_wrap=True)
    show_info(console, Path("s"), held.model_copy(update={"splits": {"train": train}}))
    row = next(line for line in out.getvalue().splitlines() if line.startswith("train"))
    assert row.split()[:5] == ["train", "234,567,890", "12,345,678,901", "100,000.0", "8.10"]
    assert len(row) <= 80


def test_an_import_without_its_tokenizer(tool: Any) -> None:
    np.arange(100, dtype=np.uint16).tofile("ids.bin")
    said = tool("import", "ids.bin", "--tokenizer", "none.json", "--out", "i", code=2)
    assert said.startswith("P301") and "that the ids were made with" in said


def test_shards_without_validation_are_said_to_be(tool: Any) -> None:
    said = tool(*MAKE, "--val-fraction", 0)
    assert "no text for validation" in said
    assert "no text for validation" not in tool(*MAKE[:-1], "t")
