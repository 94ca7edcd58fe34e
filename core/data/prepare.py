"""From text to shards in one go: find the text, make the tokenizer, split, encode, publish.

The result is a folder below `shards_dir` that is reused as long as the text, the tokenizer and the
split are the same. Two processes that prepare the same text at once each write a folder of their
own; the second one to finish finds the first one's and uses it.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from core.data.request import TokenizerRequest, resolve_tokenizer
from core.data.scan import Item, Scan, scan_source, split_items
from core.data.shard_writer import SplitWriter, not_writable, write_durably
from core.data.shards import (
    FORMAT,
    MANIFEST,
    VERSION,
    Manifest,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
    check_tokenizer,
    document_offsets,
    load_manifest,
    open_shards,
)
from core.data.sources import FileSource, Source, StorySource, open_source
from core.data.split import (
    SPLITS,
    document_key,
)
from core.data.tokenizer import Tokenizer, cut_text, load_tokenizer
from core.data.tokenizer_training import train_tokenizer
from core.errors import PippinError

# Phase, facts, what was done, seconds: one line for the user each.
Report = Callable[[str, str, str, float], None]

# A bpe tokenizer of 32,768 pieces is not better for more text than this.
_TOKENIZER_SAMPLE_BYTES = 20_000_000
_SAMPLE_BLOCK_CHARS = 20_000
_ENCODE_CHARS = 1 << 20
_STALE_S = 24 * 3600
_NUM_PROMPTS, _PROMPT_TOKENS = 3, 64


@dataclass(frozen=True)
class Prepared:
    """Shards ready to be opened.

    Attributes:
        folder: Holds the shards, their manifest and the tokenizer.
        manifest: What the folder holds.
        tokenizer: The shards' tokenizer.
        tokenizer_reason: Why this tokenizer.
        name: Short name of the text, usable as a folder's.
        prompts: Beginnings of validation documents, to sample from; at least one, perhaps empty.
        reused: Whether the folder was there already.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    tokenizer_reason: str
    name: str
    prompts: tuple[str, ...]
    reused: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out or dropped, in words."""
        return self.manifest.source.notes

    @property
    def manifest_sha256(self) -> str:
        """Identifies the data in a checkpoint: tokenizer and tokens, not how they were made."""
        return self.manifest.content_sha256()

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split."""
        return self.manifest.splits["train"].tokens

    @property
    def floor_nats_per_token(self) -> float | None:
        """The least validation loss that any model can reach, about; None where not known."""
        val = self.manifest.splits["val"]
        if val.entropy_bits is None or val.tokens == 0:
            return None
        return val.entropy_bits * math.log(2) / val.tokens


def prepare(
    input_file: str | Path | None,
    *,
    shards_dir: Path,
    seq_len: int,
    seed: int,
    text_field: str = "text",
    tokenizer: str = "auto",
    vocab_size: int | None = None,
    val_fraction: float = 0.02,
    test_fraction: float = 0.02,
    corpus_bytes: int = 20_000_000,
    report: Report = lambda phase, facts, result, seconds: None,
) -> Prepared:
    """Make or find the shards of a text.

    Args:
        input_file: A text file, a .jsonl or a folder; None is the story corpus.
        shards_dir: Folder in which a folder of shards is made.
        seq_len: T; train and val must each hold one window.
        seed: Of the split, and of the stories.
        text_field: Field of a .jsonl record.
        tokenizer: "auto", "bpe", "char", "byte", or the path of a tokenizer or of a run folder.
        vocab_size: Pieces of a bpe tokenizer; None chooses by the amount of text.
        val_fraction: Share of the text for validation.
        test_fraction: Share of the text for the test.
        corpus_bytes: Size of the story corpus.
        report: Called when a phase is done.

    Raises:
        PippinError: P201 for too little text, P202 for text that cannot be read, P203 for damaged
            shards, P301 for a tokenizer that cannot be used, P010 for settings that contradict.
    """
    started = time.monotonic()
    source: Source = (
        StorySource(corpus_bytes, seed, val_fraction, test_fraction)
        if input_file is None
        else open_source(input_file, text_field)
    )
    request = resolve_tokenizer(source, tokenizer, vocab_size)
    wanted = SourceInfo(
        name=source.name,
        fingerprint=source.fingerprint,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        documents=0,
        whole_documents=True,
        notes=(),
    )
    folder = _find(shards_dir, wanted, request)
    reused = folder is not None
    if folder is None:
        folder = _make(source, wanted, request, shards_dir, report)
    manifest = load_manifest(folder)
    made = load_tokenizer(folder / manifest.tokenizer.file)
    check_tokenizer(manifest, folder, made.fingerprint)
    if reused:
        report("shards", _amounts(manifest), "reused", _since(started))
    check_lengths(manifest, seq_len)
    return Prepared(
        folder=folder,
        manifest=manifest,
        tokenizer=made,
        tokenizer_reason=request.reason,
        name=_safe(source.name),
        prompts=_prompts(folder, made),
        reused=reused,
    )


