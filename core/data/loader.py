"""Batches: windows of `core.data.windows`, in the order of `core.data.order`.

In one epoch every token is a target once. What is missing in a row has weight 0. Training batches
are made in a thread of their own.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from core.backend import Batch
from core.config.schema import RunConfig
from core.data.order import WindowOrder, permute
from core.data.shards import TokenStream
from core.data.windows import Windows, cut
from core.errors import PippinError

# Rows whose windows are computed at a time: numpy's cost per call is shared by all of them.
_ORDER_ROWS = 8_192
# Steps whose rows are sorted by length together, so that little of a row is padding.
GROUP_STEPS = 8
_POLL_S = 0.1


@dataclass(frozen=True)
class StepBatches:
    """What one process reads for one optimizer step.

    Attributes:
        step: Optimizer step, from 1.
        micro: Micro-batches of this rank; `tokens` and `targets` int32 `[B, T]`.
        normalizer: Sum of the weights over the whole step, all micro-batches and ranks.
        tokens: Targets trained on in the whole step: the normalizer as a count.
    """

    step: int
    micro: tuple[Batch, ...]
    normalizer: float
    tokens: int


def read_windows(
    stream: TokenStream,
    windows: Windows,
    numbers: NDArray[np.int64],
    epochs: NDArray[np.int64],
    *,
    row0: int,
    vocab_size: int,
    trim: bool = False,
) -> Batch:
    """Read windows as one batch.

    Args:
        stream: Tokens.
        windows: How the stream is cut.
        numbers: int64 `[B]`, which windows.
        epochs: int64 `[B]`, the epoch of each.
        row0: Row of the step that the first window is.
        vocab_size: Every id must be below it.
        trim: Leave out columns that are padding in every row, as far as `Windows.width` does.

    Raises:
        PippinError: P204 for an id that is not.
    """
    rows = windows.rows(numbers, epochs)
    if trim and (width := windows.width(numbers)) < windows.seq_len:
        rows = rows.cut(width)
    targets = stream.gather(rows.targets)  # [B, T]
    # The stream is a ring: the first token follows the last.
    tokens = stream.gather((rows.targets - 1) % stream.num_tokens)
    for ids in (tokens, targets):
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
            raise PippinError(
                "P204",
                f"the data holds token id {bad}",
                found=f"model.vocab_size={vocab_size:,}; "
                f"the tokenizer has {stream.vocab_size:,} ids",
                remedy=f"model.vocab_size={stream.vocab_size}",
            )
    return Batch(tokens, targets, rows.weights, segments=rows.segments, row0=row0)


class TrainLoader:
    """The training batches of one process, step after step, without end.

    A function of (stream, windows, rows of a step, seed) and the step: a loader that starts at
    step s gives what an uninterrupted one gives from there.
    """

    def __init__(
        self,
        stream: TokenStream,
        windows: Windows,
        *,
        micro_batch_size: int,
        grad_accum_steps: int,
        seed: int,
        vocab_size: int,
        start_step: int = 1,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 4,
    ) -> None:
        """Start reading.

        Args:
            stream: Tokens of the training split.
            windows: How the stream is cut.
            micro_batch_size: Rows of a micro-batch.
            grad_accum_steps: Micro-batches of a step, over all ranks.
            seed: Of the order.
            vocab_size: The model's; every id must be below it.
            start_step: The first step to give, from 1.
            rank: This process, 0 to world_size - 1.
            world_size: Processes.
            prefetch: Steps that the thread may be ahead, at least 1.

        Raises:
            PippinError: P010 where the micro-batches cannot be shared evenly.
        """
        if grad_accum_steps % world_size != 0:
            raise PippinError(
                "P010",
                f"train.grad_accum_steps={grad_accum_steps} cannot be shared evenly",
                found=f"needed: a multiple of the {world_size} processes",
                remedy=f"train.grad_accum_steps={-(-grad_accum_steps // world_size) * world_size}",
            )
        self._stream, self._windows, self._vocab_size = stream, windows, vocab_size
        self._micro_batch_size = micro_batch_size
        self._step_rows = micro_batch_size * grad_accum_steps
        share = grad_accum_steps // world_size
        self._my_micro = range(rank * share, (rank + 1) * share)
        self._order = WindowOrder(windows.num_windows, seed)
        self._queue: queue.Queue[StepBatches | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._fill, args=(start_step,), name="pippin-loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatches]:
        """The loader itself."""
        return self

    def __next__(self) -> StepBatches:
        """Batches of the next step.

        Raises:
            PippinError: What went wrong in the thread, each time it is asked.
            StopIteration: After `close`.
        """
        if self._failure is not None:
            raise self._failure
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._failure = item
                raise item
            return item
        raise StopIteration

    def __enter__(self) -> "TrainLoader":
        """Nothing to do: reading has begun."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def _fill(self, start_step: int) -> None:
        try:
            groups = max(1, _ORDER_ROWS // (self._step_rows * GROUP_STEPS))
            group, block = (start_step - 1) // GROUP_STEPS, groups * GROUP_STEPS
            while not self._stop.is_set():
                first_row = group * GROUP_STEPS * self._step_rows
                numbers = self._order.windows(first_row, block * self._step_rows)
                epochs = self._order.epochs(first_row, block * self._step_rows)
                if self._windows.lengths is not None:
                    numbers = self._alike(numbers, epochs, group)
                for i in range(block):
                    step = group * GROUP_STEPS + i + 1
                    if step >= start_step:
                        rows = slice(i * self._step_rows, (i + 1) * self._step_rows)
                        self._put(self._batches(step, numbers[rows], epochs[rows]))
                    if self._stop.is_set():
                        return
                group += groups
        except BaseException as error:
            # The thread is a boundary: what happened is raised again where batches are asked for.
            self._put(error)

    def _alike(
        self, numbers: NDArray[np.int64], epochs: NDArray[np.int64], group: int
    ) -> NDArray[np.int64]:
        """Sort each group's rows by length, and mix its steps again.

        A group in which an epoch ends stays as it is: each epoch keeps its rows.
        """
        lengths = self._windows.lengths
        out = numbers.reshape(-1, GROUP_STEPS * self._step_rows).copy()
        for i, (row, epoch) in enumerate(zip(out, epochs.reshape(out.shape))):
            if lengths is None or epoch[0] != epoch[-1]:
                continue
            key = np.full(GROUP_STEPS, group + i, dtype=np.uint64)
            steps = np.arange(GROUP_STEPS, dtype=np.uint64)
            mixed = permute(steps, GROUP_STEPS, self._order.seed, key).astype(np.int64)
            by_length = row[np.argsort(lengths[row], kind="stable")]
            row[:] = by_length.reshape(GROUP_STEPS, -1)[mixed].reshape(-1)
        flat: NDArray[np.int64] = out.reshape(-1)
        return flat

    def _batches(
        self, step: int, numbers: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> StepBatches:
        size = self._micro_batch_size
        micro = tuple(
            read_windows(
                self._stream,
                self._windows,
                numbers[m * size : (m + 1) * size],
                epochs[m * size : (m + 1) * size],
                row0=m * size,
                vocab_size=self._vocab_size,
                trim=True,
            )
            for m in self._my_micro
        )
        tokens = self._windows.count(numbers)
        return StepBatches(step, micro, float(tokens), tokens)

    def _put(self, item: StepBatches | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return


def open_train_loader(
    stream: TokenStream, config: RunConfig, *, start_step: int = 1
) -> TrainLoader:
    """The training batches of a configuration, from a step on."""
    return TrainLoader(
        stream,
        cut(stream, config),
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=config.train.grad_accum_steps,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        start_step=start_step,
        prefetch=config.data.prefetch,
    )


class EvalBatches:
    """Fixed windows for validation, spread evenly over a split: the same ones each time."""

    def __init__(
        self,
        stream: TokenStream,
        windows: Windows,
        *,
        batch_size: int,
        max_tokens: int,
        vocab_size: int,
    ) -> None:
        """Choose the windows.

        Args:
            stream: Tokens of the split.
            windows: How the split is cut.
            batch_size: Rows of every batch; the last is filled up with rows of weight 0.
            max_tokens: Targets to score, about, at least one window.
            vocab_size: The model's; every id must be below it.
        """
        self._stream, self._windows, self._vocab_size = stream, windows, vocab_size
        self._batch_size = batch_size
        total = windows.num_windows
        count = min(total, max(1, max_tokens * total // windows.targets_per_epoch))
        # The middles of `count` equal parts.
        self.numbers: NDArray[np.int64] = (
            (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)
        )
        if windows.lengths is not None:  # rows of a batch alike, so that little is padding
            self.numbers = self.numbers[np.argsort(windows.lengths[self.numbers], kind="stable")]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.numbers) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches `[batch_size, T]`, T as long as the longest row needs.

        Raises:
            PippinError: P204 for an id out of range.
        """
        for start in range(0, len(self.numbers), self._batch_size):
            numbers = self.numbers[start : start + self._batch_size]
            missing = self._batch_size - len(numbers)
            padded = np.concatenate([numbers, np.repeat(numbers[-1:], missing)])
            batch = read_windows(
                self._stream,
                self._windows,
                padded,
                np.zeros_like(padded),
                row0=0,
                vocab_size=self._vocab_size,
                trim=True,
            )
            batch.weights[len(numbers) :] = 0.0
            yield batch
