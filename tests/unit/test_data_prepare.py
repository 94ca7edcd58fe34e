"""Text becomes shards once; nothing of validation is trained on; nothing half-written stays.

Run: pytest tests/unit/test_data_prepare.py
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from core.data.preparing.prepare import Prepared, prepare
from core.data.preparing.scan import scan_source, split_items
from core.data.reading.documents import Document
from core.data.shards.manifest import SourceInfo, document_offsets, load_manifest, open_shards
from core.data.split import SPLITS, Split
from core.data.tokenizers.training import train_tokenizer
from core.errors import PippinError
from core.paths import PROJECT_ROOT
from tools import prepare_data

DOCUMENTS = [
    f"Document {i}: {'abcdefghij'[i % 10] * (i % 13 + 3)} \u00e9\r\n end" for i in range(300)
]


def run(path: Path | None, shards_dir: Path, **changes: Any) -> Prepared:
    options: dict[str, Any] = {"seq_len": 16, "seed": 1, "tokenizer": "byte"}
    return prepare(path, shards_dir=shards_dir, **{**options, **changes})


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    return path


def documents(made: Prepared, split: Split) -> list[str]:
    """The text of each document of a split, decoded from its ids; checks the `</s>` at its end."""
    stream, offsets = open_shards(made.folder, split), document_offsets(made.folder, split)
    found = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        ids = stream.tokens(start, end).tolist()
        assert ids[-1] == made.tokenizer.eos_id and made.tokenizer.eos_id not in ids[:-1]
        found.append(made.tokenizer.decode(ids[:-1]))
    return found


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_every_document_is_in_one_split_and_byte_exact(
    jsonl: Path, tmp_path: Path, tokenizer: str
) -> None:
    made = run(jsonl, tmp_path / "s", tokenizer=tokenizer, vocab_size=400, val_fraction=0.1)
    found = {split: documents(made, split) for split in SPLITS}
    assert sorted(t for texts in found.values() for t in texts) == sorted(DOCUMENTS)
    order = {text: i for i, text in enumerate(DOCUMENTS)}
    for texts in found.values():
        assert texts == sorted(texts, key=order.__getitem__)
    assert not set(found["train"]) & (set(found["val"]) | set(found["test"]))
    assert all(found.values())
    sizes = {split: sum(len(t.encode()) for t in texts) for split, texts in found.items()}
    assert sizes == {split: made.manifest.splits[split].text_bytes for split in SPLITS}
    assert made.manifest.source.whole_documents


def test_one_book_is_cut_into_beginning_and_tails(tmp_path: Path) -> None:
    text = "".join(f"Line {i} of the book.\n" for i in range(3000))
    (tmp_path / "book.txt").write_text(text)
    made = run(tmp_path / "book.txt", tmp_path / "s")
    parts = [documents(made, split) for split in SPLITS]
    assert [len(p) for p in parts] == [1, 1, 1]
    assert "".join(p[0] for p in parts) == text
    assert not made.manifest.source.whole_documents
    assert made.name == "book"


def test_bpe_is_trained_on_the_training_split_alone(jsonl: Path, tmp_path: Path) -> None:
    """A change of a validation document changes its text, and not the tokenizer."""
    first = run(jsonl, tmp_path / "s", tokenizer="bpe", vocab_size=400, val_fraction=0.1)
    held_out = documents(first, "val")[0]
    kept = documents(first, "train")
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in kept))
    assert held_out not in kept
    assert train_tokenizer("bpe", kept, 400).fingerprint == first.tokenizer.fingerprint
    assert train_tokenizer("bpe", DOCUMENTS, 400).fingerprint != first.tokenizer.fingerprint


def test_reused_until_something_that_matters_changes(jsonl: Path, tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []

    def again(**changes: Any) -> Prepared:
        lines.clear()
        return run(
            jsonl,
            tmp_path / "s",
            report=lambda phase, facts, result, seconds: lines.append((phase, result)),
            **changes,
        )

    first = again()
    assert not first.reused
    assert lines == [("data", "read"), ("tokenizer", "trained"), ("shards", "written")]
    second = again()
    assert second.reused and second.folder == first.folder
    assert lines == [("shards", "reused")]
    assert again(seq_len=8).reused  # windows are no part of the shards
    assert again(tokenizer=str(first.folder)).reused  # the same tokenizer, by path
    others = [
        again(seed=2),
        again(val_fraction=0.05),
        again(test_fraction=0.05),
        again(tokenizer="char"),
        again(tokenizer="bpe", vocab_size=300),
        again(tokenizer="bpe", vocab_size=310),
    ]
    assert not any(other.reused for other in others)
    assert len({other.folder for other in (first, *others)}) == 7
    assert len({other.manifest_sha256 for other in (first, *others)}) == 7
    jsonl.write_text(jsonl.read_text().replace("Document 7:", "Document 8:"))
    assert not again().reused


def test_resolved_configuration_finds_its_shards(jsonl: Path, tmp_path: Path) -> None:
    """Little text gives fewer pieces; a resumed run asks for the number that came out."""
    first = run(jsonl, tmp_path / "s", tokenizer="bpe", vocab_size=5000)
    came_out = first.tokenizer.vocab_size
    assert came_out < 5000
    second = run(jsonl, tmp_path / "s", tokenizer="bpe", vocab_size=came_out)
    assert second.reused and second.manifest_sha256 == first.manifest_sha256


def test_shards_made_again_with_the_runs_tokenizer_are_the_same_data(
    jsonl: Path, tmp_path: Path
) -> None:
    first = run(jsonl, tmp_path / "s", tokenizer="bpe", vocab_size=400)
    (tmp_path / "run").mkdir()
    first.tokenizer.save(tmp_path / "run")
    second = run(jsonl, tmp_path / "other", tokenizer=str(tmp_path / "run"))
    assert not second.reused
    assert second.manifest_sha256 == first.manifest_sha256


def test_auto_is_chosen_by_the_amount_of_text(jsonl: Path, tmp_path: Path) -> None:
    made = run(jsonl, tmp_path / "s", tokenizer="auto")
    assert made.tokenizer.kind == "char" and "too little" in made.tokenizer_reason
    sized = run(jsonl, tmp_path / "s", tokenizer="auto", vocab_size=300)
    assert (sized.tokenizer.kind, sized.tokenizer.vocab_size) == ("bpe", 300)


def test_val_too_short_names_both_numbers_and_what_helps(jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(PippinError) as error:
        run(jsonl, tmp_path / "s", seq_len=512)
    assert error.value.code == "P201"
    assert "val split" in error.value.what
    assert not list((tmp_path / "s").iterdir())  # nothing was published, and no work is kept
    tokens = run(jsonl, tmp_path / "s").manifest.splits["val"].tokens
    assert f"val: {tokens:,} tokens" in error.value.found and "513" in error.value.found
    key, _, value = error.value.remedy.partition("=")
    assert key == "data.val_fraction"
    assert run(jsonl, tmp_path / "s", seq_len=512, val_fraction=float(value))


def amended(remedy: str, **given: Any) -> dict[str, Any]:
    """The settings with what a remedy says."""
    key, _, value = remedy.removeprefix("data.").partition("=")
    return {**given, key: float(value) if "fraction" in key else int(value)}


@pytest.mark.parametrize("num_chars", [400, 700, 1_000, 3_000, 9_000])
@pytest.mark.parametrize("seq_len", [16, 100, 300])
def test_what_helps_a_short_text_helps_it(num_chars: int, seq_len: int, tmp_path: Path) -> None:
    """At the first try, whichever split is short."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i} apples\n" for i in range(num_chars))[:num_chars])
    settings: dict[str, Any] = {"seq_len": seq_len}
    try:
        run(path, tmp_path / "s", **settings)
    except PippinError as error:
        if error.remedy.startswith("data."):
            run(path, tmp_path / "s", **amended(error.remedy, **settings))
            return
        assert "more text: about" in error.remedy
        wanted = 1_000 * float(error.remedy.split("about ")[1].split(" kB")[0].replace(",", ""))
        path.write_text("".join(f"{i} apples\n" for i in range(int(wanted)))[: int(wanted)])
        run(path, tmp_path / "s", **settings)


