"""AdamW and Muon of docs/numerics.md sections 4, 5 and 7.

Tensors of one group and shape are stacked `[N, ...]`, so that a step is a few operators on a few
stacks. Whether a step counts is decided on the device: every number of the update comes from
one of two rows, "active" or "idle", and the idle row leaves parameters and state as they are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.torch_common.layers import fsum
from core.backend import StepHyper
from core.chunks import NS_ELEMENTS
from core.config.schema import TrainConfig
from core.numerics import (
    CLIP_EPS,
    NS_COEFFICIENTS,
    NS_EPS,
    SCALE_GROWTH_INTERVAL,
    SCALE_MOST,
    SCALE_START,
    SCALER_FIELDS,
)
from core.params import ParamSpec, uses_muon


def newton_schulz(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Iterate each matrix of a stack `[N, out, in]` towards its nearest orthogonal one, in `dtype`."""
    norm = fsum(x * x, batch_dims=1).sqrt() + NS_EPS
    x = (x / norm[:, None, None]).to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2).contiguous()
    a, b, c = NS_COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    # Contiguous: strided operands have been wrong on MPS (pytorch #118115), and are slow on GPUs.
    return x.transpose(1, 2).contiguous() if tall else x


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """`sqrt(sum of fsum(g^2))` over every tensor of every stack `[N, ...]`."""
    return torch.stack([fsum(fsum(g * g, batch_dims=1)) for g in grads]).sum().sqrt()


def clip_scale(norm: Tensor, max_grad_norm: Tensor) -> Tensor:
    """The factor of the clip; 1 where `max_grad_norm` is infinite, which stands for 0."""
    return (max_grad_norm / (norm + CLIP_EPS)).clamp(max=1.0)


def adamw_update(
    grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Sequence[Tensor], *, eps: float
) -> Tensor:
    """Advance both moments in place and return what is subtracted from the decayed parameters.

    Args:
        grads: float32 `[N, ...]`.
        exp_avg: First moment, of that shape.
        exp_avg_sq: Second moment.
        numbers: keep1, gain1, keep2, gain2, correct2, rate: scalars on the device; rate includes the
            first moment's bias correction.
        eps: Added to the root.
    """
    keep1, gain1, keep2, gain2, correct2, rate = numbers
    exp_avg.mul_(keep1).addcmul_(grads, gain1)
    exp_avg_sq.mul_(keep2).addcmul_(grads, grads * gain2)
    denominator = (exp_avg_sq / correct2).sqrt_().add_(eps)
    return (exp_avg / denominator).mul_(rate)


