"""Which text is for training, which for validation and test.

Documents that are equal always fall on the same side. With fewer than 50 documents, or where single
documents are too large for a share, each is cut at line ends: its beginning is for training, its
tail for validation and test, and no window crosses a cut.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

MIN_DOCUMENTS = 50


def document_key(text: bytes, seed: int) -> int:
    """64 bits of the text and the seed; documents are drawn in the order of their keys."""
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=key).digest(), "little")


def assign_documents(
    keys: NDArray[np.uint64], sizes: NDArray[np.int64], val_fraction: float, test_fraction: float
) -> NDArray[np.int8] | None:
    """Assign whole documents by bytes.

    Args:
        keys: uint64 `[n]`, from `document_key`; equal documents have equal keys.
        sizes: int64 `[n]` bytes.
        val_fraction: Share of the bytes for validation, about.
        test_fraction: Share of the bytes for the test, about; may be 0.

    Returns:
        int8 `[n]`, index into `SPLITS`; None where the documents must be cut instead.
    """
    unique, group = np.unique(keys, return_inverse=True)
    if len(unique) < MIN_DOCUMENTS:
        return None
    group_sizes = np.bincount(group, weights=sizes).astype(np.int64)
    total = int(group_sizes.sum())
    split = np.zeros(len(unique), dtype=np.int8)
    for index, fraction in ((2, test_fraction), (1, val_fraction)):
        if fraction <= 0:
            continue
        target, taken = fraction * total, 0
        # In key order, which is a random one; a document larger than the rest of the share is left
        # to training.
        for i in range(len(unique)):
            if split[i] == 0 and taken + group_sizes[i] <= 1.02 * target:
                split[i] = index
                taken += int(group_sizes[i])
            if taken >= 0.98 * target:
                break
        if taken < 0.5 * target:
            return None
    return split[group]


def split_by_key(key: int, val_fraction: float, test_fraction: float) -> int:
    """Index into `SPLITS` of a document by its key alone; shares are met on average."""
    place = key / 2**64
    if place < test_fraction:
        return 2
    return 1 if place < test_fraction + val_fraction else 0


def keep_apart(keys: NDArray[np.uint64], split: NDArray[np.int8]) -> NDArray[np.int8]:
    """Move what is in two splits to the first of train, val and test, so that no text is on two sides.

    Args:
        keys: uint64 `[n]`, from `document_key`.
        split: int8 `[n]`, index into `SPLITS`.
    """
    trained = np.isin(keys, keys[split == 0])
    apart = np.where(trained, np.int8(0), split)
    validated = np.isin(keys, keys[apart == 1])
    return np.where((apart == 2) & validated, np.int8(1), apart)


def moved_notes(
    given: NDArray[np.int8], apart: NDArray[np.int8], done: str = "moved there"
) -> tuple[str, ...]:
    """What `keep_apart` moved, in words.

    Args:
        given: int8 `[n]`, the splits as they were.
        apart: int8 `[n]`, those that `keep_apart` gave.
        done: What became of the documents.
    """
    names = ("training", "validation", "test")
    pairs = ((1, 0), (2, 0), (2, 1))
    counts = [(old, new, int(((given == old) & (apart == new)).sum())) for old, new in pairs]
    return tuple(
        f"{count:,} {names[old]} documents that are also in {names[new]} were {done}"
        for old, new, count in counts
        if count
    )


def cut_document(text: str, val_fraction: float, test_fraction: float) -> tuple[str, str, str]:
    """Cut a text into its beginning, for training, and two tails, at line ends where there are any.

    Returns:
        The parts for train, val and test; joined they are the text, and each may be empty.
    """
    first = _cut_point(text, 1.0 - val_fraction - test_fraction)
    second = _cut_point(text, 1.0 - test_fraction) if test_fraction > 0 else len(text)
    second = max(first, second)
    return text[:first], text[first:second], text[second:]


def _cut_point(text: str, fraction: float) -> int:
    """The line end nearest to a fraction of the text, else a space, else that very place."""
    wanted = round(len(text) * fraction)
    reach = max(len(text) // 50, 200)
    low, high = max(0, wanted - reach), min(len(text), wanted + reach)
    for mark in ("\n", " "):
        before = text.rfind(mark, low, wanted) + 1
        after = text.find(mark, wanted, high) + 1
        places: Sequence[int] = [p for p in (before, after) if p > 0]
        if places:
            return min(places, key=lambda p: abs(p - wanted))
    return wanted
