"""Token files of other programs made into shards of ours.

Ids mean nothing without their tokenizer, which is needed: it says how many bytes each stands for. The
ids are kept; documents end after the end-of-document id. Files are read in pieces, so memory does
not grow with them, and the folder gets its name only when it is complete.
"""

import errno
import hashlib
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.data.foreign.formats import Foreign, TokenArrays, read_foreign
from core.data.preparing.building import ids_dtype, write_manifest
from core.data.preparing.ours import LOCK, private_folder, remove_stale
from core.data.preparing.shard_builder import SHARD_TOKENS, SplitBuilder, not_writable
from core.data.shards.manifest import (
    Manifest,
    SourceInfo,
    SplitInfo,
    file_sha256,
)
from core.data.shards.stream import TokenStream
from core.data.split import SPLITS, Split, assign_documents, keep_apart, moved_notes
from core.data.tokenizers.tokenizer import Tokenizer
from core.durable import flush_folder
from core.errors import PippinError

__all__ = ["import_foreign"]

PIECE_TOKENS = 1 << 20

Int64 = NDArray[np.int64]
# Phase, facts, what was done, seconds: one line for the user each.
Report = Callable[[str, str, str, float], None]


@dataclass(frozen=True)
class _Documents:
    """Where the documents of a stream lie.

    Attributes:
        starts: int64 `[D]`.
        stops: int64 `[D]`, behind the end-of-document id.
        add_eos: Whether the last one lacks an end-of-document id that it should have: where one
            stands before each document instead, the first is left out as an empty document.
    """

    starts: Int64
    stops: Int64
    add_eos: bool = False

    def chosen(self, kept: NDArray[np.bool_]) -> "_Documents":
        """Those of a mask `[D]`; the last one may lack its end still."""
        last = self.add_eos and len(kept) > 0 and bool(kept[-1])
        return _Documents(self.starts[kept], self.stops[kept], add_eos=last)


# The documents of each split, by the files that they lie in.
_Spans = dict[Split, list[tuple[TokenStream, _Documents]]]


def import_foreign(
    path: Path,
    *,
    tokenizer: Tokenizer,
    out: Path,
    format: str | None = None,
    eos_id: int | None = None,
    val_fraction: float = 0.02,
    seed: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    report: Report = lambda phase, facts, result, seconds: None,
) -> Manifest:
    """Make a folder of shards from token files of another program.

    Splits are taken from the files' names; where these name no validation, it is drawn from the
    training documents, equal ones on one side, or cut from the documents' ends where they are few.
    Where they name one, documents that are also in training are left out of it, and said to be.

    Args:
        path: A file or folder; see `foreign_formats.FORMATS`.
        tokenizer: The one the ids were made with.
        out: The folder to make; must not exist.
        format: A key of `FORMATS`; None finds it out.
        eos_id: The id between documents where it is not the tokenizer's; it becomes the tokenizer's.
        val_fraction: Share of the tokens for validation where the files name none; may be 0.
        seed: Of that choice.
        shard_tokens: Tokens of each file but the last.
        report: Called when a phase is done.

    Raises:
        PippinError: P010 for settings that contradict or an `out` that exists, P201 where there is
            nothing to read, P202 and P203 for files that cannot be read, P204 for ids that the
            tokenizer does not have, P312 where nothing can be written.
    """
    if not 0 <= val_fraction < 0.5:
        raise PippinError("P010", f"val_fraction={val_fraction} must be at least 0 and below 0.5")
    started = time.monotonic()
    foreign = read_foreign(path, format)
    eos = tokenizer.eos_id if eos_id is None else eos_id
    if not 0 <= eos < tokenizer.vocab_size:
        raise PippinError(
            "P204", f"eos_id={eos} is no id of the tokenizer, which has {tokenizer.vocab_size:,}"
        )
    with _new_folder(out) as folder:
        notes = list(foreign.notes)
        spans: _Spans = {split: [] for split in SPLITS}
        for split, arrays in foreign.splits.items():
            stream = TokenStream(arrays.parts, vocab_size=tokenizer.vocab_size, text_bytes=0)
            documents, found = _scan(stream, arrays, foreign, eos, split)
            notes += found
            spans[split].append((stream, documents))
        if spans["val"] or spans["test"]:
            spans, left_out = _apart(spans, eos, seed)
            notes += left_out
        whole = True
        if not spans["val"] and spans["train"] and val_fraction > 0:
            stream, documents = spans["train"][0]
            train, val, whole = _draw(stream, documents, val_fraction, seed, eos)
            spans["train"], spans["val"] = [(stream, train)], [(stream, val)]
        count = sum(len(d.starts) for kept in spans.values() for _, d in kept)
        total = sum(arrays.num_tokens for arrays in foreign.splits.values())
        report(
            "data",
            f"{foreign.format}, {len(foreign.files):,} files, {count:,} documents, {total:,} tokens",
            "checked",
            time.monotonic() - started,
        )
        started = time.monotonic()
        source = SourceInfo(
            name=path.resolve().stem if path.is_file() else path.resolve().name,
            fingerprint=_fingerprint(foreign, eos, tokenizer),
            seed=seed,
            val_fraction=val_fraction,
            test_fraction=0.0,
            documents=count,
            whole_documents=whole,
            notes=tuple(notes),
        )
        manifest = _write(folder, spans, tokenizer, eos, source, shard_tokens)
    amounts = ", ".join(f"{manifest.splits[s].tokens:,} {s}" for s in SPLITS)
    report("shards", f"{amounts} tokens", "written", time.monotonic() - started)
    return manifest