def test_both_splits_are_told_of_at_once(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("8 bytes\n")
    with pytest.raises(PippinError) as error:
        run(tmp_path / "tiny.txt", tmp_path / "s", tokenizer="char")
    assert "train and val splits" in error.value.what and "more text" in error.value.remedy
    assert not list((tmp_path / "s").iterdir())


def test_a_share_does_not_help_where_files_are_the_splits(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "train.txt").write_text("many words here\n" * 500)
    (folder / "valid.txt").write_text("few words, all in one line\n")
    with pytest.raises(PippinError) as error:
        run(folder, tmp_path / "s", seq_len=64)
    assert error.value.remedy == "data.seq_len=27"
    made = run(folder, tmp_path / "s", **amended(error.value.remedy))
    with pytest.raises(PippinError) as error:  # nor where they were prepared before
        run(made.folder, tmp_path / "s", seq_len=64, tokenizer="auto")
    assert error.value.remedy == "data.seq_len=27"


def test_copies_of_one_document_are_not_shared_out(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text((json.dumps(chat("?", "!")) + "\n") * 60)
    with pytest.raises(PippinError) as error:
        run(tmp_path / "c.jsonl", tmp_path / "s")
    assert "documents that differ" in error.value.remedy
    (tmp_path / "d.jsonl").write_text('{"text": "short"}\n' * 200)
    with pytest.raises(PippinError, match="documents that differ"):
        run(tmp_path / "d.jsonl", tmp_path / "s")


def chat(question: str, answer: str) -> dict[str, Any]:
    """A record as OpenAI has it."""
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def mlx_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mlx"
    folder.mkdir()
    for name, count in (("train", 40), ("valid", 6)):
        lines = [json.dumps(chat(f"{name} {i}?", f"answer {i}")) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_chats_are_trained_on_as_chats(tmp_path: Path) -> None:
    """As tools/prepare_data.py makes them: the same tokens, weights and splits."""
    folder = mlx_folder(tmp_path)
    made = run(folder, tmp_path / "s")
    assert made.manifest.content == "chat"
    assert [made.manifest.splits[s].documents for s in SPLITS] == [40, 6, 0]
    args = [str(folder), "--tokenizer", "byte", "--out", str(tmp_path / "p"), "--quiet"]
    assert prepare_data.main(args) == 0
    assert load_manifest(tmp_path / "p").content_sha256() == made.manifest_sha256
    assert run(folder, tmp_path / "s").reused
    assert run(folder, tmp_path / "s", on_bad_line="skip").manifest_sha256 == made.manifest_sha256


def alpaca(path: Path) -> Path:
    """Records as Stanford's Alpaca has them: each holds its chat as one text too."""
    rows = [
        {"instruction": f"What is {i}?", "input": "", "output": f"It is {i}.", "body": f"body {i}"}
        for i in range(90)
    ]
    rows = [{**row, "text": f"{row['instruction']} ### {row['output']}"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_and_preparing_take_records_of_two_kinds_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Chats that hold a text too are chats in both, which is said, with the way to the text."""
    monkeypatch.chdir(tmp_path)
    path = alpaca(tmp_path / "my alpaca.jsonl")
    said: list[str] = []
    made = run(path, tmp_path / "s", report=lambda phase, facts, *_: said.append(facts))
    assert made.manifest.content == "chat"
    (note,) = [line for line in said if "taken as" in line]
    assert "instruction/output and text: taken as chats" in note

    capsys.readouterr()
    assert prepare_data.main([str(path), "--tokenizer", "byte", "--out", "p"]) == 0
    out = capsys.readouterr().out
    assert "taken as chats; for the text: --format text" in out
    assert load_manifest(Path("p")).content_sha256() == made.manifest_sha256
    for asked, content in (("chat", "chat"), ("text", "text")):
        args = [str(path), "--tokenizer", "byte", "--out", asked, "--format", asked]
        assert prepare_data.main(args) == 0
        assert "taken as" not in capsys.readouterr().out
        assert load_manifest(Path(asked)).content == content

    # The command of the note is run as it is printed.
    command = shlex.split(note.partition("for the text: ")[2])
    assert prepare_data.main([*command[2:], "--quiet"]) == 0
    manifest = load_manifest(tmp_path / "shards" / "my-alpaca")
    assert manifest.content == "text"
    assert manifest.text_bytes == sum(len(json.loads(r)["text"]) for r in path.open())


def test_a_text_field_that_is_named_asks_for_texts(tmp_path: Path) -> None:
    path = alpaca(tmp_path / "a.jsonl")
    assert run(path, tmp_path / "s", text_field="body", seq_len=4).manifest.content == "text"
    args = [str(path), "--tokenizer", "byte", "--text-field", "body", "--quiet"]
    assert prepare_data.main([*args, "--out", str(tmp_path / "p")]) == 0
    assert load_manifest(tmp_path / "p").content == "text"


def test_texts_alone_are_taken_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "text {i}", "id": {i}}}\n' for i in range(90)))
    said: list[str] = []
    made = run(
        path,
        tmp_path / "s",
        seq_len=4,
        report=lambda phase, facts, *_: said.append(facts),
    )
    assert made.manifest.content == "text" and not any("taken as" in line for line in said)


def test_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PippinError) as error:
        run(path, tmp_path / "s")
    assert error.value.code == "P010"
    path.write_text("".join(json.dumps({**row, "text": "a"}) + "\n" for row in rows))
    with pytest.raises(PippinError) as error:
        run(path, tmp_path / "s")
    assert error.value.code == "P010" and "--format text" in error.value.remedy


def test_a_chat_where_text_was_wanted_names_the_command_that_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is run as it is printed."""
    folder = tmp_path / "two words"
    folder.mkdir()
    path = folder / "my chats.jsonl"
    path.write_text("".join(json.dumps(chat(f"{i}?", "yes")) + "\n" for i in range(300)))
    with pytest.raises(PippinError) as error:
        run(path, tmp_path / "s", text_field="body")
    command = shlex.split(error.value.remedy.partition(";")[0])
    assert command[:3] == ["python", "tools/prepare_data.py", str(path)]
    monkeypatch.chdir(tmp_path)
    assert prepare_data.main([*command[2:], "--quiet"]) == 0
    assert load_manifest(tmp_path / "shards" / "my-chats").content == "chat"


def test_unknown_characters_name_the_record_or_are_left_out(tmp_path: Path) -> None:
    known = "".join(f"Line {i} of some text.\n" for i in range(300))
    (tmp_path / "a.txt").write_text(known)
    tokenizer = str(run(tmp_path / "a.txt", tmp_path / "t", tokenizer="char").folder)
    path = tmp_path / "b.jsonl"
    texts = ["Line of text." * 3, "caf\u00e9 Line", *(f"text {i} of text" for i in range(200))]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    with pytest.raises(PippinError) as error:
        run(path, tmp_path / "s", tokenizer=tokenizer)
    assert error.value.code == "P202" and "b.jsonl:2 holds" in error.value.what
    assert "'\u00e9' (U+00E9)" in error.value.what
    assert "data.on_bad_line=skip" in error.value.remedy
    made = run(path, tmp_path / "s", tokenizer=tokenizer, on_bad_line="skip")
    found = [text for split in SPLITS for text in documents(made, split)]
    assert sorted(found) == sorted(text for text in texts if "\u00e9" not in text)
    assert any("1 left out: characters" in note and "b.jsonl:2" in note for note in made.notes)


def test_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("tiny")
    with pytest.raises(PippinError) as error:
        run(tmp_path / "a.txt", tmp_path / "s")
    assert error.value.code == "P201" and "17" in error.value.found


def test_white_space_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n" * 500)
    with pytest.raises(PippinError) as error:
        run(tmp_path / "a.txt", tmp_path / "s")
    assert error.value.code == "P201" and "1,000 bytes" in error.value.found
    assert "1 empty documents" in error.value.found


def test_no_test_split_where_none_is_wanted(jsonl: Path, tmp_path: Path) -> None:
    made = run(jsonl, tmp_path / "s", test_fraction=0.0)
    assert open_shards(made.folder, "test").num_tokens == 0
    assert document_offsets(made.folder, "test").tolist() == [0]


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text, " * 300)
    tokenizer = run(tmp_path / "a.txt", tmp_path / "t", tokenizer="char").folder
    (tmp_path / "b.txt").write_text("other TEXT, " * 300)
    with pytest.raises(PippinError) as error:
        run(tmp_path / "b.txt", tmp_path / "s", tokenizer=str(tokenizer))
    assert error.value.code == "P202" and "'E'" in error.value.what
    assert list((tmp_path / "s").glob("**/*")) == []


def test_disk_that_cannot_be_written_is_a_clear_error(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PippinError) as error:
        run(jsonl, tmp_path / "file" / "s")
    assert error.value.code == "P312"


Said = list[tuple[str, str, str]]


def told(said: Said) -> Any:
    """A report that keeps what was said."""
    return lambda phase, facts, result, seconds: said.append((phase, facts, result))


@pytest.mark.parametrize("damaged", ["manifest.json", "train_00000.bin", "tokenizer.pippin.json"])
def test_a_damaged_copy_is_passed_over(damaged: str, jsonl: Path, tmp_path: Path) -> None:
    made = run(jsonl, tmp_path / "s")
    copy = tmp_path / "s" / "a-copy"  # looked at first
    shutil.copytree(made.folder, copy)
    content = bytearray((copy / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / damaged).write_bytes(content)
    said: Said = []
    again = run(jsonl, tmp_path / "s", report=told(said))
    assert again.reused and again.folder == made.folder
    lines = [facts for phase, facts, result in said if (phase, result) == ("data", "passed over")]
    assert len(lines) == 1 and str(copy) in lines[0]


@pytest.mark.parametrize("damaged", ["manifest.json", "val_00000.bin"])
def test_damaged_shards_are_made_again(damaged: str, jsonl: Path, tmp_path: Path) -> None:
    made = run(jsonl, tmp_path / "s")
    whole = (made.folder / damaged).read_bytes()
    (made.folder / damaged).write_bytes(whole[:-9])
    said: Said = []
    again = run(jsonl, tmp_path / "s", report=told(said))
    assert not again.reused and (again.folder / damaged).read_bytes() == whole
    assert again.manifest_sha256 == made.manifest_sha256
    assert [result for phase, _, result in said if phase == "data"] == ["passed over", "read"]
    # Another text is none of its business.
    (made.folder / damaged).write_bytes(whole[:-9])
    jsonl.write_text(jsonl.read_text() + '{"text": "new"}\n')
    assert run(jsonl, tmp_path / "s").folder != made.folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "data.seed was 1, is 2"),
        ({"val_fraction": 0.05}, "data.val_fraction was 0.02, is 0.05"),
        ({"tokenizer": "char"}, "the tokenizer was byte, is char"),
        ({"on_bad_line": "skip"}, "data.on_bad_line was error, is skip"),
        ({"seed": 3, "test_fraction": 0.0}, "data.seed was 1, is 3; data.test_fraction was 0.02"),
    ],
)
def test_why_shards_are_made_again_is_said(
    changes: dict[str, Any], words: str, jsonl: Path, tmp_path: Path
) -> None:
    said: Said = []
    run(jsonl, tmp_path / "s", report=told(said))
    assert not [facts for _, facts, result in said if result == "again"]
    said.clear()
    run(jsonl, tmp_path / "s", report=told(said), **changes)
    (line,) = [facts for _, facts, result in said if result == "again"]
    assert line.startswith(f"docs was prepared otherwise: {words}")
    said.clear()
    jsonl.write_text(jsonl.read_text() + '{"text": "new"}\n')
    run(jsonl, tmp_path / "s", report=told(said))
    (line,) = [facts for _, facts, result in said if result == "again"]
    assert line.startswith("docs is not the text its last shards were made from")


def test_leftovers_of_others_are_kept(jsonl: Path, tmp_path: Path) -> None:
    """Which ones are removed is in test_data_ours.py."""
    folders = [tmp_path / "s" / name for name in (".tmp-1-old", ".work-thesis")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("half")
        os.utime(folder, (time.time() - 10**7, time.time() - 10**7))
    made = run(jsonl, tmp_path / "s")
    assert all((folder / "manifest.json").read_text() == "half" for folder in folders)
    assert run(jsonl, tmp_path / "s").folder == made.folder


def test_two_processes_at_once(jsonl: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from core.data.preparing.prepare import prepare;"
        "made = prepare(sys.argv[1], shards_dir=Path(sys.argv[2]), seq_len=16, seed=1,"
        " tokenizer='bpe', vocab_size=400); print(made.folder.name, made.manifest_sha256)"
    )
    command = [sys.executable, "-c", code, str(jsonl), str(tmp_path / "s")]
    started = [
        subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate(timeout=120)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(said) == 1
    (folder,) = (tmp_path / "s").iterdir()
    assert folder.name == said.pop().split()[0]
    assert open_shards(folder, "train").num_tokens > 0


def test_prompts_begin_validation_documents(jsonl: Path, tmp_path: Path) -> None:
    made = run(jsonl, tmp_path / "s", val_fraction=0.1)
    val = documents(made, "val")
    assert len(made.prompts) == 3
    for prompt, text in zip(made.prompts, val):
        assert prompt and text.startswith(prompt) and len(prompt) < len(text)


class FixedSource:
    """Documents whose split is given, one of them on both sides."""

    name, num_bytes, fingerprint = "fixed", 100, "f"

    def documents(self) -> Iterator[Document]:
        for text, split in (("a", "train"), ("b", "val"), ("a", "val"), ("b", "test")):
            yield Document(text, text, 1.0, cast(Split, split))

    def notes(self) -> tuple[str, ...]:
        return ()


def test_given_splits_never_share_a_text_with_training() -> None:
    info = SourceInfo(
        name="fixed",
        fingerprint="f",
        seed=1,
        val_fraction=0.1,
        test_fraction=0.1,
        documents=0,
        whole_documents=True,
        notes=(),
    )
    source = FixedSource()
    items = split_items(source, info, scan_source(source, info))
    assert [(item.text, item.split) for item in items] == [
        ("a", "train"),
        ("b", "val"),
        ("a", "train"),
        ("b", "val"),
    ]


def test_a_folder_whose_validation_is_in_training_says_what_was_moved(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    for name, texts in (
        ("train", DOCUMENTS[:80]),
        ("valid", DOCUMENTS[59:90]),
        ("test", [*DOCUMENTS[85:90], *DOCUMENTS[90:95]]),
    ):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    made = run(folder, tmp_path / "s")
    assert "21 validation documents that are also in training were moved there" in made.notes
    assert "5 test documents that are also in validation were moved there" in made.notes
    assert documents(made, "test") == DOCUMENTS[90:95]
    assert set(documents(made, "val")) == set(DOCUMENTS[80:90])


def test_a_test_that_is_named_is_not_trained_on(tmp_path: Path) -> None:
    """Also where no file is for validation, which is then drawn from training alone."""
    folder = tmp_path / "named"
    folder.mkdir()
    for name, texts in (("train", DOCUMENTS[:250]), ("test", DOCUMENTS[250:])):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    made = run(folder, tmp_path / "s", val_fraction=0.1)
    assert documents(made, "test") == DOCUMENTS[250:]
    train, val = documents(made, "train"), documents(made, "val")
    assert val and sorted([*train, *val]) == sorted(DOCUMENTS[:250])


def test_stories_come_with_their_entropy(tmp_path: Path) -> None:
    made = run(None, tmp_path / "s", corpus_bytes=120_000, val_fraction=0.05)
    splits = made.manifest.splits
    for info in splits.values():
        assert info.entropy_bits is not None and 0 < info.entropy_bits < info.text_bytes * 8
    val = splits["val"]
    assert val.entropy_bits is not None
    floor = made.floor_nats_per_token
    assert floor == pytest.approx(val.entropy_bits * np.log(2) / val.tokens)
    stream = open_shards(made.folder, "val")
    assert stream.entropy_bits_per_byte == pytest.approx(val.entropy_bits / val.text_bytes)
    texts = [set(documents(made, split)) for split in SPLITS]
    assert not texts[0] & (texts[1] | texts[2]) and all(texts)
    assert run(None, tmp_path / "s", corpus_bytes=120_000, val_fraction=0.05).reused


def test_other_text_has_no_floor(jsonl: Path, tmp_path: Path) -> None:
    assert run(jsonl, tmp_path / "s").floor_nats_per_token is None
