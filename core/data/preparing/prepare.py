"""From text to shards in one go: find the text, make the tokenizer, split, encode, publish.

The result is a folder below `shards_dir` that is reused as long as the text, the tokenizer and the
split are the same; its name says the text, its key is the content. An interrupted preparation goes
on where it was (`core.data.preparing.building`).
"""

import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from core.cores import usable_cores
from core.data.preparing.building import (
    BuildOptions,
    Content,
    build,
    publish,
    work_folder,
)
from core.data.preparing.inputs import (
    open_input,
    other_readings,
    preferences_are_no_text,
    splits_are_given,
)
from core.data.preparing.known_characters import known_to
from core.data.preparing.lengths import check_lengths
from core.data.preparing.limit import limited_parts, shares
from core.data.preparing.ours import PROGRESS
from core.data.preparing.request import TokenizerRequest, resolve_tokenizer
from core.data.preparing.reuse import (
    Report,
    content_key,
    find_folder,
    folder_name,
    safe_name,
)
from core.data.preparing.scan import STREAMED, Scan, scan_source, split_items
from core.data.reading.bad_lines import OnBadLine
from core.data.reading.sources import ReadOptions, Source, StorySource
from core.data.shards.manifest import (
    MANIFEST,
    Manifest,
    SourceInfo,
    check_tokenizer,
    document_offsets,
    load_manifest,
    open_shards,
    other_tokenizer,
)
from core.data.shards.verify import own_tokenizer
from core.data.split import SPLITS, document_key
from core.data.tokenizers.tokenizer import KINDS, Tokenizer, cut_text, load_tokenizer
from core.data.tokenizers.training import train_tokenizer
from core.errors import PippinError

# A bpe tokenizer of 32,768 pieces is not better for more text than this.
_TOKENIZER_SAMPLE_BYTES = 20_000_000
_SAMPLE_BLOCK_CHARS = 20_000
_NUM_PROMPTS, _PROMPT_TOKENS = 3, 64
# Starting processes costs a second, which less text than this does not take.
_PARALLEL_BYTES = 30_000_000


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
    on_bad_line: OnBadLine = "error",
    tokenizer: str = "auto",
    vocab_size: int | None = None,
    val_fraction: float = 0.02,
    test_fraction: float = 0.02,
    corpus_bytes: int = 20_000_000,
    report: Report = lambda phase, facts, result, seconds: None,
) -> Prepared:
    """Make or find the shards of a text.

    Args:
        input_file: A file, folder, glob, `hf:NAME` or folder of shards, of text or of chats; None is
            the story corpus.
        shards_dir: Folder in which a folder of shards is made.
        seq_len: T; train and val must each hold one window.
        seed: Of the split, and of the stories.
        text_field: Field of a .jsonl record.
        on_bad_line: "error" stops at what cannot be read, "skip" leaves it out and counts it.
        tokenizer: "auto", "bpe", "unigram", "char", "byte", or the path of a tokenizer or of a run folder.
        vocab_size: Pieces of a bpe or unigram tokenizer; None chooses by the amount of text.
        val_fraction: Share of the text for validation.
        test_fraction: Share of the text for the test.
        corpus_bytes: Size of the story corpus.
        report: Called when a phase is done.

    Raises:
        PippinError: P201 for too little text, P202 for text that cannot be read, P203 for damaged
            shards, P301 for a tokenizer that cannot be used, P010 for settings that contradict.
    """
    started = time.monotonic()
    ready = ready_folder(input_file)
    if ready is not None:
        return _open_ready(ready, tokenizer, seq_len, report)
    source: Source = StorySource(corpus_bytes, seed, val_fraction, test_fraction)
    content: Content = "text"
    if input_file is not None:
        source, content, note = open_input(input_file, ReadOptions(text_field, on_bad_line))
        if note:
            report("data", note, "", 0)
    request = resolve_tokenizer(source, tokenizer, vocab_size)
    wanted = wanted_source(
        source, seed=seed, val_fraction=val_fraction, test_fraction=test_fraction
    )

    def check(manifest: Manifest) -> None:
        check_lengths(manifest, seq_len, fixed_splits=splits_are_given(source))

    folder = find_folder(shards_dir, wanted, request, report, lambda: other_readings(source))
    reused = folder is not None
    if folder is None:
        target = shards_dir / folder_name(wanted, request)
        folder = make_shards(
            source,
            wanted,
            request,
            target,
            options=BuildOptions(workers=default_workers(source), content=content),
            # What has this name and was not found is damaged.
            replace_target=target.exists(),
            report=report,
            check=check,
        )
    manifest = load_manifest(folder)
    made = own_tokenizer(folder, manifest)
    check_tokenizer(manifest, folder, made.fingerprint)
    if reused:
        report("shards", amounts(manifest), "reused", _since(started))
    check(manifest)
    return Prepared(
        folder=folder,
        manifest=manifest,
        tokenizer=made,
        tokenizer_reason=request.reason,
        name=safe_name(source.name),
        prompts=_prompts(folder, made),
        reused=reused,
    )