def check_lengths(manifest: Manifest, seq_len: int) -> None:
    """Raise P201 where train or val holds less than one window."""
    for split in ("train", "val"):
        tokens = manifest.splits[split].tokens
        if tokens >= seq_len + 1:
            continue
        fraction = 1.5 * (seq_len + 1) / max(1, manifest.tokens)
        remedy = f"more text, or data.seq_len={max(2, tokens - 1)}"
        if split == "val" and fraction < 0.3:
            remedy = f"data.val_fraction={max(fraction, 0.01):.2g}"
        raise PippinError(
            "P201",
            f"the {split} split of {manifest.source.name} is too short",
            found=f"{tokens:,} tokens; a window of data.seq_len={seq_len:,} needs {seq_len + 1:,}",
            remedy=remedy,
        )


def _find(shards_dir: Path, wanted: SourceInfo, request: TokenizerRequest) -> Path | None:
    """The folder that holds what is wanted already."""
    for path in sorted(shards_dir.glob(f"*/{MANIFEST}")):
        if path.parent.name.startswith("."):
            continue
        # Cheap first: a damaged folder of another text is none of this run's business.
        if wanted.fingerprint not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        manifest = load_manifest(path.parent)
        if _same_text(manifest.source, wanted) and request.met_by(manifest.tokenizer):
            return path.parent
    return None


def _same_text(a: SourceInfo, b: SourceInfo) -> bool:
    def decided(info: SourceInfo) -> tuple[object, ...]:
        return (info.fingerprint, info.seed, info.val_fraction, info.test_fraction)

    return decided(a) == decided(b)


def _make(
    source: Source, wanted: SourceInfo, request: TokenizerRequest, shards_dir: Path, report: Report
) -> Path:
    started = time.monotonic()
    scan = scan_source(source, wanted)
    total = int(scan.sizes.sum())
    facts = f"{wanted.name}, {len(scan.sizes):,} documents, {total / 1e6:,.1f} MB"
    report("data", facts, "read" if isinstance(source, FileSource) else "written", _since(started))

    started = time.monotonic()
    tokenizer = request.given or _train(source, wanted, request, scan)
    done = "given" if request.given else "trained"
    facts = f"{tokenizer.kind} {tokenizer.vocab_size:,} ({request.reason})"
    report("tokenizer", facts, done, _since(started))

    started = time.monotonic()
    partial = shards_dir / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise not_writable(partial, error) from error
    _remove_stale(shards_dir)
    try:
        info = wanted.model_copy(
            update={
                "documents": len(scan.sizes),
                "whole_documents": scan.split is not None,
                "notes": source.notes(),
            }
        )
        items = split_items(source, wanted, scan)
        manifest = _write(partial, items, tokenizer, request, info)
        folder = _publish(partial, shards_dir / _folder_name(wanted, request))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    per_token = manifest.text_bytes / max(1, manifest.tokens)
    facts = f"{_amounts(manifest)}, {per_token:.2f} bytes per token"
    report("shards", facts, "written", _since(started))
    return folder


