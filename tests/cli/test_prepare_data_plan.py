"""tools/prepare_data.py plan: what it says is what is made then.

Run: pytest tests/cli/test_prepare_data_plan.py
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data.shards.manifest import load_manifest
from tools import prepare_data
from tools.preparing import estimating


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> str:
        found = prepare_data.main([str(a) for a in args])
        said = capsys.readouterr()
        assert found == 0, said.out + said.err
        return str(said.out)

    return run


def planned(tool: Any, *args: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tool("plan", *args, "--json"))["text"]
    return found


def made(tool: Any, *args: object) -> dict[str, int]:
    """The figures of the shards themselves."""
    tool(*args, "--out", "s", "--overwrite", "--quiet")
    manifest = load_manifest(Path("s"))
    files = [file for info in manifest.splits.values() for file in info.files]
    return {
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "documents": sum(info.documents for info in manifest.splits.values()),
        "shards": len(files),
        "disk_bytes": sum(path.stat().st_size for path in Path("s").glob("*.bin")),
    }


def write_half_metadata(path: Path, count: int, *, packed: bool = False) -> Path:
    """Records of which about half is no text; the text is random, so that it packs badly."""
    draw = np.random.default_rng(0)
    letters = draw.integers(97, 123, (count, 500), np.uint8)
    lines = [
        json.dumps({"text": row.tobytes().decode()[: 200 + i % 301], "url": "x" * 350})
        for i, row in enumerate(letters)
    ]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_above_the_sample(tool: Any, monkeypatch: Any, packed: bool) -> None:
    """Read are 3.2 MB of 4.2 MB of text, encoded 0.5 MB: both are scaled by what the files hold."""
    monkeypatch.setattr(estimating, "SAMPLE_BYTES", 500_000)
    monkeypatch.setattr(estimating, "MEASURED_BYTES", 3_200_000)
    name = "half.jsonl.gz" if packed else "half.jsonl"
    path = write_half_metadata(Path(name), 12_000, packed=packed)
    plan, real = planned(tool, path, "--tokenizer", "byte"), made(tool, path, "--tokenizer", "byte")
    assert plan["estimated"] and plan["sample_bytes"] < 501_000
    for name in ("tokens", "text_bytes", "documents", "disk_bytes"):
        assert plan[name] == pytest.approx(real[name], rel=0.1), name
    assert plan["shards"] == real["shards"] == 3


@pytest.mark.parametrize(
    "limit", [("--num-documents", 900), ("--num-documents", 3_000), ("--max-tokens", 250_000)]
)
def test_limits_are_kept(tool: Any, monkeypatch: Any, limit: tuple[object, ...]) -> None:
    monkeypatch.setattr(estimating, "SAMPLE_BYTES", 100_000)
    monkeypatch.setattr(estimating, "MEASURED_BYTES", 700_000)
    path = write_half_metadata(Path("half.jsonl"), 4_000)
    args = (path, "--tokenizer", "byte", *limit, "--tokens-per-shard", 400_000)
    plan, real = planned(tool, *args), made(tool, *args)
    for name in ("tokens", "documents", "text_bytes", "disk_bytes"):
        assert plan[name] == pytest.approx(real[name], rel=0.05), name
    assert plan["shards"] == real["shards"]


def test_symbols_of_conversations_are_counted(tool: Any) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    records = [
        {"messages": [*turns, {"role": "user", "content": f"{i}"}, turns[1]]} for i in range(99)
    ]
    Path("c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    args = ("c.jsonl", "--tokenizer", "byte")
    plan, real = planned(tool, *args), made(tool, *args)
    assert {name: plan[name] for name in real} == real and not plan["estimated"]


def test_splits_that_are_named_have_their_own_sizes(tool: Any) -> None:
    Path("d").mkdir()
    for name, count in (("train", 300), ("valid", 100)):
        lines = (json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(count))
        (Path("d") / f"{name}.jsonl").write_text("".join(lines))
    args = ("d", "--tokenizer", "byte", "--tokens-per-shard", 5_000)
    plan, real = planned(tool, *args), made(tool, *args)
    assert {name: plan[name] for name in real} == real
