"""The passes over a text: once to count and split it, and again to take each piece to its split."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.data.shards import SourceInfo
from core.data.sources import Source
from core.data.split import (
    SPLITS,
    Split,
    assign_documents,
    cut_document,
    document_key,
    keep_apart,
)
from core.data.tokenizer import code_points
from core.errors import PippinError


@dataclass(frozen=True)
class Scan:
    """One pass over the text.

    Attributes:
        sizes: int64 `[n]`, bytes of each document.
        points: bool `[0x110000]`, whether a code point is in use.
        split: int8 `[n]`, index into `SPLITS`; None where documents are cut.
    """

    sizes: NDArray[np.int64]
    points: NDArray[np.bool_]
    split: NDArray[np.int8] | None


@dataclass(frozen=True)
class Item:
    """A piece of text on its way to a split."""

    split: Split
    text: str
    entropy_bits: float | None


def scan_source(source: Source, wanted: SourceInfo) -> Scan:
    """Read everything once.

    Raises:
        PippinError: P201 where no document holds text, P202 for text that cannot be read.
    """
    keys, sizes, given = [], [], []
    points = np.zeros(0x110000, dtype=bool)
    for document in source.documents():
        content = document.text.encode()
        keys.append(document_key(content, wanted.seed))
        sizes.append(len(content))
        given.append(document.split)
        points[code_points(document.text)] = True
    if not sizes:
        raise PippinError(
            "P201",
            f"no text found in {wanted.name}",
            found=f"0 documents with text of {source.num_bytes:,} bytes\n"
            + "\n".join(source.notes()),
        )
    key_array, size_array = np.array(keys, np.uint64), np.array(sizes, np.int64)
    if None not in given:
        split = keep_apart(key_array, np.array([SPLITS.index(s) for s in given if s], np.int8))
        return Scan(size_array, points, split)
    fractions = wanted.val_fraction, wanted.test_fraction
    return Scan(size_array, points, assign_documents(key_array, size_array, *fractions))


def split_items(source: Source, wanted: SourceInfo, scan: Scan) -> Iterator[Item]:
    """Each document with its split, or its parts with theirs.

    Raises:
        PippinError: P203 where the text is not the one that was scanned.
    """
    number = 0
    for number, document in enumerate(source.documents(), start=1):
        if number > len(scan.sizes) or len(document.text.encode()) != scan.sizes[number - 1]:
            raise _changed(wanted)
        if scan.split is not None:
            split = SPLITS[int(scan.split[number - 1])]
            yield Item(split, document.text, document.entropy_bits)
            continue
        parts = cut_document(document.text, wanted.val_fraction, wanted.test_fraction)
        for split, part in zip(SPLITS, parts):
            if part:
                yield Item(split, part, None)
    if number != len(scan.sizes):
        raise _changed(wanted)


def _changed(wanted: SourceInfo) -> PippinError:
    return PippinError(
        "P203", f"the text of {wanted.name} changed while it was read", remedy="start again"
    )
