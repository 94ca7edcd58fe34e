"""Text to token ids in blocks, by several processes, with a result that does not depend on them.

A block is a few megabytes of consecutive text: whole documents, or parts of one that is larger.
Blocks are cut by the text alone and come back in order.
"""

import itertools
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.chat import TRAIN_EOS, encode_segments
from core.data.preparing.scan import Item
from core.data.reading.example import Segment
from core.data.split import SPLITS
from core.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from core.errors import EXIT_FAULT, PippinError

BLOCK_CHARS = 1 << 21
# Less text than this is encoded before the processes have started.
_SMALL_BLOCKS = 4


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one.

    Attributes:
        split: Index into `SPLITS`.
        text: Its text; empty where it has been encoded, to save memory.
        segments: Of a chat, instead of text.
        ends: Whether the document ends with it.
        text_bytes: Bytes of its text.
        entropy_bits: Of the document, with its last piece; None where not known.
    """

    split: int
    text: str
    segments: tuple[Segment, ...] | None
    ends: bool
    text_bytes: int
    entropy_bits: float | None


Block = list[Piece]


@dataclass(frozen=True)
class Encoded:
    """The tokens of a block.

    Attributes:
        ids: `[n]` of all pieces, one after the other, `</s>` after each document.
        counts: int64 `[pieces]`, tokens of each.
        weights: uint8 `[n]`, 1 where a token is a target that counts; None: everywhere.
    """

    ids: NDArray[np.unsignedinteger]
    counts: NDArray[np.int64]
    weights: NDArray[np.uint8] | None


def cut_blocks(items: Iterable[Item], tokenizer: Tokenizer) -> Iterator[Block]:
    """Cut documents into blocks of about `BLOCK_CHARS` characters."""
    block: Block = []
    chars = 0
    for piece in _pieces(items, tokenizer):
        block.append(piece)
        chars += len(piece.text) + 16
        if piece.segments is not None:
            chars += sum(len(segment.text) for segment in piece.segments)
        if chars >= BLOCK_CHARS:
            yield block
            block, chars = [], 0
    if block:
        yield block


def _pieces(items: Iterable[Item], tokenizer: Tokenizer) -> Iterator[Piece]:
    for item in items:
        split = SPLITS.index(item.split)
        if item.segments is not None:
            size = sum(len(s.text.encode()) for s in item.segments if not s.control)
            yield Piece(split, "", item.segments, True, size, None)
            continue
        parts = [item.text]
        if len(item.text) > BLOCK_CHARS:
            parts = tokenizer.cut(item.text, BLOCK_CHARS)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            entropy = item.entropy_bits if last else 0.0
            yield Piece(split, part, None, last, len(part.encode()), entropy)


def encode_block(tokenizer: Tokenizer, block: Block, dtype: str) -> Encoded:
    """Encode a block; ids come in `dtype`."""
    rows: list[NDArray[np.uint32]] = []
    weights: list[NDArray[np.uint8]] = []
    eos = np.array([tokenizer.eos_id], np.uint32)
    plain = [piece.text for piece in block if piece.segments is None]
    encoded = iter(tokenizer.encode_batch(plain))
    chats = len(plain) < len(block)
    for piece in block:
        if piece.segments is None:
            ids = next(encoded)
            row = np.concatenate([ids, eos]) if piece.ends else ids
            weight = np.ones(len(row), np.uint8)
        else:
            ids, trained = encode_segments(piece.segments, tokenizer)
            row, weight = np.concatenate([ids, eos]), np.append(trained, np.uint8(TRAIN_EOS))
        rows.append(row)
        if chats:
            weights.append(weight)
    ids = np.concatenate(rows)
    if ids.size and int(ids.max()) > np.iinfo(np.dtype(dtype)).max:
        raise PippinError("P204", f"token id {int(ids.max())} does not fit {dtype}")
    counts = np.array([len(row) for row in rows], np.int64)
    return Encoded(ids.astype(dtype), counts, np.concatenate(weights) if chats else None)


def encode_in_order(
    blocks: Iterator[Block], tokenizer: Tokenizer, file: Path, dtype: str, *, workers: int
) -> Iterator[tuple[Block, Encoded]]:
    """Encode blocks with `workers` processes; each comes back with its pieces, less their text.

    A few blocks, or one worker, are encoded in this process.

    Args:
        blocks: Blocks in order.
        tokenizer: The tokenizer.
        file: Its file, from which the processes read it.
        dtype: Of the ids.
        workers: Processes.

    Raises:
        PippinError: What a process raised, or P001 where one was killed.
    """
    first = list(itertools.islice(blocks, _SMALL_BLOCKS if workers > 1 else 0))
    if len(first) < _SMALL_BLOCKS or workers <= 1:
        for block in itertools.chain(first, blocks):
            yield _without_text(block), encode_block(tokenizer, block, dtype)
        return
    with _Pool(workers, file, dtype) as pool:
        waiting: deque[tuple[Block, Future[Encoded]]] = deque()
        for block in itertools.chain(first, blocks):
            waiting.append((_without_text(block), pool.submit(block)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def _without_text(block: Block) -> Block:
    return [replace(piece, text="", segments=None) for piece in block]


class _Pool:
    """Processes with a pipe each, and a thread each that talks to it."""

    def __init__(self, workers: int, file: Path, dtype: str) -> None:
        context = get_context("spawn")  # a fork after Metal or CUDA has started may hang
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="pippin-encode")
        self._free: SimpleQueue[Connection] = SimpleQueue()
        self._processes, self._ends = [], []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, file, dtype), daemon=True)
            process.start()
            theirs.close()  # so that the process sees the end of the pipe when this one dies
            self._processes.append(process)
            self._ends.append(ours)
            self._free.put(ours)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.terminate()
        for end in self._ends:
            end.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, block: Block) -> "Future[Encoded]":
        return self._threads.submit(self._exchange, block)

    def _exchange(self, block: Block) -> Encoded:
        end = self._free.get()
        try:
            end.send(block)
            answer: Any = end.recv()
        except (EOFError, OSError) as error:
            raise PippinError(
                "P001",
                "a process that encodes text was killed",
                remedy="--workers 1, if memory is short",
                exit_code=EXIT_FAULT,
            ) from error
        finally:
            self._free.put(end)
        if isinstance(answer, BaseException):
            raise answer
        encoded: Encoded = answer
        return encoded


def _work(end: Connection, file: Path, dtype: str) -> None:
    """Life of a process: blocks in, ids out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    tokenizer: Tokenizer | None = None
    while True:
        try:
            block = end.recv()
        except (EOFError, OSError):
            return
        try:
            tokenizer = tokenizer or load_tokenizer(file)
            end.send(encode_block(tokenizer, block, dtype))
        except (EOFError, OSError):
            return
        except Exception as error:  # raised again in the parent
            end.send(_portable(error))


def _portable(error: Exception) -> Exception:
    """An error that survives the pipe."""
    if not isinstance(error, PippinError):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error


def select(
    block: Sequence[Piece], encoded: Encoded, split: int
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.uint8] | None]:
    """Tokens of one split: ids `[n]`, where documents end int64 `[k]`, weights `[n]` or None."""
    mine = np.array([piece.split == split for piece in block])
    ends = np.array([piece.ends for piece in block])
    tokens = np.repeat(mine, encoded.counts)
    after = np.cumsum(encoded.counts[mine])
    weights = None if encoded.weights is None else encoded.weights[tokens]
    return encoded.ids[tokens], after[ends[mine]], weights
