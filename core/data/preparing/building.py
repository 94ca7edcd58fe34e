"""Building a folder of shards, so that a kill at any moment costs seconds and changes nothing.

The folder grows under a temporary name. Every few seconds everything written is flushed, and
`progress.json` says how far it is; the same request goes on from there. A finished folder gets its
name by one rename.
"""

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.data.preparing.encoding import Block, Encoded, cut_blocks, encode_in_order, select
from core.data.preparing.ours import (
    LOCK,
    PROGRESS,
    lock_folder,
    private_folder,
    remove_folder,
    remove_stale,
)
from core.data.preparing.scan import Item
from core.data.preparing.shard_builder import (
    SHARD_TOKENS,
    SplitBuilder,
    not_writable,
    write_durably,
)
from core.data.shards.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    Manifest,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
    load_manifest,
)
from core.data.split import SPLITS
from core.data.tokenizers.tokenizer import Tokenizer
from core.durable import flush_folder
from core.errors import PippinError

SYNC_S = 5.0

Content = Literal["text", "chat", "preference"]


@dataclass(frozen=True)
class Amount:
    """How far a build is: what of the text has been encoded."""

    text_bytes: int
    tokens: int
    documents: int


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        workers: Processes that encode; the result does not depend on it.
        shard_tokens: Tokens of each file but the last.
        max_tokens: Stop after the document that reaches it, over all splits; None: all.
        content: What the documents are.
        progress: Called a few times a second.
    """

    workers: int = 1
    shard_tokens: int = SHARD_TOKENS
    max_tokens: int | None = None
    content: Content = "text"
    progress: Callable[[Amount], None] = lambda amount: None


@contextmanager
def work_folder(target: Path, key: str) -> Iterator[Path]:
    """A folder beside `target` to build in: the one a killed build of the same key left, or a new one.

    After an error it is kept where there is something to go on from. While another process builds
    the same, it is a folder of this process alone, which is not kept.

    Raises:
        PippinError: P312 where it cannot be made.
    """
    remove_stale(target.parent)
    folder = target.parent / f".work-{target.name}-{key[:12]}"
    lock = lock_folder(folder)
    if lock is None:
        with private_folder(target) as private:
            yield private
        return
    with lock:
        try:
            yield folder
        except BaseException:
            if not (folder / PROGRESS).exists():  # nothing to go on from
                remove_folder(folder)
            raise


def publish(folder: Path, target: Path, *, replace: bool = False) -> Path:
    """Give the folder its name; where another process was faster, its folder is used.

    Args:
        folder: A finished folder.
        target: Its name.
        replace: Remove the shards that stand there; files of others are kept beside it.
    """
    flush_folder(folder)
    old = target.parent / f".tmp-old-{os.getpid()}-{secrets.token_hex(4)}"
    held = None
    try:
        if replace and target.exists():
            target.rename(old)
            if not old.is_symlink():
                with contextlib.suppress(PippinError):
                    held = lock_folder(old)  # its mark: a kill leaves nothing for ever
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise not_writable(target, error) from error
        load_manifest(target)
        remove_folder(folder)
        return target
    finally:
        if old.exists() or old.is_symlink():
            if target.exists():
                remove_folder(old)
            else:  # the new folder did not get its name: what was there stays
                if held is not None:
                    (old / LOCK).unlink(missing_ok=True)
                old.rename(target)
        if held is not None:
            held.close()
    # Not before: without the lock another process would begin to build in the folder.
    for name in (PROGRESS, LOCK):
        (target / name).unlink(missing_ok=True)
    flush_folder(target.parent)
    return target


def build(
    folder: Path,
    items: Iterator[Item],
    tokenizer: Tokenizer,
    source: SourceInfo,
    requested: str,
    options: BuildOptions,
    *,
    notes: Callable[[], tuple[str, ...]] = tuple,
) -> Manifest:
    """Encode everything into a folder, from where an earlier build of the same stopped.

    Args:
        folder: From `work_folder`.
        items: The text with its splits, always the same.
        tokenizer: The tokenizer.
        source: For the manifest; `documents` is counted where it is 0, its notes come first.
        requested: The request for the tokenizer, for the manifest.
        options: How.
        notes: What was left out of the text, asked for when all of it has been read.
    """
    dtype = ids_dtype(tokenizer.vocab_size)
    weighted = options.content != "text"
    file = tokenizer.save(folder)
    done = _read_progress(folder)
    try:
        builders = _builders(folder, dtype, options, weighted, done.get("splits", {}))
    except PippinError as error:
        if error.code != "P203":
            raise
        # What was flushed is no longer there: nothing to go on from.
        (folder / PROGRESS).unlink(missing_ok=True)
        done = {}
        builders = _builders(folder, dtype, options, weighted, {})
    try:
        blocks = _after(cut_blocks(items, tokenizer), int(done.get("blocks", 0)))
        _run(folder, blocks, builders, tokenizer, file, dtype, options, done)
        splits: dict[str, SplitInfo] = {
            split: builder.finish() for split, builder in builders.items()
        }
    finally:
        for builder in builders.values():
            builder.close()
    counted = sum(info.documents for info in splits.values())
    said = (*source.notes, *notes(), *_cut_off(source, splits, options.max_tokens))
    source = source.model_copy(update={"documents": source.documents or counted, "notes": said})
    max_id = max(builder.max_id for builder in builders.values())
    return write_manifest(folder, tokenizer, source, splits, requested, max_id, options.content)


def _cut_off(
    source: SourceInfo, splits: Mapping[str, SplitInfo], max_tokens: int | None
) -> tuple[str, ...]:
    """That a limit of tokens left nothing for splits that were asked for, in words."""
    if max_tokens is None or sum(info.tokens for info in splits.values()) < max_tokens:
        return ()
    shares = {"val": source.val_fraction, "test": source.test_fraction}
    empty = [split for split, share in shares.items() if share > 0 and not splits[split].tokens]
    if not empty:
        return ()
    return (f"{max_tokens:,} tokens were reached before any document of {' and '.join(empty)}",)


def _builders(
    folder: Path,
    dtype: Literal["uint16", "uint32"],
    options: BuildOptions,
    weighted: bool,
    states: dict[str, Any],
) -> dict[str, SplitBuilder]:
    return {
        split: SplitBuilder(
            folder,
            split,
            dtype,
            shard_tokens=options.shard_tokens,
            weighted=weighted,
            state=states.get(split),
        )
        for split in SPLITS
    }


def ids_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The dtype of the ids of a vocabulary."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def write_manifest(
    folder: Path,
    tokenizer: Tokenizer,
    source: SourceInfo,
    splits: dict[str, SplitInfo],
    requested: str,
    max_id: int,
    content: Content = "text",
) -> Manifest:
    """Save the tokenizer and describe the finished files of a folder."""
    file = tokenizer.save(folder)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        dtype=ids_dtype(tokenizer.vocab_size),
        content=content,
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind,
            file=file.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            requested=requested,
        ),
        source=source,
        splits=splits,
        max_id=max_id,
    )
    write_durably(folder / MANIFEST, manifest.text().encode())
    return manifest


def _run(
    folder: Path,
    blocks: Iterator[Block],
    builders: dict[str, SplitBuilder],
    tokenizer: Tokenizer,
    file: Path,
    dtype: str,
    options: BuildOptions,
    done: dict[str, Any],
) -> None:
    number = int(done.get("blocks", 0))
    amount = Amount(*done.get("amount", (0, 0, 0)))
    synced = time.monotonic()
    if options.max_tokens is not None and amount.tokens >= options.max_tokens:
        return
    for block, encoded in encode_in_order(blocks, tokenizer, file, dtype, workers=options.workers):
        block, encoded, stop = _cut_at(block, encoded, options, amount)
        _add(builders, block, encoded)
        number += 1
        amount = Amount(
            amount.text_bytes + sum(piece.text_bytes for piece in block),
            amount.tokens + len(encoded.ids),
            amount.documents + sum(piece.ends for piece in block),
        )
        options.progress(amount)
        if stop:
            return
        if time.monotonic() - synced > SYNC_S:
            state = {
                "blocks": number,
                "amount": [amount.text_bytes, amount.tokens, amount.documents],
                "splits": {split: builder.sync() for split, builder in builders.items()},
            }
            _write_progress(folder, state)
            synced = time.monotonic()


def _after(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """The blocks that are not done yet; the done ones are read again, but not encoded."""
    for number, block in enumerate(blocks):
        if number >= count:
            yield block


def _cut_at(
    block: Block, encoded: Encoded, options: BuildOptions, before: Amount
) -> tuple[Block, Encoded, bool]:
    """Leave out what comes after the document, or the pair, that reaches the limit."""
    limit = options.max_tokens
    if limit is None or before.tokens + len(encoded.ids) < limit:
        return block, encoded, False
    reached = before.tokens + np.cumsum(encoded.counts) >= limit
    ends = np.array([piece.ends for piece in block])
    if options.content == "preference":
        ends &= (before.documents + np.cumsum(ends)) % 2 == 0
    last = np.flatnonzero(reached & ends)
    if not len(last):
        return block, encoded, False
    keep = int(last[0]) + 1
    tokens = int(encoded.counts[:keep].sum())
    weights = None if encoded.weights is None else encoded.weights[:tokens]
    return block[:keep], Encoded(encoded.ids[:tokens], encoded.counts[:keep], weights), True


def _add(builders: dict[str, SplitBuilder], block: Block, encoded: Encoded) -> None:
    for index, split in enumerate(SPLITS):
        pieces = [piece for piece in block if piece.split == index]
        if not pieces:
            continue
        ids, ends, weights = select(block, encoded, index)
        entropies = [piece.entropy_bits for piece in pieces]
        known = [bits for bits in entropies if bits is not None]
        builders[split].add(
            ids,
            ends,
            text_bytes=sum(piece.text_bytes for piece in pieces),
            entropy_bits=sum(known) if len(known) == len(entropies) else None,
            weights=weights,
        )


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _write_progress(folder: Path, state: dict[str, Any]) -> None:
    partial = folder / f"{PROGRESS}.tmp"
    write_durably(partial, json.dumps(state).encode())
    partial.replace(folder / PROGRESS)