def _scan(
    stream: TokenStream, arrays: TokenArrays, foreign: Foreign, eos: int, split: Split
) -> tuple[_Documents, list[str]]:
    """Check every id and find the documents; also what is to be said of them."""
    others = [i for i in foreign.eos_candidates if i != eos]
    counts = dict.fromkeys(others, 0)
    found: list[Int64] = []
    for at, ids in _pieces(stream, 0, stream.num_tokens):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= stream.vocab_size:
            place = int(np.argmax((ids < 0) | (ids >= stream.vocab_size)))
            raise PippinError(
                "P204",
                f"{foreign.path} holds token id {int(ids[place]) & 0xFFFFFFFF:,}",
                found=f"token {at + place:,} of {split}; the tokenizer has {stream.vocab_size:,} "
                f"ids\nread as {foreign.format}, {foreign.dtype}",
                remedy="the tokenizer that the ids were made with, or another --format",
                kept="Nothing was written.",
            )
        found.append(at + np.flatnonzero(ids == eos) + 1)
        for other in others:
            counts[other] += int(np.count_nonzero(ids == other))
    ends = np.concatenate(found)
    edges = np.unique(np.concatenate([[0], ends, arrays.breaks, [stream.num_tokens]]))
    starts, stops = edges[:-1], edges[1:]
    empty = (stops - starts == 1) & np.isin(stops, ends)
    notes = []
    if not len(ends):
        notes.append(f"the id {eos} ends no document of {split}: it is taken as one text")
        notes += [
            f"id {other} occurs {n:,} times: perhaps it ends documents (--eos-id {other})"
            for other, n in counts.items()
            if n
        ]
    before_each = bool(empty[0]) and (len(ends) == 0 or int(ends[-1]) < stream.num_tokens)
    dropped = int(empty.sum()) - before_each
    if dropped:
        notes.append(f"{dropped:,} empty documents of {split} left out")
    if not (~empty).any():
        raise PippinError("P201", f"{foreign.path} holds no text in {split}, only id {eos}")
    return _Documents(starts[~empty], stops[~empty], add_eos=before_each), notes