def wanted_source(
    source: Source, *, seed: int, val_fraction: float, test_fraction: float
) -> SourceInfo:
    """The description of a source for a manifest, before anything is read."""
    return SourceInfo(
        name=source.name,
        fingerprint=source.fingerprint,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        documents=0,
        whole_documents=True,
        notes=(),
    )


def ready_folder(input_file: str | Path | None) -> Path | None:
    """The input itself, where it is a folder of shards."""
    path = None if input_file is None else Path(input_file).expanduser()
    return path if path is not None and (path / MANIFEST).is_file() else None


def _open_ready(folder: Path, tokenizer: str, seq_len: int, report: Report) -> Prepared:
    """Shards that somebody prepared, as they are; their split and tokenizer are theirs."""
    started = time.monotonic()
    manifest = load_manifest(folder)
    if manifest.content == "preference":
        raise preferences_are_no_text(str(folder))
    made = own_tokenizer(folder, manifest)
    check_tokenizer(manifest, folder, made.fingerprint)
    if tokenizer in KINDS and tokenizer != made.kind:
        raise other_tokenizer(manifest, folder, tokenizer)
    if tokenizer not in ("auto", made.kind, *KINDS):
        given = load_tokenizer(Path(tokenizer).expanduser())
        check_tokenizer(manifest, folder, given.fingerprint)
    report("shards", amounts(manifest), "as prepared", _since(started))
    check_lengths(manifest, seq_len, fixed_splits=True)
    return Prepared(
        folder=folder,
        manifest=manifest,
        tokenizer=made,
        tokenizer_reason="the shards'",
        name=safe_name(folder.resolve().name),
        prompts=_prompts(folder, made),
        reused=True,
    )