def muon_update(
    grads: Tensor, momentum: Tensor, numbers: Sequence[Tensor], *, steps: int, dtype: torch.dtype
) -> Tensor:
    """Advance `momentum` in place and return what is subtracted from the decayed parameters.

    Args:
        grads: float32 `[N, out, in]`, or `[N, E, out, in]` of stacked experts, each by itself.
        momentum: float32, of that shape.
        numbers: keep, gain, rate: scalars on the device; rate includes Muon's scale.
        steps: Newton-Schulz steps.
        dtype: dtype of Newton-Schulz.
    """
    keep, gain, rate = numbers
    fresh = grads * gain
    momentum.mul_(keep).add_(fresh)
    update = fresh.add_(momentum * keep)
    matrices = update.reshape(-1, *update.shape[-2:])
    parts = matrices.split(max(1, NS_ELEMENTS["torch"] // matrices[0].numel()))
    done = [newton_schulz(p, steps, dtype).float() for p in parts]
    return (torch.cat(done) if len(done) > 1 else done[0]).view_as(update) * rate


@dataclass(frozen=True)
class _Stack:
    """Parameters of one group and shape, with their state `{slot: [N, ...]}`."""

    group: str
    muon: bool
    names: list[str]
    params: list[Tensor]
    state: dict[str, Tensor]


class Optimizer:
    """Muon for the matrices and AdamW for the rest, or AdamW for all."""

    def __init__(
        self, config: TrainConfig, params: Mapping[str, Tensor], specs: Sequence[ParamSpec]
    ) -> None:
        self.config = config
        self.ns_dtype = getattr(torch, config.ns_dtype)
        by_kind: dict[tuple[str, tuple[int, ...]], list[ParamSpec]] = {}
        for spec in specs:
            if spec.trainable:
                by_kind.setdefault((spec.group, spec.shape), []).append(spec)
        self._stacks = [_make_stack(kind, params, config.optimizer) for kind in by_kind.values()]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every slot by its key in a checkpoint, as a view of the state."""
        for stack in self._stacks:
            for slot, values in stack.state.items():
                for name, value in zip(stack.names, values.unbind(0)):
                    yield f"optim/{slot}/{name}", value

    def numbers(self, hyper: StepHyper) -> NDArray[np.float32]:
        """All numbers of a step, float32 `[2, n]`: where it counts, and where it does not.

        The first two columns are the normalizer and the limit of the norm, equal in both rows.
        """
        shared = [hyper.normalizer, hyper.max_grad_norm if hyper.max_grad_norm > 0 else math.inf]
        active, idle = list(shared), list(shared)
        for stack in self._stacks:
            for row, columns in zip((active, idle), self._columns(stack, hyper)):
                row.extend(columns)
        return np.array([active, idle], np.float32)

    def _columns(self, stack: _Stack, hyper: StepHyper) -> tuple[list[float], list[float]]:
        c, lr = self.config, hyper.lr[stack.group]
        decay = 1 - lr * hyper.weight_decay[stack.group]
        if stack.muon:
            out, inner = stack.params[0].shape[-2:]
            rms = 0.2 * math.sqrt(max(out, inner))
            scale = rms if c.muon_scale == "rms" else math.sqrt(max(1.0, out / inner))
            b = hyper.momentum
            return [decay, b, 1 - b, lr * scale], [1, 1, 0, 0]
        correct1, correct2 = 1 - c.beta1**hyper.step, 1 - c.beta2**hyper.step
        active = [decay, c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, correct2, lr / correct1]
        return active, [1, 1, 0, 1, 0, 1, 0]

    def gather(self, grads: dict[str, Tensor]) -> list[Tensor]:
        """Stack the gradients, emptying the dictionary: each is freed once it is copied."""
        return [
            grads.pop(s.names[0]).unsqueeze(0)
            if len(s.names) == 1
            else torch.stack([grads.pop(name) for name in s.names])
            for s in self._stacks
        ]

    @torch.no_grad()
    def step(self, grads: list[Tensor], numbers: Tensor, ok: Tensor, factor: Tensor) -> None:
        """One update in place, or none where `ok` is false.

        Args:
            grads: What `gather` returned; emptied.
            numbers: `numbers(hyper)` on the device.
            ok: bool scalar.
            factor: Clip over loss scale, float32 scalar.
        """
        chosen = list(torch.where(ok, numbers[0], numbers[1]).unbind(0))[2:]
        zero = torch.zeros_like(factor)
        for stack in self._stacks:
            # A product would keep NaN.
            grad = torch.where(ok, grads.pop(0) * factor, zero)
            count = 4 if stack.muon else 7
            (decay, *rest), chosen = chosen[:count], chosen[count:]
            if stack.muon:
                update = muon_update(
                    grad,
                    stack.state["momentum"],
                    rest,
                    steps=self.config.ns_steps,
                    dtype=self.ns_dtype,
                )
            else:
                slots = stack.state["exp_avg"], stack.state["exp_avg_sq"]
                update = adamw_update(grad, *slots, rest, eps=self.config.adam_eps)
            torch._foreach_mul_(stack.params, decay)
            torch._foreach_sub_(stack.params, list(update.unbind(0)))


def _make_stack(kind: list[ParamSpec], params: Mapping[str, Tensor], optimizer: str) -> _Stack:
    muon = uses_muon(kind[0], optimizer)
    tensors = [params[s.name].detach() for s in kind]
    shape = (len(kind), *kind[0].shape)
    slots = ("momentum",) if muon else ("exp_avg", "exp_avg_sq")
    state = {slot: torch.zeros(shape, device=tensors[0].device) for slot in slots}
    return _Stack(kind[0].group, muon, [s.name for s in kind], tensors, state)


@dataclass(frozen=True)
class ScalerState:
    """Numbers that survive a step, `SCALER_FIELDS`: float32 scalars on the device."""

    loss_scale: Tensor
    good_steps: Tensor
    overflows_total: Tensor
    skipped_total: Tensor
    skipped_in_a_row: Tensor


class LossScaler:
    """Float16's loss scale (section 5) and the counters of skipped steps (section 7).

    `state` is replaced, never changed in place, so a metric read later is still that of its step.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.enabled = precision == "float16"
        self.device = device
        self.load({})

    def load(self, values: Mapping[str, float]) -> None:
        """Set the state; missing numbers are those of a start."""
        start = dict.fromkeys(SCALER_FIELDS, 0.0)
        start["loss_scale"] = SCALE_START if self.enabled else 1.0
        if not self.enabled:
            values = {k: v for k, v in values.items() if k != "loss_scale"}
        chosen = {k: float(values.get(k, start[k])) for k in SCALER_FIELDS}
        self.state = ScalerState(
            **{
                k: torch.tensor(v, dtype=torch.float32, device=self.device)
                for k, v in chosen.items()
            }
        )

    def values(self) -> dict[str, float]:
        """The state as numbers; waits for the device."""
        return {k: float(getattr(self.state, k)) for k in SCALER_FIELDS}

    def update(self, loss: Tensor, norm: Tensor, normalizer: Tensor) -> Tensor:
        """Judge a step, advance the state, and return whether the step counts, a bool scalar."""
        s, zero = self.state, torch.zeros_like(self.state.loss_scale)
        fair = torch.isfinite(loss) & (normalizer > 0)
        ok = fair & torch.isfinite(norm)
        # Without any weight there was nothing to skip: the counters stay as they are.
        empty = normalizer == 0
        skipped = ~ok & ~empty
        scale, good, overflows = s.loss_scale, s.good_steps, s.overflows_total
        if self.enabled:
            overflow = fair & ~torch.isfinite(norm) & (scale > 1)
            skipped = skipped & ~overflow
            good = torch.where(ok, good + 1, torch.where(empty, good, zero))
            grown = good >= SCALE_GROWTH_INTERVAL
            scale = torch.where(overflow, (scale / 2).clamp(min=1), scale)
            scale = torch.where(grown, (scale * 2).clamp(max=SCALE_MOST), scale)
            good = torch.where(grown, zero, good)
            overflows = overflows + overflow.float()
        count = skipped.float()
        in_a_row = torch.where(ok, zero, s.skipped_in_a_row + count)
        self.state = ScalerState(scale, good, overflows, s.skipped_total + count, in_a_row)
        return ok