def _train(source: Source, wanted: SourceInfo, request: TokenizerRequest, scan: Scan) -> Tokenizer:
    """Train on text of the training split alone; a char tokenizer must know every character."""
    if request.kind == "char":
        return train_tokenizer("char", (chr(point) for point in np.flatnonzero(scan.points)))
    texts = (item.text for item in split_items(source, wanted, scan) if item.split == "train")
    share = _TOKENIZER_SAMPLE_BYTES / max(1, int(scan.sizes.sum()))
    return train_tokenizer(request.kind, _sample(texts, share, wanted.seed), request.vocab_size)


def _sample(texts: Iterable[str], share: float, seed: int) -> Iterator[str]:
    """About a share of the text, in blocks drawn by their content."""
    for text in texts:
        for block in cut_text(text, _SAMPLE_BLOCK_CHARS):
            if share >= 1 or document_key(block.encode(), seed) < share * 2**64:
                yield block


def _write(
    folder: Path,
    items: Iterator[Item],
    tokenizer: Tokenizer,
    request: TokenizerRequest,
    source: SourceInfo,
) -> Manifest:
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 65_535 else "uint32"
    writers = {split: SplitWriter(folder, split, dtype) for split in SPLITS}
    try:
        for batch in _batches(items):
            for item, ids in zip(batch, tokenizer.encode_batch([item.text for item in batch])):
                ended = np.append(ids, np.uint32(tokenizer.eos_id))
                writers[item.split].add(ended, len(item.text.encode()), item.entropy_bits)
        splits: dict[str, SplitInfo] = {s: writer.finish() for s, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    file = tokenizer.save(folder)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        dtype=dtype,
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind,
            file=file.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            requested=request.text,
        ),
        source=source,
        splits=splits,
        max_id=max(writer.max_id for writer in writers.values()),
    )
    write_durably(folder / MANIFEST, manifest.text().encode())
    return manifest


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += len(item.text)
        if chars >= _ENCODE_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _publish(partial: Path, folder: Path) -> Path:
    """Give the folder its name; where another process was faster, its folder is used."""
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise not_writable(folder, error) from error
        load_manifest(folder)
        return folder
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return folder


def _folder_name(wanted: SourceInfo, request: TokenizerRequest) -> str:
    """A name for people, and a key of everything that decides the content."""
    content = [VERSION, wanted.fingerprint, wanted.seed, wanted.val_fraction, wanted.test_fraction]
    key = hashlib.sha256(json.dumps([*content, request.text]).encode()).hexdigest()
    kind = request.text.replace(" ", "")[:12]
    return f"{_safe(wanted.name)}-{kind}-{key[:12]}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:32].strip("-_") or "text"


def _prompts(folder: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The first words of the first validation documents."""
    stream = open_shards(folder, "val", verify=False)
    offsets = document_offsets(folder, "val")[: _NUM_PROMPTS + 1].tolist()
    prompts = []
    for start, end in itertools.pairwise(offsets):
        text = tokenizer.decode(stream.tokens(start, min(end - 1, start + _PROMPT_TOKENS)).tolist())
        words = re.match(r"\s*(?:\S+\s+){0,4}\S+(?=\s)", text)
        prompts.append(words.group() if words else text[:20])
    return tuple(prompts)


def _remove_stale(shards_dir: Path) -> None:
    """Remove what killed processes left behind; a live one writes at least once a day."""
    for path in shards_dir.glob(".tmp-*"):
        try:
            old = time.time() - path.stat().st_mtime > _STALE_S
        except OSError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)


def _amounts(manifest: Manifest) -> str:
    return ", ".join(f"{manifest.splits[s].tokens:,} {s}" for s in SPLITS) + " tokens"


def _since(started: float) -> float:
    return time.monotonic() - started