def make_shards(
    source: Source,
    wanted: SourceInfo,
    request: TokenizerRequest,
    target: Path,
    *,
    options: BuildOptions | None = None,
    replace_target: bool = False,
    report: Report = lambda phase, facts, result, seconds: None,
    counted: Callable[[int], None] = lambda num_bytes: None,
    check: Callable[[Manifest], None] = lambda manifest: None,
) -> Path:
    """Read, train the tokenizer where none is given, split, encode and publish.

    Args:
        source: The text.
        wanted: Its description for the manifest, without the number of documents.
        request: The tokenizer.
        target: The folder to make; where it appears meanwhile, that one is used.
        options: How to build; by default by the amount of text.
        replace_target: Remove what stands at `target`.
        report: Called when a phase is done.
        counted: Called with the bytes of the text where it was read to count it.
        check: Called before the folder gets its name; where it raises, nothing is kept.

    Returns:
        The folder.
    """
    started = time.monotonic()
    options = options or BuildOptions(workers=default_workers(source))
    source, scan = known_to(request.given, source), STREAMED
    if not source.streams:
        scan = scan_source(source, wanted, characters=request.kind == "char" and not request.given)
        count = f"{scan.documents:,} document" + ("s" if scan.documents != 1 else "")
        facts = f"{wanted.name}, {count}, {scan.num_bytes / 1e6:,.1f} MB"
        done = "written" if isinstance(source, StorySource) else "read"
        report("data", facts, done, _since(started))
        counted(scan.num_bytes)

    started = time.monotonic()
    tokenizer = request.given or _train(source, wanted, request, scan)
    if source.streams:  # of which a tokenizer has seen a part
        source = known_to(tokenizer, source)
    done = "given" if request.given else "trained"
    facts = f"{tokenizer.kind} {tokenizer.vocab_size:,} ({request.reason})"
    report("tokenizer", facts, done, _since(started))

    started = time.monotonic()
    info = wanted.model_copy(
        update={
            "documents": scan.documents or 0,
            "whole_documents": scan.whole_documents,
            "notes": scan.notes,
        }
    )
    key = hashlib.sha256(
        json.dumps(
            [content_key(wanted, request), tokenizer.fingerprint, _decisive(options)]
        ).encode()
    ).hexdigest()
    with work_folder(target, key) as folder:
        items = split_items(source, wanted, scan)
        if options.max_tokens is not None and not scan.whole_documents:
            items = limited_parts(items, tokenizer, shares(wanted, options.max_tokens))
            options = replace(options, max_tokens=None)
        manifest = build(folder, items, tokenizer, info, request.text, options, notes=source.notes)
        if manifest.tokens == 0:
            raise PippinError("P201", f"no text found in {wanted.name}", found="0 documents")
        try:
            check(manifest)
        except PippinError:
            (folder / PROGRESS).unlink(missing_ok=True)
            raise
        made = publish(folder, target, replace=replace_target)
    per_token = manifest.text_bytes / max(1, manifest.tokens)
    facts = f"{amounts(manifest)}, {per_token:.2f} bytes per token"
    report("shards", facts, "written", _since(started))
    return made


def default_workers(source: Source) -> int:
    """Processes that are worth their start: one for little text."""
    if source.num_bytes and source.num_bytes < _PARALLEL_BYTES:
        return 1
    return min(8, usable_cores())


def _decisive(options: BuildOptions) -> list[object]:
    """What of the options decides the files."""
    return [options.shard_tokens, options.max_tokens, options.content]


def _train(source: Source, wanted: SourceInfo, request: TokenizerRequest, scan: Scan) -> Tokenizer:
    """Train on text of the training split alone; a char tokenizer must know every character."""
    if request.kind == "char" and scan.points is not None:
        return train_tokenizer("char", (chr(point) for point in np.flatnonzero(scan.points)))
    texts = (item.text for item in split_items(source, wanted, scan) if item.split == "train")
    share = _TOKENIZER_SAMPLE_BYTES / scan.num_bytes if scan.num_bytes else 1.0
    sample = _sample(texts, share, wanted.seed)
    return train_tokenizer(request.kind, _first_bytes(sample), request.vocab_size)


def _sample(texts: Iterable[str], share: float, seed: int) -> Iterator[str]:
    """About a share of the text, in blocks drawn by their content."""
    for text in texts:
        for block in cut_text(text, _SAMPLE_BLOCK_CHARS):
            if share >= 1 or document_key(block.encode(), seed) < share * 2**64:
                yield block


def _first_bytes(texts: Iterable[str]) -> Iterator[str]:
    """Of a text without an end, as much as a tokenizer needs."""
    taken = 0
    for text in texts:
        yield text
        taken += len(text)
        if taken > 2 * _TOKENIZER_SAMPLE_BYTES:
            return


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


def amounts(manifest: Manifest) -> str:
    """Tokens of each split, in words."""
    return ", ".join(f"{manifest.splits[s].tokens:,} {s}" for s in SPLITS) + " tokens"


def _since(started: float) -> float:
    return time.monotonic() - started
