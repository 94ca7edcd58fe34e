"""What preparing and loading data costs: throughput against one process, peak memory, windows a second."""

import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from core.data.corpus import stories
from core.data.sampling.parts import TrainParts, read_rows
from core.data.sampling.windows import make_windows
from core.data.shards.manifest import load_manifest, open_shards
from core.data.tokenizers.tokenizer import Tokenizer, cut_text, import_sentencepiece, load_tokenizer
from core.data.tokenizers.training import train_tokenizer
from tools.benchmarks.report import GB, Measured

TOOL = Path(__file__).resolve().parents[1] / "prepare_data.py"
_SAMPLE_BYTES, _TRAIN_BYTES = 20_000_000, 40_000_000
_WINDOW, _ROWS, _LOAD_S = 1024, 16, 3.0
# Wanted: reference figures of a 2-core machine.
LEAST_RATIO, LEAST_BYTE_BPE, MOST_MEMORY, LEAST_LOADING = 1.7, 12.0, 1.5, 5.0


def measure(
    text: Path | None, *, megabytes: int, vocab_size: int, workers: int
) -> tuple[list[Measured], dict[str, object]]:
    """Prepare a text with both kinds of tokenizer, and read windows of it.

    Args:
        text: A text file; None writes stories of `megabytes`.
        megabytes: At most so much of the text.
        vocab_size: Pieces of both tokenizers.
        workers: Processes.

    Returns:
        The figures, and the facts of the run.
    """
    with tempfile.TemporaryDirectory(prefix="pippin-data-") as name:
        folder = Path(name)
        path = folder / "text.txt"
        _write_text(path, text, megabytes * 10**6)
        size = path.stat().st_size / 1e6
        head = _head(path, _TRAIN_BYTES)
        sentencepiece = train_tokenizer("bpe", [head], vocab_size)
        rows = []
        alone = _alone(sentencepiece, _head(path, _SAMPLE_BYTES))
        rows.append(Measured("sentencepiece, one process", alone, "MB/s", note="encode alone"))
        spent, peak = _prepare(path, sentencepiece, folder / "bpe", workers)
        rows.append(
            Measured(f"prepare, {workers} workers", size / spent, "MB/s", note="everything")
        )
        rows.append(Measured("  against one process", size / spent / alone, "x", least=LEAST_RATIO))
        rows.append(
            Measured("  peak memory", peak / GB, "GB", most=MOST_MEMORY, note="all processes")
        )
        byte_level = _byte_level(head, vocab_size, folder)
        spent, peak = _prepare(path, byte_level, folder / "byte_bpe", workers)
        rows.append(
            Measured("byte-level BPE, tiktoken", size / spent, "MB/s", least=LEAST_BYTE_BPE)
        )
        rows.append(
            Measured("  peak memory", peak / GB, "GB", most=MOST_MEMORY, note="all processes")
        )
        rows += [_loading(folder / "bpe", mode) for mode in ("contiguous", "packed")]
        manifest = load_manifest(folder / "bpe")
        facts: dict[str, object] = {
            "text_mb": size,
            "vocab_size": manifest.tokenizer.vocab_size,
            "tokens": manifest.tokens,
            "workers": workers,
        }
    return rows, facts


def _write_text(path: Path, text: Path | None, size: int) -> None:
    with path.open("wb") as out:
        if text is None:
            for story in stories(size, 1):
                out.write(story.text.encode() + b"\n")
            return
        with text.open("rb") as stream:
            while out.tell() < size and (block := stream.read(min(1 << 20, size - out.tell()))):
                out.write(block)
            out.write(stream.readline())


def _head(path: Path, size: int) -> str:
    with path.open("rb") as stream:
        return stream.read(size).decode(errors="ignore")


def _alone(tokenizer: Tokenizer, text: str) -> float:
    """MB/s of sentencepiece's own encode, one thread, in the parts that suit it best."""
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        content.write(tokenizer.save(Path(folder)).read_bytes())
    processor = import_sentencepiece().SentencePieceProcessor(model_proto=content.getvalue())
    parts = cut_text(text, 2_000)
    started = time.perf_counter()
    processor.encode(parts, num_threads=1)
    return len(text.encode()) / 1e6 / (time.perf_counter() - started)


def _byte_level(text: str, vocab_size: int, folder: Path) -> Tokenizer:
    """A byte-level BPE in the manner of GPT-2, trained by the tokenizers library."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blocks = (text[i : i + 100_000] for i in range(0, len(text), 100_000))
    library.train_from_iterator(blocks, trainer)
    path = folder / "hf" / "tokenizer.json"
    path.parent.mkdir()
    library.save(str(path))
    return load_tokenizer(path)


def _prepare(path: Path, tokenizer: Tokenizer, out: Path, workers: int) -> tuple[float, int]:
    """Seconds and peak memory of the command, all its processes together."""
    saved = out.parent / f"{out.name}-tokenizer"
    saved.mkdir()
    command = [sys.executable, str(TOOL), str(path), "--tokenizer", str(tokenizer.save(saved))]
    command += ["--out", str(out), "--workers", str(workers), "--quiet"]
    started = time.perf_counter()
    process = psutil.Popen(command, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _tree_memory(process))
        time.sleep(0.1)
    spent = time.perf_counter() - started
    if process.returncode != 0:
        raise RuntimeError(process.stderr.read().decode())
    return spent, peak


def _tree_memory(process: psutil.Process) -> int:
    total = 0
    for one in (process, *_children(process)):
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total


def _children(process: psutil.Process) -> Sequence[psutil.Process]:
    try:
        children: Sequence[psutil.Process] = process.children(recursive=True)
    except psutil.Error:
        return []
    return children


def _loading(folder: Path, sampling: str) -> Measured:
    """Million targets a second and core of random windows, as the loader's thread reads them."""
    stream = open_shards(folder, "train")
    windows = make_windows(stream, sampling, _WINDOW, seed=1)
    parts = TrainParts((stream,), (windows,), (1.0,))
    plan = parts.plan(1)
    begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    tokens = row = 0
    while time.perf_counter() - begin < _LOAD_S:
        batch = read_rows(parts, plan.rows(row, _ROWS), row0=0, vocab_size=stream.vocab_size)
        tokens += int(np.count_nonzero(batch.weights))
        row += _ROWS
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    least = LEAST_LOADING if sampling == "contiguous" else None
    return Measured(f"windows, {sampling}", tokens / seconds / 1e6, "M tok/s", least=least)
