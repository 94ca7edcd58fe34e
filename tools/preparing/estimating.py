"""How much an input gives, from its beginning: what is read of it, and tokens of a part of that."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from core.data.chat import ChatSource
from core.data.preparing.building import Content, ids_dtype
from core.data.preparing.encoding import cut_blocks, encode_block
from core.data.preparing.request import TokenizerRequest
from core.data.preparing.scan import Item
from core.data.reading.documents import Document
from core.data.reading.sources import FileSource, Source
from core.data.split import SPLITS, Split
from core.data.tokenizers.tokenizer import Tokenizer
from core.data.tokenizers.training import train_tokenizer

# Text that is encoded, and text that is read to see how much of the files it is: reading is quick,
# and files are read a megabyte at once, which must be little of it.
SAMPLE_BYTES = 4_000_000
MEASURED_BYTES = 32_000_000


@dataclass(frozen=True)
class Sample:
    """The beginning of an input.

    Attributes:
        documents: At most `SAMPLE_BYTES` of text, the last of them perhaps cut.
        num_documents: All that were read.
        text_bytes: Bytes of text of all that were read.
        whole: Whether there are no more.
        scale: How many times as much there is in all; None where the size is not known.
    """

    documents: tuple[Document, ...]
    num_documents: int
    text_bytes: int
    whole: bool
    scale: float | None


@dataclass(frozen=True)
class Limits:
    """What is asked for of an input.

    Attributes:
        num_documents: At most so many documents; None is all.
        max_tokens: At most so many tokens, about; None is all.
        shares: Share of each split.
        shard_tokens: Tokens of each file but the last of a split.
    """

    num_documents: int | None
    max_tokens: int | None
    shares: Mapping[Split, float]
    shard_tokens: int


@dataclass(frozen=True)
class Estimate:
    """What an input gives.

    Attributes:
        text_bytes: Bytes of its text.
        sample_bytes: Bytes of the text that was encoded.
        estimated: Whether the figures are about right and not exact.
        at_least: Whether there may be more: the size of the input is not known.
        tokenizer: Kind and number of ids.
        bytes_per_token: Of the text that was encoded.
        documents: Documents; of preferences two a pair.
        tokens: Tokens of all splits.
        shards: Files of tokens; a split that is not empty has one at least.
        disk_bytes: Of tokens, weights and offsets.
    """

    text_bytes: int
    sample_bytes: int
    estimated: bool
    at_least: bool
    tokenizer: str
    bytes_per_token: float
    documents: int
    tokens: int
    shards: int
    disk_bytes: int


def estimate(
    source: Source, content: Content, request: TokenizerRequest, limits: Limits
) -> Estimate:
    """Read the beginning of a source and say what all of it gives."""
    sample = take_sample(source)
    texts = [document.text for document in sample.documents]
    sample_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = request.given or train_tokenizer(request.kind, texts, request.vocab_size)
    sample_tokens = count_tokens(sample.documents, tokenizer)
    documents = sample.num_documents * (sample.scale or 1.0)
    share = 1.0
    if limits.num_documents is not None and not sample.whole:
        wanted = limits.num_documents * (2 if content == "preference" else 1)
        share = wanted / documents if sample.scale is None else min(1.0, wanted / documents)
    text_bytes = sample.text_bytes * (sample.scale or 1.0) * share
    tokens = sample_tokens * text_bytes / max(1, sample_bytes)
    if limits.max_tokens is not None and tokens > limits.max_tokens:
        kept = limits.max_tokens / tokens
        text_bytes, tokens, share = text_bytes * kept, limits.max_tokens, share * kept
    unknown = sample.scale is None and not sample.whole
    reached = limits.num_documents is not None or tokens == limits.max_tokens
    width = np.dtype(ids_dtype(tokenizer.vocab_size)).itemsize + (content != "text")
    all_tokens, count = round(tokens), round(documents * share)
    return Estimate(
        text_bytes=round(text_bytes),
        sample_bytes=sample_bytes,
        estimated=not sample.whole or share < 1 or sample_bytes < sample.text_bytes,
        at_least=unknown and not reached,
        tokenizer=f"{tokenizer.kind} {tokenizer.vocab_size}",
        bytes_per_token=sample_bytes / max(1, sample_tokens),
        documents=count,
        tokens=all_tokens,
        shards=num_files(all_tokens, limits),
        disk_bytes=all_tokens * width + 8 * (count + len(SPLITS)),
    )


def take_sample(source: Source) -> Sample:
    """Read the beginning of a source; of one that streams as much as is encoded."""
    most = SAMPLE_BYTES if source.streams else MEASURED_BYTES
    kept: list[Document] = []
    size = kept_size = count = 0
    # What had been read of the files when all that they held had been given out, and its text.
    read, read_text, last = 0, 0, 0
    whole = True
    for document in source.documents():
        if size >= most:
            whole = False
            break
        if source.bytes_read != last:
            read, read_text, last = last, size, source.bytes_read
        if kept_size < SAMPLE_BYTES:
            part = _beginning(document, SAMPLE_BYTES - kept_size)
            kept.append(part)
            kept_size += len(part.text.encode())
        size += len(document.text.encode())
        count += 1
    if whole:
        scale: float | None = 1.0
    elif source.num_bytes == 0:
        scale = None
    else:
        if read_text == 0 or source.streams:
            read, read_text = source.bytes_read, size
        scale = max(1.0, source.num_bytes / max(1, read) * read_text / size)
    return Sample(tuple(kept), count, size, whole, scale)


def _beginning(document: Document, chars: int) -> Document:
    """A document, or its beginning; conversations stay whole."""
    if document.segments is not None or len(document.text) <= chars:
        return document
    return replace(document, text=document.text[:chars])


def count_tokens(documents: tuple[Document, ...], tokenizer: Tokenizer) -> int:
    """Tokens of documents as shards hold them, symbols of conversations and `</s>` included."""
    items = (Item("train", d.text, d.entropy_bits, d.segments) for d in documents)
    dtype = ids_dtype(tokenizer.vocab_size)
    blocks = cut_blocks(items, tokenizer)
    return sum(len(encode_block(tokenizer, block, dtype).ids) for block in blocks)


def num_files(tokens: int, limits: Limits) -> int:
    """Files of tokens of all splits."""
    parts = (share * tokens for share in limits.shares.values() if share > 0)
    return sum(max(1, math.ceil(part / limits.shard_tokens)) for part in parts) if tokens else 0


def split_shares(
    source: Source, val_fraction: float, test_fraction: float
) -> Mapping[Split, float]:
    """Share of each split: as asked for, or as large as the files that are named so."""
    records = source.source if isinstance(source, ChatSource) else source
    files = records.files if isinstance(records, FileSource) else ()
    sizes: dict[Split, float] = dict.fromkeys(SPLITS, 0.0)
    for file in files:
        if file.split is not None:
            sizes[file.split] += file.path.stat().st_size
    if sizes["val"] > 0:
        return {split: size / sum(sizes.values()) for split, size in sizes.items()}
    train = 1.0 - val_fraction - test_fraction
    return {"train": train, "val": val_fraction, "test": test_fraction}
