"""Batches: windows of `core.data.sampling.windows`, in the order of `core.data.sampling.order`.

In one epoch of a text every token is a target once. What is missing in a row has weight 0, and so has
what the text's own weights leave out. Training batches are made in a thread of their own.
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
from core.data.sampling.order import permute
from core.data.sampling.parts import PlannedRows, TrainParts, count_weights, read_rows
from core.data.sampling.windows import Windows, cut
from core.data.shards.stream import TokenStream
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
        normalizer: Sum of the weights over the whole step, all micro-batches and ranks; 0 where no
            target of the step is trained on.
        tokens: Targets trained on in the whole step: how many weights are above 0.
    """

    step: int
    micro: tuple[Batch, ...]
    normalizer: float
    tokens: int


class TrainLoader:
    """The training batches of one process, step after step, without end.

    A function of (streams, windows, rows of a step, seed) and the step: a loader that starts at
    step s gives what an uninterrupted one gives from there.
    """

    def __init__(
        self,
        stream: TokenStream | TrainParts,
        windows: Windows | None = None,
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
            stream: Tokens of the training split, or several of them, already cut.
            windows: How the one stream is cut.
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
        self._parts, self._vocab_size = _as_parts(stream, windows), vocab_size
        self._micro_batch_size = micro_batch_size
        self._step_rows = micro_batch_size * grad_accum_steps
        share = grad_accum_steps // world_size
        self._my_micro = range(rank * share, (rank + 1) * share)
        self._plan = self._parts.plan(seed)
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
                planned = self._plan.rows(first_row, block * self._step_rows)
                lengths = self._parts.lengths(planned)
                if lengths is not None:
                    planned = planned.at(self._alike(planned, lengths, group))
                for i in range(block):
                    step = group * GROUP_STEPS + i + 1
                    if step >= start_step:
                        rows = slice(i * self._step_rows, (i + 1) * self._step_rows)
                        self._put(self._batches(step, planned.at(rows)))
                    if self._stop.is_set():
                        return
                group += groups
        except BaseException as error:
            # The thread is a boundary: what happened is raised again where batches are asked for.
            self._put(error)

    def _alike(
        self, planned: PlannedRows, lengths: NDArray[np.int64], group: int
    ) -> NDArray[np.int64]:
        """The order in which each group's rows are sorted by length, and its steps mixed again.

        A group in which the epoch of a text read alone ends stays as it is, so that no row of it
        comes before the epoch's first. In a mixture the epochs end at any time, and may overlap
        within a group; each still has every window once.
        """
        size = GROUP_STEPS * self._step_rows
        alone = len(self._parts.streams) == 1
        index = np.arange(len(planned), dtype=np.int64).reshape(-1, size)
        for i, row in enumerate(index):
            if alone and planned.epochs[row[0]] != planned.epochs[row[-1]]:
                continue
            key = np.full(GROUP_STEPS, group + i, dtype=np.uint64)
            steps = np.arange(GROUP_STEPS, dtype=np.uint64)
            mixed = permute(steps, GROUP_STEPS, self._plan.seed, key).astype(np.int64)
            by_length = row[np.argsort(lengths[row], kind="stable")]
            row[:] = by_length.reshape(GROUP_STEPS, -1)[mixed].reshape(-1)
        flat: NDArray[np.int64] = index.reshape(-1)
        return flat

    def _batches(self, step: int, planned: PlannedRows) -> StepBatches:
        size = self._micro_batch_size
        micro = tuple(
            read_rows(
                self._parts,
                planned.at(slice(m * size, (m + 1) * size)),
                row0=m * size,
                vocab_size=self._vocab_size,
                trim=True,
            )
            for m in self._my_micro
        )
        if len(self._my_micro) * size == len(planned):  # all of it was read here
            total = sum(float(batch.weights.sum(dtype=np.float64)) for batch in micro)
            tokens = sum(int(np.count_nonzero(batch.weights)) for batch in micro)
        else:
            total, tokens = count_weights(self._parts, planned)
        return StepBatches(step, micro, total, tokens)

    def _put(self, item: StepBatches | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return


def open_train_loader(
    stream: TokenStream | TrainParts, config: RunConfig, *, start_step: int = 1
) -> TrainLoader:
    """The training batches of a configuration, from a step on."""
    return TrainLoader(
        stream,
        cut(stream, config) if isinstance(stream, TokenStream) else None,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=config.train.grad_accum_steps,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        start_step=start_step,
        prefetch=config.data.prefetch,
    )


class EvalBatches:
    """Fixed windows for validation, spread evenly over a split: the same ones each time.

    Of several splits each is scored by its weight, one after the other.
    """

    def __init__(
        self,
        stream: TokenStream | TrainParts,
        windows: Windows | None = None,
        *,
        batch_size: int,
        max_tokens: int,
        vocab_size: int,
    ) -> None:
        """Choose the windows.

        Args:
            stream: Tokens of the split, or several of them, already cut.
            windows: How the one split is cut.
            batch_size: Rows of every batch; the last of a split is filled up with rows of weight 0.
            max_tokens: Targets of weight above 0 to score, about, at least one window of each split.
            vocab_size: The model's; every id must be below it.
        """
        self._parts, self._vocab_size = _as_parts(stream, windows), vocab_size
        self._batch_size = batch_size
        weights = self._parts.weights
        chosen = [
            _spread(self._parts, k, max(1, int(max_tokens * (weight / sum(weights)))))
            for k, weight in enumerate(weights)
        ]
        self.numbers: NDArray[np.int64] = np.concatenate(chosen)
        self._part: NDArray[np.int64] = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._starts())

    def __iter__(self) -> Iterator[Batch]:
        """Batches `[batch_size, T]`, T as long as the longest row needs.

        Raises:
            PippinError: P204 for an id out of range.
        """
        for start, stop in self._starts():
            # The last row again and again where the batch is not full.
            rows = np.minimum(np.arange(start, start + self._batch_size), stop - 1)
            numbers = self.numbers[rows]
            batch = read_rows(
                self._parts,
                PlannedRows(self._part[rows], numbers, np.zeros_like(numbers)),
                row0=0,
                vocab_size=self._vocab_size,
                trim=True,
            )
            batch.weights[stop - start :] = 0.0
            yield batch

    def _starts(self) -> list[tuple[int, int]]:
        """First row and last row + 1 of each batch; no batch joins two splits."""
        ends = np.cumsum(np.bincount(self._part)).tolist()
        firsts = [0, *ends[:-1]]
        size = self._batch_size
        return [(i, min(i + size, b)) for a, b in zip(firsts, ends) for i in range(a, b, size)]


def _spread(parts: TrainParts, part: int, max_tokens: int) -> NDArray[np.int64]:
    """Windows evenly spread over a part, that hold about `max_tokens` targets of weight above 0."""
    stream, windows = parts.streams[part], parts.windows[part]
    total = windows.num_windows
    targets = windows.targets_per_epoch * stream.trained_tokens // max(1, stream.num_tokens)
    count = min(total, max(1, max_tokens * total // max(1, targets)))
    # The middles of `count` equal parts.
    numbers = (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)
    if windows.lengths is not None:  # rows of a batch alike, so that little is padding
        numbers = numbers[np.argsort(windows.lengths[numbers], kind="stable")]
    return numbers


def _as_parts(stream: TokenStream | TrainParts, windows: Windows | None) -> TrainParts:
    if isinstance(stream, TrainParts):
        return stream
    if windows is None:
        raise ValueError("a stream needs its windows")
    return TrainParts((stream,), (windows,), (1.0,))
