"""tools/train_tokenizer.py: the same tokenizer for the same text, written whole or not at all.

Run: python -m pytest tests/cli/test_train_tokenizer.py
"""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.data.tokenizers.tokenizer import load_tokenizer
from core.data.tokenizers.training import train_tokenizer
from tools import train_tokenizer as tool

ROOT = Path(__file__).resolve().parents[2]
LINES = [f"line {i} of the story about {i % 7} foxes and {i % 11} dogs" for i in range(3_000)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "story.txt"
    path.parent.mkdir()
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def run_tool(capsys: Any, *args: object) -> tuple[int, str, str]:
    code = tool.main([str(a) for a in args])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_as_a_user_types_it(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "in/story.txt"]
    command += ["--vocab_size", "340", "--out", "tok"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "tok" / "tokenizer.model"
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert f"fingerprint  {hashlib.sha256(file.read_bytes()).hexdigest()}" in done.stdout
    assert "pieces       340" in done.stdout and "bytes/token" in done.stdout
    assert "prepare_data.py in/story.txt --tokenizer tok/tokenizer.model" in done.stdout


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_small_text_is_used_whole(kind: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "t.model"
    args = (text, "--kind", kind, "--vocab-size", 350, "--out", out, "--json")
    code, shown, errors = run_tool(capsys, *args)
    assert code == 0, errors
    report = json.loads(shown)
    made = load_tokenizer(out)
    assert (made.kind, made.vocab_size) == (kind, report["vocab_size"])
    assert made.fingerprint == report["fingerprint"]
    if report["held_out_bytes"] == 0:
        assert made.fingerprint == train_tokenizer(kind, [text.read_text()], 350).fingerprint
    ids = made.encode(text.read_text())
    assert report["bytes_per_token"] == pytest.approx(text.stat().st_size / len(ids), rel=0.1)


def test_same_text_and_seed_same_tokenizer(text: Path, tmp_path: Path, capsys: Any) -> None:
    """The text is larger than the sample, in one file or several, packed or not."""
    blocks = [f"{word} {i} " * 900 for i in range(40) for word in ("fox", "dog", "newt")]
    for i, block in enumerate(blocks):
        (text.parent / f"{i:03}.txt").write_text(block)
    text.unlink()
    packed = tmp_path / "all.jsonl.gz"
    with gzip.open(packed, "wt") as stream:
        for block in blocks:
            stream.write(json.dumps({"body": block}) + "\n")
    prints = []
    for name, seed, given in (
        ("a", 1, [text.parent]),
        ("b", 1, [packed, "--text-field", "body"]),
        ("c", 2, [text.parent]),
    ):
        out = tmp_path / f"{name}.model"
        small = ("--sample-mb", "0.1", "--vocab-size", "300", "--seed", seed, "--json")
        code, shown, errors = run_tool(capsys, *given, *small, "--out", out)
        assert code == 0, errors
        report = json.loads(shown)
        assert 50_000 < report["sample_bytes"] <= 100_000 < report["text_bytes"]
        assert report["held_out_bytes"] > 0
        prints.append(report["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_little_text_is_said(kind: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "t.model"
    code, shown, _ = run_tool(capsys, text, "--kind", kind, "--out", out)
    size = load_tokenizer(out).vocab_size
    assert code == 0 and size < 32_000
    assert f"32,000 pieces were asked for, {size:,} came out" in shown
    assert f"ask for {size:,}" in shown


def test_every_character_is_known(tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "t.txt"
    characters = "".join(chr(0x4E00 + i) for i in range(300))
    text.write_text("".join(f"{c}{'a' * 9_998}\n" for c in characters), encoding="utf-8")
    args = ("--kind", "char", "--sample-mb", "0.05", "--out", tmp_path / "c.json")
    assert run_tool(capsys, text, *args)[0] == 0
    made = load_tokenizer(tmp_path / "c.json")
    assert made.unknown_characters(characters + "a\n") == ()


def test_byte_needs_no_text(tmp_path: Path, capsys: Any) -> None:
    code, shown, _ = run_tool(capsys, "--kind", "byte", "--out", tmp_path / "tok")
    assert code == 0 and "byte" in shown
    assert load_tokenizer(tmp_path / "tok").encode("A") == [65]


def test_nothing_is_overwritten_unasked(text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "t.json"
    out.write_text("mine")
    args = (text, "--kind", "char", "--out", out)
    code, _, errors = run_tool(capsys, *args)
    assert code == 2 and "P012" in errors and "--overwrite" in errors
    assert out.read_text() == "mine"
    assert run_tool(capsys, *args, "--overwrite")[0] == 0
    assert load_tokenizer(out).kind == "char"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "t.json"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("x.txt", "--out", "t.json"), "does not end in .model"),
        (("x.txt", "--kind", "char", "--out", "t.model"), "does not end in .json"),
        (("x.txt", "--vocab-size", "100", "--out", "t.model"), "--vocab-size is 100"),
        (("x.txt", "--kind", "byte", "--vocab-size", "400", "--out", "t"), "no effect"),
        (("--out", "t.model"), "INPUT is missing"),
        (("x.txt",), "--out"),
        (("x.txt", "--kind", "word", "--out", "t"), "invalid choice"),
        (("x.txt", "--sample-mb", "nan", "--out", "t"), "--sample-mb"),
        (("none.txt", "--out", "t"), "P201"),
    ],
)
def test_wrong_command_lines(
    args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_tool(capsys, *args)
    assert code == 2 and message in errors
    assert not list(tmp_path.rglob("*.model")) and not list(tmp_path.rglob("*.json"))


def test_a_bad_line_stops_or_is_skipped(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(
        "\n".join([*(json.dumps({"text": line}) for line in LINES[:500]), "{broken", ""])
    )
    args = (data, "--kind", "char", "--out", tmp_path / "c.json")
    code, _, errors = run_tool(capsys, *args)
    assert code == 2 and "d.jsonl:501" in errors and not (tmp_path / "c.json").exists()
    code, shown, _ = run_tool(capsys, *args, "--on-bad-line", "skip")
    assert code == 0 and "note" in shown


def test_a_full_disk_leaves_what_was_there(
    text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "t.json"
    args = (text, "--kind", "char", "--out", out)
    assert run_tool(capsys, *args)[0] == 0
    before = out.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.durable.flush_to_disk", full)
    text.write_text("another text")
    code, _, errors = run_tool(capsys, *args, "--overwrite")
    assert code == 2 and errors.startswith("P312") and "No space left" in errors
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "t.json"]


def test_records_are_chosen_and_the_next_command_repeats_it(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "d.jsonl"
    records = ({"body": chr(97 + i % 26), "score": i} for i in range(100))
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    chosen = ("--text-field", "body", "--score-field", "score", "--score-min", "90")
    args = (data, "--kind", "char", "--out", tmp_path / "c.json", *chosen)
    code, shown, errors = run_tool(capsys, *args)
    assert code == 0, errors
    wanted = sorted({chr(97 + i % 26) for i in range(90, 100)})
    made = load_tokenizer(tmp_path / "c.json")
    assert [made.decode([i]) for i in range(len(wanted))] == wanted
    assert f"{data} --text-field body --score-field score --score-min 90.0 --tokenizer" in shown


def test_conversations_are_text_too(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "xyz"}, {"role": "assistant", "content": "abc"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    code, _, errors = run_tool(capsys, data, "--kind", "char", "--out", tmp_path / "c.json")
    assert code == 0, errors
    made = load_tokenizer(tmp_path / "c.json")
    assert made.unknown_characters("abcxyz\n") == () and made.unknown_characters("q") == ("q",)


def test_a_remedy_names_the_flags_of_this_tool(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"body": "x"}\n')
    code, _, errors = run_tool(capsys, data, "--out", tmp_path / "t.model")
    assert code == 2 and "try: --text-field body; or" in errors and "data." not in errors
