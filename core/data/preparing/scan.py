"""The passes over a text: once to count and split it, and again to take each piece to its split.

A source that streams is read once: each document goes where its own key says.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.data.reading.documents import Document
from core.data.reading.example import Segment
from core.data.reading.sources import Source
from core.data.shards.manifest import SourceInfo
from core.data.split import (
    SPLITS,
    Split,
    assign_documents,
    cut_document,
    document_key,
    keep_apart,
    moved_notes,
    split_by_key,
)
from core.data.tokenizers.tokenizer import code_points
from core.errors import PippinError

# Above this many documents each goes where its own key says: shares are exact enough then, and
# memory does not grow with the text.
MAX_SCANNED = 2_000_000


@dataclass(frozen=True)
class Scan:
    """One pass over the text.

    Attributes:
        documents: How many there are; None where it is not known.
        num_bytes: Their bytes; 0 where not known.
        content_key: Of all documents in order; None where not known.
        points: bool `[0x110000]`, whether a code point is in use; None where nobody asked.
        split: int8 `[n]`, index into `SPLITS`; None where documents are cut, or split by key.
        by_key: Whether each document goes where its key says.
        notes: What was done to the splits that the source gives, in words.
    """

    documents: int | None
    num_bytes: int
    content_key: int | None
    points: NDArray[np.bool_] | None
    split: NDArray[np.int8] | None
    by_key: bool
    notes: tuple[str, ...] = ()

    @property
    def whole_documents(self) -> bool:
        """Whether no document is in two splits."""
        return self.by_key or self.split is not None


STREAMED = Scan(None, 0, None, None, None, by_key=True)
"""What is known of a source that is read once."""


@dataclass(frozen=True)
class Item:
    """A piece of text on its way to a split. A chat has segments instead of text."""

    split: Split
    text: str
    entropy_bits: float | None
    segments: tuple[Segment, ...] | None = None


def scan_source(source: Source, wanted: SourceInfo, *, characters: bool = False) -> Scan:
    """Read everything once.

    Args:
        source: The text.
        wanted: Seed and shares of the split.
        characters: Also find the characters in use.

    Raises:
        PippinError: P201 where no document holds text, P202 for text that cannot be read.
    """
    keys, sizes, given = array("Q"), array("q"), array("b")
    points = np.zeros(0x110000, dtype=bool) if characters else None
    documents = total = content = 0
    chats = False
    for document in source.documents():
        chats = chats or document.segments is not None
        size = _size(document)
        key = _key(document, wanted.seed)
        documents, total, content = documents + 1, total + size, _mix(content, key)
        if documents <= MAX_SCANNED:
            keys.append(key)
            sizes.append(size)
            given.append(-1 if document.split is None else SPLITS.index(document.split))
        if points is not None:
            points[code_points(document.text)] = True
    if documents == 0:
        raise PippinError(
            "P201",
            f"no text found in {wanted.name}",
            found=f"0 documents with text of {source.num_bytes:,} bytes\n"
            + "\n".join(source.notes()),
        )
    given_array = np.frombuffer(given, np.int8)
    notes: tuple[str, ...] = ()
    if documents > MAX_SCANNED:
        if (given_array >= 0).any():
            notes = (
                f"above {MAX_SCANNED:,} documents equal ones in two splits are not looked for",
            )
        return Scan(documents, total, content, points, None, by_key=True, notes=notes)
    key_array = np.frombuffer(keys, np.uint64)
    size_array = np.frombuffer(sizes, np.int64)
    split, notes = _divided(key_array, size_array, given_array, wanted, chats=chats)
    by_key = chats and split is None
    return Scan(documents, total, content, points, split, by_key=by_key, notes=notes)


def _divided(
    keys: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    given: NDArray[np.int8],
    wanted: SourceInfo,
    *,
    chats: bool,
) -> tuple[NDArray[np.int8] | None, tuple[str, ...]]:
    """Splits of whole documents, int8 `[n]`, where there are enough; and what is to be said."""
    notes: tuple[str, ...] = ()
    if given.min() >= 0 and given.max() > 0:
        apart = keep_apart(keys, given)
        split = _with_validation(keys, sizes, apart, wanted)
        if split is None and chats:  # which are never cut
            split = apart
        if split is not None:
            return split, moved_notes(given, apart)
        notes = ("the documents named as a test were divided anew: too few for a validation",)
    return assign_documents(keys, sizes, wanted.val_fraction, wanted.test_fraction), notes


def _with_validation(
    keys: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    given: NDArray[np.int8],
    wanted: SourceInfo,
) -> NDArray[np.int8] | None:
    """Splits that a source gives; where none is for validation, it is drawn from training.

    Returns:
        int8 `[n]`, index into `SPLITS`; None where training has too few documents for that.
    """
    if (given == 1).any() or wanted.val_fraction <= 0:
        return given
    train = given == 0
    drawn = assign_documents(keys[train], sizes[train], wanted.val_fraction, 0.0)
    if drawn is None:
        return None
    split: NDArray[np.int8] = given.copy()
    split[train] = drawn
    return split


def split_items(source: Source, wanted: SourceInfo, scan: Scan) -> Iterator[Item]:
    """Each document with its split, or its parts with theirs.

    Raises:
        PippinError: P203 where the text is not the one that was scanned.
    """
    number = content = 0
    fractions = wanted.val_fraction, wanted.test_fraction
    for number, document in enumerate(source.documents(), start=1):
        key = _key(document, wanted.seed)
        content = _mix(content, key)
        if scan.documents is not None and number > scan.documents:
            raise _changed(wanted)
        if scan.by_key:
            split = document.split or SPLITS[split_by_key(key, *fractions)]
            yield Item(split, document.text, document.entropy_bits, document.segments)
        elif scan.split is not None:
            split = SPLITS[int(scan.split[number - 1])]
            yield Item(split, document.text, document.entropy_bits, document.segments)
        else:
            parts = cut_document(document.text, *fractions)
            yield from (Item(s, part, None) for s, part in zip(SPLITS, parts) if part)
    if scan.documents is not None and (number, content) != (scan.documents, scan.content_key):
        raise _changed(wanted)


def _key(document: Document, seed: int) -> int:
    """64 bits of the text; a pair shares those of its group."""
    return document_key((document.group or document.text).encode(), seed)


def _size(document: Document) -> int:
    return len(document.text.encode())


def _mix(content: int, key: int) -> int:
    return (content * 0x100000001B3 + key) & ((1 << 64) - 1)


def _changed(wanted: SourceInfo) -> PippinError:
    return PippinError(
        "P203", f"the text of {wanted.name} changed while it was read", remedy="start again"
    )
