"""`MlxBackend`: core's Backend on MLX's default device: Metal, or MLX's CPU and CUDA builds.

Parameters live in a flat dict by canonical name; the modules are filled from it. A step is a pure
function of arrays, compiled where `train.compile`, and whatever varies from step to step enters as an
array. It is evaluated before `train_step` returns, so no graph outlives it. Arrays are made in the
calling thread alone: MLX cannot evaluate those of another. World size is 1.

Legend: B rows, T tokens of a row, V vocab_size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from backends import checkpoint_format
from backends.mlx.cache import KVCache
from backends.mlx.failures import Shape, check_scores, explain, explained, shapes_of
from backends.mlx.losses import pretrain_loss, token_nll
from backends.mlx.model import Transformer
from backends.mlx.optim import (
    Arrays,
    LossScaler,
    Optimizer,
    clip_scale,
    global_norm,
)
from backends.mlx.runtime import (
    describe_device,
    largest_buffer,
    limit_memory,
    memory_stats,
    on_gpu,
)
from core.backend import (
    Batch,
    Cache,
    DeviceInfo,
    Float32,
    Int32,
    Lazy,
    MemoryStats,
    Mode,
    Pending,
    Saved,
    Scores,
    StepHyper,
)
from core.backend_checks import check_table, check_tokens
from core.checkpoint import Checkpoint, Meta, check_checkpoint
from core.chunks import LOSS_CHUNK_ELEMENTS, NS_ELEMENTS
from core.config.schema import RunConfig
from core.dropout import dropout_row_keys
from core.errors import EXIT_FAULT, PippinError
from core.machine.speed import PhaseClock
from core.numerics import SCALER_FIELDS
from core.params import ParamSpec

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class MlxBackend:
    """A model on MLX's default device, with an optimizer in mode "train"."""

    def __init__(self, config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> None:
        self.name, self.suffix = "mlx", ".npz"
        self.rank, self.world_size = 0, 1
        self.config, self.mode = config, mode
        self.specs = tuple(specs)
        kind = "mlx_gpu" if on_gpu(mx) else "mlx_cpu"
        self.model = Transformer(
            config.model,
            DTYPES[config.train.precision],
            gradient_checkpointing=config.train.gradient_checkpointing,
            loss_chunk_elements=LOSS_CHUNK_ELEMENTS[kind],
        )
        self.model.reserve(config.data.seq_len)
        self._params: Arrays = dict(tree_flatten(self.model.parameters()))
        check_table({n: tuple(p.shape) for n, p in self._params.items()}, self.specs, "mlx")
        self._release = limit_memory(mx, fraction=config.train.memory_fraction, mode=mode)
        self._largest_buffer = largest_buffer(mx)
        self._optimizer = Optimizer(config.train, self.specs, ns_elements=NS_ELEMENTS[kind])
        self._state = self._optimizer.initial_state() if mode == "train" else {}
        self._scaler = LossScaler(config.train.precision)
        self._scaler_state = self._scaler.load({})
        # A step has two shapes: whole, or gradients of each micro-batch and then the update.
        compiled: Callable[..., Any] = mx.compile if config.train.compile else lambda f: f
        self._whole = compiled(self._whole_step)
        self._gradients = compiled(self._micro_gradients)
        self._update = compiled(self._apply_gradients)
        self._compiled: set[Shape] = set()
        self._clock: PhaseClock | None = None

    def device_info(self) -> DeviceInfo:
        return describe_device(mx)

    @explained
    def load(self, ckpt: Checkpoint, *, optimizer: bool = True) -> None:
        """Copy a checkpoint in, tensor by tensor, after its names and shapes were checked.

        Raises:
            PippinError: P302 to P304 if it does not fit this model and optimizer.
        """
        wanted = optimizer and self.mode == "train"
        slots = self._optimizer.slots if wanted else None
        check_checkpoint(ckpt, self.specs, slots)
        for spec in self.specs:
            keep = self.mode == "train" or spec.group in ("vector", "router")
            value = self._read(ckpt, spec.name)
            self._params[spec.name] = value if keep else value.astype(self.model.dtype)
            # One by one, so that no tensor is held twice for long.
            mx.eval(self._params[spec.name])
        self._install(self._params)
        if slots is None:
            return
        held = set(ckpt.names)
        for slot in slots:
            present = slot.key in held
            self._state[slot.key] = self._read(ckpt, slot.key) if present else mx.zeros(slot.shape)
            mx.eval(self._state[slot.key])
        self._scaler_state = self._scaler.load(ckpt.meta.backend_state)

    def _read(self, ckpt: Checkpoint, name: str) -> mx.array:
        array = mx.array(ckpt.read(name))
        array = array.view(mx.bfloat16) if array.dtype == mx.uint16 else array
        return array.astype(mx.float32)

    def save(self, path: Path, meta: Meta, *, optimizer: bool = True) -> Pending:
        """Write a checkpoint in the format of the path's suffix.

        Raises:
            PippinError: P307 if it cannot be written.
        """
        framework, _, version = self.device_info().framework.partition(" ")
        filled = replace(
            meta,
            dtypes={name: "float32" for name, _ in self._tensors(optimizer=optimizer)},
            backend={"name": self.name, "framework": framework, "version": version},
            backend_state=self.backend_state(),
        )
        done = checkpoint_format(path.suffix).write(path, filled, self.tensors(optimizer=optimizer))
        return Saved(done)

    def _tensors(self, *, optimizer: bool) -> Iterator[tuple[str, mx.array]]:
        yield from ((spec.name, self._params[spec.name]) for spec in self.specs)
        if optimizer:
            yield from self._state.items()

    def tensors(self, *, optimizer: bool = True) -> Iterator[tuple[str, NDArray[Any]]]:
        """Canonical names and float32 arrays, one at a time."""
        for name, value in self._tensors(optimizer=optimizer):
            yield name, np.array(value.astype(mx.float32))

    def backend_state(self) -> dict[str, float]:
        return {name: float(self._scaler_state[name]) for name in SCALER_FIELDS}

    def train_step(self, micro: Sequence[Batch], hyper: StepHyper) -> Mapping[str, Lazy]:
        """One optimizer step over all micro-batches.

        Raises:
            PippinError: P204 for a token id out of range, P101 out of memory, P502 if compiling fails.
        """
        if self.mode != "train":
            raise PippinError(
                "P001", "train_step on a backend made to infer.", exit_code=EXIT_FAULT
            )
        for batch in micro:
            check_tokens(self.config.model.vocab_size, batch.tokens, batch.targets)
            width = self.config.model.n_heads * self.model.dtype.size
            check_scores(batch.tokens.shape, width, limit=self._largest_buffer)
            self.model.reserve(batch.tokens.shape[1])
        shapes = shapes_of(micro)
        try:
            metrics = self._train_step(micro, hyper)
        except (RuntimeError, ValueError, MemoryError) as error:
            compiling = self.config.train.compile and not shapes <= self._compiled
            raise explain(error, backend=self.name, compiling=compiling) from error
        finally:
            # Tracing leaves placeholders in the modules.
            self._install(self._params)
        self._compiled |= shapes
        return metrics

    def profile_step(self, micro: Sequence[Batch], hyper: StepHyper) -> Mapping[str, float]:
        """A step as `train_step` takes it, in timed parts; seconds by part.

        MLX computes what is asked for and keeps what is still needed: asking for the objective runs
        the forward pass alone, asking for the gradients then the backward pass alone. Parts that
        `train.compile` fuses across that line count where they are first needed.
        """
        clock = self._clock = PhaseClock(self.synchronize)
        try:
            self.train_step(micro, hyper)
        finally:
            self._clock = None
        return clock.seconds

    def _mark(self, phase: str, *values: Any) -> None:
        if self._clock is not None:
            mx.eval(*values)
            self._clock.mark(phase)

    def _train_step(self, micro: Sequence[Batch], hyper: StepHyper) -> Arrays:
        numbers = self._numbers(hyper)
        if len(micro) == 1 and self._clock is None:
            placed = self._place(micro[0], step=hyper.step)
            out = self._whole(self._params, self._state, self._scaler_state, placed, numbers)
        else:
            sums, grads = self._accumulate(micro, hyper.step, numbers)
            old = self._params, self._state, self._scaler_state
            out = self._update(*old, sums, grads, numbers)
            del grads
        # Before anything is replaced: where this fails, the last good state can still be saved.
        mx.eval(out)
        self._mark("optimizer")
        self._params, self._state, self._scaler_state, metrics = out
        return metrics

    def _accumulate(
        self, micro: Sequence[Batch], step: int, numbers: Arrays
    ) -> tuple[Arrays, Arrays]:
        """Sums over the micro-batches, each evaluated before the next one begins."""
        sums: Arrays = {}
        total: Arrays = {}
        for batch in micro:
            placed = self._place(batch, step=step)
            self._mark("transfer", placed)
            part, grads = self._gradients(self._params, self._scaler_state, placed, numbers)
            self._install(self._params)
            self._mark("forward", part)
            sums = {k: sums[k] + v for k, v in part.items()} if sums else part
            total = {k: total[k] + g for k, g in grads.items()} if total else grads
            del grads
            mx.eval(sums, total)
            self._mark("backward")
        return sums, total

    def _whole_step(
        self, params: Arrays, state: Arrays, scaler: Arrays, batch: Arrays, numbers: Arrays
    ) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        sums, grads = self._micro_gradients(params, scaler, batch, numbers)
        return self._apply_gradients(params, state, scaler, sums, grads, numbers)

    def _micro_gradients(
        self, params: Arrays, scaler: Arrays, batch: Arrays, numbers: Arrays
    ) -> tuple[Arrays, Arrays]:
        """The parts of the objective of one micro-batch, times loss scale, and its gradients."""
        normalizer = numbers["normalizer"]
        coefficient = mx.where(normalizer > 0, scaler["loss_scale"] / normalizer, 0.0)

        def objective(params: Arrays) -> tuple[mx.array, Arrays]:
            self._install(params)
            loss, balance = pretrain_loss(self.model, coefficient=coefficient, **batch)
            if balance is None:
                return loss, {"loss": loss}
            total = loss + self.config.train.router_aux_loss_coef * balance
            return total, {"loss": loss, "aux_loss": balance}

        (_, parts), grads = mx.value_and_grad(objective)(params)
        return parts, grads

    def _apply_gradients(
        self,
        params: Arrays,
        state: Arrays,
        scaler: Arrays,
        sums: Arrays,
        grads: Arrays,
        numbers: Arrays,
    ) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        """Finite check, norm, clip, decay and update: sections 4, 5 and 7."""
        scale = scaler["loss_scale"]
        shares, norm = {k: v / scale for k, v in sums.items()}, global_norm(grads) / scale
        loss = shares["loss"]
        ok, scaler = self._scaler.update(scaler, loss, norm, numbers["normalizer"])
        factor = clip_scale(norm, numbers["max_grad_norm"]) / scale
        # A product would keep NaN.
        grads = {name: mx.where(ok, g * factor, 0.0) for name, g in grads.items()}
        params, state = self._optimizer.step(params, grads, state, numbers, ok)
        shown = SCALER_FIELDS if self._scaler.enabled else ("skipped_total", "skipped_in_a_row")
        counters = {k: scaler[k] for k in shown if k != "good_steps"}
        return params, state, scaler, {**shares, "grad_norm": norm, **counters}

    def _numbers(self, hyper: StepHyper) -> Arrays:
        """All numbers of a step: a compiled function would keep those of Python for ever."""
        c = self.config.train
        numbers = {
            "momentum": hyper.momentum,
            "gain": 1 - hyper.momentum,
            "correct1": 1 - c.beta1**hyper.step,
            "correct2": 1 - c.beta2**hyper.step,
            "normalizer": hyper.normalizer,
            "max_grad_norm": hyper.max_grad_norm,
        }
        for group in sorted({spec.group for spec in self.specs}):
            lr = hyper.lr[group]
            numbers[f"lr.{group}"] = lr
            numbers[f"decay.{group}"] = 1 - lr * hyper.weight_decay[group]
        return {name: mx.array(value, mx.float32) for name, value in numbers.items()}

    def _place(self, batch: Batch, *, step: int) -> Arrays:
        """What `pretrain_loss` takes, as arrays."""
        rows = batch.tokens.shape[0]
        keys = dropout_row_keys(self.config.train.seed, step, batch.row0, rows)
        arrays = {
            "tokens": batch.tokens.astype(np.int32),
            "targets": batch.targets.astype(np.int32),
            "weights": np.asarray(batch.weights, np.float32),
            "row_keys": keys,
        }
        if batch.segments is not None:
            arrays["segments"] = batch.segments.astype(np.int32)
        return {name: mx.array(value) for name, value in arrays.items()}

    def _install(self, params: Arrays) -> None:
        self.model.update(tree_unflatten(list(params.items())))

    @explained
    def score(self, batch: Batch) -> Scores:
        """Loss of every target and whether it is the most likely token; no dropout, no effect.

        Raises:
            PippinError: P204 for a token id out of range.
        """
        check_tokens(self.config.model.vocab_size, batch.tokens, batch.targets)
        self.model.reserve(batch.tokens.shape[1])
        placed = self._place(batch, step=0)
        hidden = self.model.hidden(placed["tokens"], placed.get("segments")).flatten(0, 1)
        targets = placed["targets"].flatten()  # [B*T]
        size = max(1, self.model.loss_chunk_elements // self.config.model.vocab_size)
        nll, hit = [], []
        for start in range(0, targets.size, size):
            logits = self.model.logits(hidden[start : start + size])
            target = targets[start : start + size]
            nll.append(token_nll(logits, target))
            hit.append(mx.argmax(logits, axis=-1) == target)
            # Now, so that the logits of one chunk alone are held.
            mx.eval(nll[-1], hit[-1])
        shape = batch.tokens.shape
        return Scores(
            nll=np.array(mx.concatenate(nll)).reshape(shape),
            hit=np.array(mx.concatenate(hit)).reshape(shape),
        )

    @explained
    def logits(self, tokens: Int32, segments: Int32 | None = None) -> Float32:
        """Logits float32 `[B, T, V]` of small inputs.

        Raises:
            PippinError: P204 for a token id out of range.
        """
        check_tokens(self.config.model.vocab_size, tokens)
        self.model.reserve(tokens.shape[1])
        parts = None if segments is None else mx.array(segments.astype(np.int32))
        hidden = self.model.hidden(mx.array(tokens.astype(np.int32)), parts)
        return np.array(self.model.logits(hidden))

    def start(self, batch_size: int, max_len: int) -> Cache:
        """An empty cache for `batch_size` rows of at most `max_len` tokens."""
        self.model.reserve(max_len)
        return KVCache(self.config.model, batch_size, max_len, self.model.dtype)

    @explained
    def decode(self, tokens: Int32, lengths: Int32, cache: Cache) -> Float32:
        """Append right-padded tokens to each row and return the logits at its last one.

        Raises:
            PippinError: P204 for a token id out of range, P601 if the cache is full.
        """
        if not isinstance(cache, KVCache):
            raise PippinError("P601", "the cache is not one that this backend started.")
        check_tokens(self.config.model.vocab_size, tokens)
        placed = mx.array(tokens.astype(np.int32))
        hidden = self.model.hidden(placed, cache=cache, lengths=lengths)  # [B, T, D]
        last = mx.array(np.asarray(lengths, np.int32) - 1)
        logits = self.model.logits(hidden[mx.arange(len(lengths)), last])  # [B, V]
        mx.eval(logits, cache.keys, cache.values)
        return np.array(logits)

    def memory(self, *, reset_peak: bool = False) -> MemoryStats:
        return memory_stats(mx, reset_peak=reset_peak)

    def sum_across(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values

    def synchronize(self) -> None:
        mx.synchronize()

    def close(self) -> None:
        self._params, self._state, self._scaler_state = {}, {}, {}
        # The functions refer to this object, which would keep it until the next collection.
        del self.model, self._whole, self._gradients, self._update
        mx.clear_cache()
        self._release()
