"""tools/prepare_data.py as a user types it.

Run: pytest tests/cli/test_prepare_data.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from core.data.shards.manifest import load_manifest, open_shards
from core.data.tokenizers.tokenizer import load_tokenizer
from core.paths import PROJECT_ROOT
from tests.cli.runs import TINY, assert_same_checkpoint, train_here

TOOL = str(PROJECT_ROOT / "tools" / "prepare_data.py")


def prepare_data(*args: object, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, TOOL, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def write_text(folder: Path, count: int = 400) -> Path:
    texts = [f"Document {i}: {'abc' * (i % 7 + 1)}\n" for i in range(count)]
    lines = [json.dumps({"text": t, "score": i / count}) for i, t in enumerate(texts)]
    path = folder / "docs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def digests(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.bin"))}


def test_make_info_verify_stats_show(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    said = prepare_data(text, "--tokenizer", "byte", "--out", "shards/a", cwd=tmp_path)
    assert "python train.py --input_file shards/a" in said and "400 documents" in said
    manifest = load_manifest(tmp_path / "shards" / "a")
    held = json.loads(prepare_data("info", "shards/a", "--json", cwd=tmp_path))
    assert held["tokenizer"]["kind"] == "byte"
    assert "docs, 400 documents" in prepare_data("info", "shards/a", cwd=tmp_path)
    assert "all as written" in prepare_data("verify", "shards/a", cwd=tmp_path)

    found = json.loads(prepare_data("stats", "shards/a", "--json", cwd=tmp_path))
    stream = open_shards(tmp_path / "shards" / "a", "train")
    ids = stream.tokens(0, stream.num_tokens)
    assert found["tokens"] == len(ids) == manifest.splits["train"].tokens
    assert found["ids_used"] == len(set(ids.tolist()))
    assert found["bytes_per_token"] == pytest.approx(1.0)
    assert found["document_tokens_max"] == int(np.diff(stream.offsets).max())
    assert (tmp_path / found["plot"]).stat().st_size > 5_000

    shown = prepare_data("show", "shards/a", "--rows", "2", cwd=tmp_path)
    tokenizer = load_tokenizer(tmp_path / "shards" / "a")
    first = tokenizer.decode(stream.tokens(0, int(stream.offsets[1])).tolist()).strip()
    assert first in shown


def test_the_same_again_is_reused_and_another_text_is_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    make = (text, "--tokenizer", "byte", "--out", "s")
    prepare_data(*make, cwd=tmp_path)
    before = digests(tmp_path / "s")
    assert "exactly this already" in prepare_data(*make, cwd=tmp_path)
    text.write_text(text.read_text().replace("Document 3:", "Document drei:"))
    refused = prepare_data(*make, cwd=tmp_path, code=2)
    assert "P311" in refused and "--overwrite" in refused
    assert digests(tmp_path / "s") == before
    prepare_data(*make, "--overwrite", cwd=tmp_path)
    assert digests(tmp_path / "s") != before


def test_filters_and_limits(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    base = ("--tokenizer", "byte", "--val-fraction", "0", "--test-fraction", "0")
    prepare_data(text, *base, "--out", "n", "--num-documents", 120, cwd=tmp_path)
    assert load_manifest(tmp_path / "n").source.documents == 120
    prepare_data(
        text, *base, "--out", "q", "--score-field", "score", "--score-min", 0.75, cwd=tmp_path
    )
    assert load_manifest(tmp_path / "q").source.documents == 100
    prepare_data(text, *base, "--out", "t", "--max-tokens", "1e3", cwd=tmp_path)
    assert 1000 <= load_manifest(tmp_path / "t").tokens < 1050


def test_kill_and_the_same_command_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 7))) for _ in range(3000)]
    path = tmp_path / "big.txt"
    with path.open("w") as out:
        for _ in range(30):
            out.write("\n".join(" ".join(rng.choice(words, 12)) for _ in range(2000)) + "\n")
    small = tmp_path / "small.txt"
    small.write_text(" ".join(words))
    prepare_data(small, "--tokenizer", "bpe", "--vocab-size", 1000, "--out", "small", cwd=tmp_path)
    make = ["--tokenizer", "small", "--workers", "2"]
    prepare_data(path, *make, "--out", "whole", cwd=tmp_path)
    command = [sys.executable, TOOL, str(path), *make, "--out", "cut"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(p.stat().st_size > 100_000 for p in tmp_path.glob(".work-cut-*/train_0*.bin")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    prepare_data(path, *make, "--out", "cut", cwd=tmp_path)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".work-*"))


def test_chats_and_preferences(tmp_path: Path) -> None:
    chats = tmp_path / "chat.jsonl"
    chats.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"What is {i}?"},
                        {"role": "assistant", "content": f"A number, {i}."},
                    ]
                }
            )
            + "\n"
            for i in range(60)
        )
    )
    prepare_data(chats, "--tokenizer", "byte", "--out", "c", cwd=tmp_path)
    manifest = load_manifest(tmp_path / "c")
    assert manifest.content == "chat"
    train = manifest.splits["train"]
    assert 0 < train.trained_tokens < train.tokens
    stream = open_shards(tmp_path / "c", "train")
    tokenizer = load_tokenizer(tmp_path / "c")
    begin, end = stream.offsets[:2].tolist()
    ids, weights = stream.tokens(begin, end), stream.gather_weights(np.arange(begin, end))
    trained = tokenizer.decode(ids[weights > 0].tolist())
    assert trained.startswith("A number, ")
    assert "A number" in prepare_data("show", "c", "--rows", 1, cwd=tmp_path)

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}", "chosen": f"{i}.", "rejected": f"No {i}."}) + "\n"
            for i in range(60)
        )
    )
    prepare_data(pairs, "--tokenizer", "byte", "--out", "p", cwd=tmp_path)
    assert load_manifest(tmp_path / "p").content == "preference"
    stream = open_shards(tmp_path / "p", "train")
    for (a, b), (c, d) in stream.pairs().tolist():
        chosen, rejected = (tokenizer.decode(stream.tokens(*x).tolist()) for x in ((a, b), (c, d)))
        assert "No" not in chosen and "No" in rejected and b == c
        assert chosen.split(".")[0].split()[-1] == rejected.split(".")[0].split()[-1]


def test_bad_lines_are_refused_with_their_place_or_skipped_and_counted(tmp_path: Path) -> None:
    text = write_text(tmp_path, 100)
    lines = text.read_text().splitlines()
    lines[6] = '{"text": "broken'
    text.write_text("\n".join(lines) + "\n")
    make = (text, "--tokenizer", "byte", "--out", "s")
    refused = prepare_data(*make, cwd=tmp_path, code=2)
    assert "P202" in refused and "docs.jsonl:7" in refused and "skip" in refused
    assert not (tmp_path / "s").exists()
    said = prepare_data(*make, "--on-bad-line", "skip", cwd=tmp_path)
    assert "docs.jsonl:7" in said
    assert load_manifest(tmp_path / "s").source.documents == 99


def test_plan_says_what_the_shards_then_hold(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    plan = json.loads(prepare_data("plan", text, "--tokenizer", "byte", "--json", cwd=tmp_path))
    prepare_data(text, "--tokenizer", "byte", "--out", "s", cwd=tmp_path)
    manifest = load_manifest(tmp_path / "s")
    assert plan["text"]["tokens"] == manifest.tokens
    assert plan["text"]["shards"] == 3
    needs = prepare_data("plan", "--for", "tiny_shakespeare_cpu", cwd=tmp_path)
    assert f"{2000 * 12 * 64:,} tokens" in needs


def test_nanogpt_files_are_imported(tmp_path: Path) -> None:
    data = tmp_path / "nano"
    data.mkdir()
    texts = [f"text {i} " * 20 for i in range(30)]
    ids = [x for t in texts for x in (*t.encode(), 256)]
    np.array(ids, np.uint16).tofile(data / "train.bin")
    np.array(ids[: len(ids) // 2], np.uint16).tofile(data / "val.bin")
    tokenizer = tmp_path / "shards"
    write_text(tmp_path)
    prepare_data(tmp_path / "docs.jsonl", "--tokenizer", "byte", "--out", tokenizer, cwd=tmp_path)
    prepare_data("import", data, "--tokenizer", tokenizer, "--out", "i", cwd=tmp_path)
    stream = open_shards(tmp_path / "i", "train")
    assert stream.tokens(0, stream.num_tokens).tolist() == ids
    assert len(stream.offsets) == 31


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("nothing.txt", "--tokenizer", "byte", "--out", "s"), "P201"),
        (("docs.jsonl", "--tokenizer", "nope.model", "--out", "s"), "P301"),
        (("docs.jsonl", "--tokenizer", "byte", "--out", "s", "--score-min", "1"), "P012"),
        (("docs.jsonl", "--tokenizer", "byte", "--out", "s", "--val-fraction", "2"), "P012"),
        (("docs.jsonl", "--tokenizer", "byte", "--out", "docs.jsonl"), "P311"),
        (("docs.jsonl", "--tokenizer", "byte", "--out", "s", "--text-field", "txt"), "P202"),
        (("docs.jsonl", "--tokenizer", "byte", "--out", "s", "--nonsense"), "P012"),
        (("info", "missing"), "P203"),
        (("plan",), "P012"),
    ],
)
def test_what_is_wrong_is_said_in_our_form(
    tmp_path: Path, args: tuple[str, ...], code: str
) -> None:
    write_text(tmp_path, 60)
    said = prepare_data(*args, cwd=tmp_path, code=2)
    assert said.startswith(code) and "Traceback" not in said
    assert not (tmp_path / "s").exists()


def test_a_mixture_trains_and_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    (tmp_path / "b.txt").write_text("".join(f"line {i} of another text\n" for i in range(500)))
    for name, text in (("a", "docs.jsonl"), ("b", "b.txt")):
        prepare_data(text, "--tokenizer", "byte", "--out", f"s/{name}", cwd=tmp_path)
    args = ("--backend", "cpu", *TINY, "data.mixture={s/a: 3, s/b: 1}", "train.total_steps=8")
    args = (*args, "train.ckpt_interval=4", "train.eval_interval=4")
    assert train_here(*args, "--save-dir", "whole") == 0
    assert train_here(*args, "--save-dir", "cut", "--max-steps", 4) == 0
    assert train_here("--resume", "cut") == 0
    assert_same_checkpoint(
        tmp_path / "whole" / "step_000008.pt", tmp_path / "cut" / "step_000008.pt"
    )


def test_a_folder_as_mlx_lm_uses_it(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    for name, count in (("train", 30), ("valid", 5)):
        records = (
            {"prompt": f"{name} {i}?", "completion": f"{name} answer {i}"} for i in range(count)
        )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    prepare_data(folder, "--tokenizer", "byte", "--out", "s", cwd=tmp_path)
    manifest = load_manifest(tmp_path / "s")
    assert manifest.content == "chat"
    assert [manifest.splits[s].documents for s in ("train", "val", "test")] == [30, 5, 0]
    stream = open_shards(tmp_path / "s", "val")
    text = load_tokenizer(tmp_path / "s").decode(stream.tokens(0, stream.num_tokens).tolist())
    assert "valid answer 4" in text and "train" not in text


def test_training_says_when_a_text_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path)
    args = ("--input_file", text, "--backend", "cpu", *TINY, "--dry-run")
    assert train_here(*args) == 0
    assert train_here(*args) == 0
    assert "reused" in capsys.readouterr().out
    text.write_text(text.read_text().replace("Document 3:", "Document drei:"))
    assert train_here(*args) == 0
    said = capsys.readouterr().out
    assert "is not the text its last shards were made from" in said and "reused" not in said


def test_pairs_are_not_trained_on_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    records = ({"prompt": f"Say {i}", "chosen": f"{i}.", "rejected": "No."} for i in range(60))
    pairs.write_text("".join(json.dumps(r) + "\n" for r in records))
    prepare_data(pairs, "--tokenizer", "byte", "--out", "p", cwd=tmp_path)
    assert train_here("--input_file", "p", "--backend", "cpu", *TINY, "--dry-run") == 2
    assert "P010" in capsys.readouterr().err


def test_a_hub_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    records = [json.dumps({"body": f"record {i} " * 5}) for i in range(300)]
    (folder / "train.jsonl").write_text("\n".join(records) + "\n")
    make = (f"hf:{folder}", "--text-field", "body", "--split", "train", "--tokenizer", "byte")
    prepare_data(*make, "--out", "a", "--max-tokens", 5000, cwd=tmp_path)
    manifest = load_manifest(tmp_path / "a")
    assert 5000 <= manifest.tokens < 5100 and manifest.source.whole_documents
    prepare_data(*make, "--out", "b", "--num-documents", 40, cwd=tmp_path)
    assert load_manifest(tmp_path / "b").source.documents == 40
    wrong = prepare_data(
        *make[:3], "--tokenizer", "byte", "--out", "c", "--split", "dev", cwd=tmp_path, code=2
    )
    assert "train" in wrong