def _pieces(stream: TokenStream, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Position and ids of pieces of a range."""
    for at in range(start, stop, PIECE_TOKENS):
        yield at, stream.tokens(at, min(at + PIECE_TOKENS, stop))


def _apart(spans: _Spans, eos: int, seed: int) -> tuple[_Spans, tuple[str, ...]]:
    """Leave out of validation and test what is in a split before them; also what is to be said."""
    keys = {
        split: [_keys(stream, documents, eos, seed) for stream, documents in kept]
        for split, kept in spans.items()
    }
    order = [(split, i) for split in SPLITS for i in range(len(spans[split]))]
    joined = np.concatenate([keys[split][i] for split, i in order])
    sizes = [len(keys[split][i]) for split, i in order]
    given = np.repeat(np.array([SPLITS.index(split) for split, _ in order], np.int8), sizes)
    apart = keep_apart(joined, given)
    result: _Spans = {split: [] for split in SPLITS}
    for (split, i), kept in zip(order, np.split(apart == given, np.cumsum(sizes)[:-1])):
        stream, documents = spans[split][i]
        result[split].append((stream, documents.chosen(kept)))
    return result, moved_notes(given, apart, "left out")


def _keys(stream: TokenStream, documents: _Documents, eos: int, seed: int) -> NDArray[np.uint64]:
    places = zip(documents.starts.tolist(), documents.stops.tolist())
    return np.array([_key(stream, a, b, seed, eos) for a, b in places], np.uint64)


def _draw(
    stream: TokenStream, documents: _Documents, val_fraction: float, seed: int, eos: int
) -> tuple[_Documents, _Documents, bool]:
    """Documents for training and for validation, and whether they are whole."""
    starts, stops, last = documents.starts, documents.stops, documents.add_eos
    keys = _keys(stream, documents, eos, seed)
    split = assign_documents(keys, stops - starts, val_fraction, 0.0)
    if split is not None:
        val = split == SPLITS.index("val")
        return documents.chosen(~val), documents.chosen(val), True
    cuts = starts + np.maximum(1, np.round((stops - starts) * (1 - val_fraction))).astype(np.int64)
    left = cuts < stops
    return (
        _Documents(starts, cuts, add_eos=last and not left[-1]),
        _Documents(cuts[left], stops[left], add_eos=last and bool(left[-1])),
        False,
    )


def _key(stream: TokenStream, start: int, stop: int, seed: int, eos: int) -> int:
    """As `split.document_key`, of the ids as uint32 and the end of the document, in pieces."""
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little", signed=True))
    last = -1
    for _, ids in _pieces(stream, start, stop):
        digest.update(ids.astype("<u4").tobytes())
        last = int(ids[-1])
    if last != eos:  # the last document of a file may lack it, and be the same text
        digest.update(np.array([eos], "<u4").tobytes())
    return int.from_bytes(digest.digest(), "little")


def _fingerprint(foreign: Foreign, eos: int, tokenizer: Tokenizer) -> str:
    """sha256 over the files' names, sizes and contents, and over how they are read."""
    whole = hashlib.sha256(f"foreign 1\n{foreign.format}\n{eos}\n{tokenizer.eos_id}\n".encode())
    root = foreign.path if foreign.path.is_dir() else foreign.path.parent
    for file in foreign.files:
        name = file.relative_to(root).as_posix()
        whole.update(f"{name}\0{file.stat().st_size}\0{file_sha256(file)}\n".encode())
    return whole.hexdigest()


def _write(
    folder: Path,
    spans: _Spans,
    tokenizer: Tokenizer,
    eos: int,
    source: SourceInfo,
    shard_tokens: int,
) -> Manifest:
    dtype = ids_dtype(tokenizer.vocab_size)
    writers = {s: SplitBuilder(folder, s, dtype, shard_tokens=shard_tokens) for s in SPLITS}
    token_bytes = tokenizer.token_bytes()
    try:
        for split, kept in spans.items():
            for stream, documents in kept:
                _copy(writers[split], stream, documents, (eos, tokenizer.eos_id), token_bytes)
        splits: dict[str, SplitInfo] = {s: writer.finish() for s, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    max_id = max(writer.max_id for writer in writers.values())
    requested = f"given {tokenizer.fingerprint}"
    return write_manifest(folder, tokenizer, source, splits, requested, max_id)


def _copy(
    writer: SplitBuilder,
    stream: TokenStream,
    documents: _Documents,
    eos: tuple[int, int],
    token_bytes: Int64,
) -> None:
    """Append documents to a split; the first id of `eos` becomes the second."""
    theirs, ours = eos
    last = len(documents.starts) - 1
    for i, (start, stop) in enumerate(zip(documents.starts.tolist(), documents.stops.tolist())):
        for at, piece in _pieces(stream, start, stop):
            ids = piece.astype(np.uint32)
            size = int(token_bytes[ids].sum())
            if theirs != ours:
                size -= int(token_bytes[theirs]) * int(np.count_nonzero(ids == theirs))
                ids[ids == theirs] = ours
            whole = at + len(ids) == stop
            if whole and documents.add_eos and i == last:
                ids = np.append(ids, np.uint32(ours))
            ends = np.array([len(ids)] if whole else [], np.int64)
            writer.add(ids, ends, text_bytes=size, entropy_bits=None)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name only when all went well.

    Yields:
        A new folder beside it, removed again whatever goes wrong, Ctrl-C included.

    Raises:
        PippinError: P010 where something has the name, P312 where it cannot be written.
    """
    if folder.exists():
        raise _name_taken(folder)
    remove_stale(folder.parent)
    with private_folder(folder) as partial:
        yield partial
        flush_folder(partial)
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _name_taken(folder) from error
            raise not_writable(folder, error) from error
        (folder / LOCK).unlink(missing_ok=True)
        flush_folder(folder.parent)


def _name_taken(folder: Path) -> PippinError:
    return PippinError(
        "P010",
        f"{folder} exists already",
        remedy=f"another name, or: rm -r {shlex.quote(str(folder))}",
        kept="Nothing in it was changed.",
    )
