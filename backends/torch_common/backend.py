"""`TorchBackend`: core's Backend on any device that a policy describes.

Whatever varies from step to step enters as a tensor; whether a step counts is decided on the device;
nothing in a step waits for it. World size is 1.

Legend: B rows, T tokens of a row, V vocab_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends import checkpoint_format
from backends.torch_common.cache import KVCache
from backends.torch_common.device import DevicePolicy, Loss
from backends.torch_common.failures import Shape, explain, explained, shapes_of
from backends.torch_common.losses import pretrain_loss, token_nll
from backends.torch_common.model import Transformer
from backends.torch_common.optim import LossScaler, Optimizer, clip_scale, global_norm
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
from core.config.schema import RunConfig
from core.dropout import dropout_row_keys
from core.errors import EXIT_FAULT, PippinError
from core.machine.speed import PhaseClock
from core.numerics import SCALER_FIELDS
from core.params import ParamSpec, slot_specs

# A batch on the device: tokens, targets, weights, segments, row keys.
Placed = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class TorchBackend:
    """A model on one device, with an optimizer in mode "train"."""

    @explained
    def __init__(
        self, config: RunConfig, specs: Sequence[ParamSpec], policy: DevicePolicy, *, mode: Mode
    ) -> None:
        self.name, self.suffix = policy.name, ".pt"
        self.rank, self.world_size = 0, 1
        self.config, self.policy, self.mode = config, policy, mode
        self.specs = tuple(specs)
        with policy.device:
            self.model = Transformer(
                config.model, policy, gradient_checkpointing=config.train.gradient_checkpointing
            )
        self.model.reserve(config.data.seq_len)
        self.model.requires_grad_(mode == "train")
        self._params = dict(self.model.named_parameters())
        check_table({n: tuple(p.shape) for n, p in self._params.items()}, self.specs, "torch")
        self._optimizer: Optimizer | None = None
        if mode == "train":
            self._optimizer = Optimizer(config.train, self._params, self.specs)
        else:
            self._to_compute_dtype()
        self._scaler = LossScaler(config.train.precision, policy.device)
        self._loss: Loss = pretrain_loss
        if config.train.compile and mode == "train":
            self._loss = policy.compile(pretrain_loss)
        self._compiled: set[Shape] = set()
        self._other_shapes = False
        self._updating = False
        self._clock: PhaseClock | None = None

    def _to_compute_dtype(self) -> None:
        for spec in self.specs:
            if spec.group not in ("vector", "router"):
                param = self._params[spec.name]
                param.data = param.data.to(self.policy.compute_dtype)

    def device_info(self) -> DeviceInfo:
        return self.policy.info()

    @explained
    @torch.no_grad()
    def load(self, ckpt: Checkpoint, *, optimizer: bool = True) -> None:
        """Copy a checkpoint in, tensor by tensor, after its names and shapes were checked.

        Raises:
            PippinError: P302 to P304 if it does not fit this model and optimizer.
        """
        wanted = optimizer and self._optimizer is not None
        slots = slot_specs(self.config.train.optimizer, self.specs) if wanted else None
        check_checkpoint(ckpt, self.specs, slots)
        for name, param in self._params.items():
            param.copy_(self._read(ckpt, name))
        if self._optimizer is None or not wanted:
            return
        held = set(ckpt.names)
        for key, value in self._optimizer.state():
            if key in held:
                value.copy_(self._read(ckpt, key))
            else:
                value.zero_()
        self._scaler.load(ckpt.meta.backend_state)

    def _read(self, ckpt: Checkpoint, name: str) -> Tensor:
        array = ckpt.read(name)
        if array.dtype == np.uint16:
            wide = array.astype(np.uint32) << np.uint32(16)
            array = wide.view(np.float32)
        return self.policy.place(np.ascontiguousarray(array, np.float32))

    def save(self, path: Path, meta: Meta, *, optimizer: bool = True) -> Pending:
        """Write a checkpoint in the format of the path's suffix.

        Raises:
            PippinError: P307 if it cannot be written.
        """
        tensors = dict(self._state(optimizer=optimizer))
        info = self.device_info()
        framework, _, version = info.framework.partition(" ")
        filled = replace(
            meta,
            dtypes=dict.fromkeys(tensors, "float32"),
            backend={"name": self.name, "framework": framework, "version": version},
            backend_state=self.backend_state(),
        )
        done = checkpoint_format(path.suffix).write(path, filled, self.tensors(optimizer=optimizer))
        self.policy.release()
        return Saved(done)

    def _state(self, *, optimizer: bool) -> Iterator[tuple[str, Tensor]]:
        yield from self._params.items()
        if optimizer and self._optimizer is not None:
            yield from self._optimizer.state()

    def tensors(self, *, optimizer: bool = True) -> Iterator[tuple[str, NDArray[Any]]]:
        """Canonical names and float32 arrays, one at a time; not to be kept past the next step."""
        for name, value in self._state(optimizer=optimizer):
            yield name, value.detach().float().cpu().numpy()

    def backend_state(self) -> dict[str, float]:
        return self._scaler.values()

    def train_step(self, micro: Sequence[Batch], hyper: StepHyper) -> Mapping[str, Lazy]:
        """One optimizer step over all micro-batches.

        Raises:
            PippinError: P204 for a token id out of range, P101 out of memory, P502 if compiling fails.
        """
        if self._optimizer is None:
            raise PippinError(
                "P001", "train_step on a backend made to infer.", exit_code=EXIT_FAULT
            )
        for batch in micro:
            check_tokens(self.config.model.vocab_size, batch.tokens, batch.targets)
        if self._other_shapes:
            self.policy.release()
            self._other_shapes = False
        shapes = shapes_of(micro)
        try:
            metrics = self._train_step(self._optimizer, micro, hyper)
        except Exception as error:
            for param in self._params.values():
                param.grad = None
            compiling = self.config.train.compile and not shapes <= self._compiled
            intact, self._updating = not self._updating, False
            raise explain(error, backend=self.name, compiling=compiling, intact=intact) from error
        self._compiled |= shapes
        return metrics

    def profile_step(self, micro: Sequence[Batch], hyper: StepHyper) -> Mapping[str, float]:
        """A step as `train_step` takes it, in timed parts; seconds by part.

        What gradient checkpointing computes again is in "backward".
        """
        clock = self._clock = PhaseClock(self.synchronize)
        try:
            self.train_step(micro, hyper)
        finally:
            self._clock = None
        return clock.seconds

    def _mark(self, phase: str) -> None:
        if self._clock is not None:
            self._clock.mark(phase)

    def _train_step(
        self, optimizer: Optimizer, micro: Sequence[Batch], hyper: StepHyper
    ) -> dict[str, Lazy]:
        numbers = self.policy.place(optimizer.numbers(hyper))
        normalizer, limit = numbers[0, :2].unbind(0)
        scale = self._scaler.state.loss_scale
        objective = uneven = torch.zeros_like(scale)
        coefficient = torch.where(normalizer > 0, scale / normalizer, objective)
        for batch in micro:
            tokens, targets, weights, segments, keys = self._place(batch, step=hyper.step)
            self._mark("transfer")
            part, balance = self._loss(
                self.model, tokens, targets, weights, coefficient, segments, keys
            )
            self._mark("forward")
            objective = objective + part.detach()
            if balance is not None:
                part = part + self.config.train.router_aux_loss_coef * balance
                uneven = uneven + balance.detach()
            part.backward()
            self._mark("backward")
        loss = objective / scale
        grads = optimizer.gather(self._take_grads())
        norm = global_norm(grads) / scale
        # What follows changes stack after stack in place: cut short, it is no step at all.
        self._updating = True
        ok = self._scaler.update(loss, norm, normalizer)
        factor = clip_scale(norm, limit) / scale
        optimizer.step(grads, numbers, ok, factor)
        self._updating = False
        self._mark("optimizer")
        state = self._scaler.state
        shown = SCALER_FIELDS if self._scaler.enabled else ("skipped_total", "skipped_in_a_row")
        counters = {k: getattr(state, k) for k in shown if k != "good_steps"}
        experts = {"aux_loss": uneven / scale} if self.config.model.n_experts else {}
        return {"loss": loss, "grad_norm": norm, **experts, **counters}

    def _take_grads(self) -> dict[str, Tensor]:
        grads = {}
        for name, param in self._params.items():
            grads[name] = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad = None
        return grads

    def _place(self, batch: Batch, *, step: int) -> Placed:
        place, seed = self.policy.place, self.config.train.seed
        segments, keys = None, None
        if batch.segments is not None:
            segments = place(batch.segments.astype(np.int64))
        if step > 0 and self.config.model.dropout > 0:
            rows = dropout_row_keys(seed, step, batch.row0, batch.tokens.shape[0])
            keys = place(rows.view(np.int32))
        tokens, targets = batch.tokens.astype(np.int64), batch.targets.astype(np.int64)
        weights = np.asarray(batch.weights, np.float32)
        return place(tokens), place(targets), place(weights), segments, keys

    @explained
    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Loss of every target and whether it is the most likely token; no dropout, no effect.

        Raises:
            PippinError: P204 for a token id out of range.
        """
        check_tokens(self.config.model.vocab_size, batch.tokens, batch.targets)
        self._other_shapes = True
        self.model.reserve(batch.tokens.shape[1])
        tokens, targets, _, segments, _ = self._place(batch, step=0)
        hidden = self.model.hidden(tokens, segments).flatten(0, 1)  # [B*T, D]
        size = max(1, self.policy.loss_chunk_elements // self.config.model.vocab_size)
        nll, hit = [], []
        for x, target in zip(hidden.split(size), targets.flatten().split(size)):
            logits = self.model.logits(x)
            nll.append(token_nll(logits, target))
            hit.append(logits.argmax(-1) == target)
        shape = batch.tokens.shape
        return Scores(
            nll=torch.cat(nll).view(shape).cpu().numpy(),
            hit=torch.cat(hit).view(shape).cpu().numpy(),
        )

    @explained
    @torch.no_grad()
    def logits(self, tokens: Int32, segments: Int32 | None = None) -> Float32:
        """Logits float32 `[B, T, V]` of small inputs.

        Raises:
            PippinError: P204 for a token id out of range.
        """
        check_tokens(self.config.model.vocab_size, tokens)
        self._other_shapes = True
        self.model.reserve(tokens.shape[1])
        place = self.policy.place
        parts = None if segments is None else place(segments.astype(np.int64))
        hidden = self.model.hidden(place(tokens.astype(np.int64)), parts)
        logits: Float32 = self.model.logits(hidden).cpu().numpy()
        return logits

    def start(self, batch_size: int, max_len: int) -> Cache:
        """An empty cache for `batch_size` rows of at most `max_len` tokens."""
        self.model.reserve(max_len)
        return KVCache(self.config.model, batch_size, max_len, self.policy)

    @explained
    @torch.no_grad()
    def decode(self, tokens: Int32, lengths: Int32, cache: Cache) -> Float32:
        """Append right-padded tokens to each row and return the logits at its last one.

        Raises:
            PippinError: P204 for a token id out of range, P601 if the cache is full.
        """
        if not isinstance(cache, KVCache):
            raise PippinError("P601", "the cache is not one that this backend started.")
        check_tokens(self.config.model.vocab_size, tokens)
        self._other_shapes = True
        place = self.policy.place
        placed = place(tokens.astype(np.int64))
        hidden = self.model.hidden(placed, cache=cache, lengths=lengths)  # [B, T, D]
        if tokens.shape[1] > 1:
            last = place(np.asarray(lengths, np.int64) - 1)[:, None, None]
            hidden = hidden.gather(1, last.expand(-1, 1, hidden.shape[2]))  # [B, 1, D]
        logits: Float32 = self.model.logits(hidden[:, 0]).cpu().numpy()
        return logits

    def memory(self, *, reset_peak: bool = False) -> MemoryStats:
        return self.policy.memory(reset_peak=reset_peak)

    def sum_across(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values

    def synchronize(self) -> None:
        self.policy.synchronize()

    def close(self) -> None:
        self.policy.release()
