"""The optimizer of docs/numerics.md sections 4, 5 and 7: Muon, AdamW, the clip and the loss scaler.

All of it is pure: state goes in and comes out, so that the whole step can be compiled. Numbers that
change from step to step are arrays; those of the configuration are constants.
"""

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx

from backends.mlx.layers import fsum
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
from core.params import ParamSpec, slot_specs, uses_muon

Arrays = dict[str, mx.array]


def newton_schulz(x: mx.array, steps: int, dtype: mx.Dtype) -> mx.array:
    """Towards the nearest orthogonal matrices.

    Args:
        x: float32 `[N, out, in]`; each matrix has its own normaliser.
        steps: Iterations.
        dtype: Dtype of the iterations.

    Returns:
        float32 `[N, out, in]`, singular values near 1.
    """
    norm = mx.sqrt(fsum(mx.square(x), batch_dims=1))[:, None, None]
    x = (x / (norm + NS_EPS)).astype(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(0, 2, 1)
    a, b, c = NS_COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.transpose(0, 2, 1)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    if tall:
        x = x.transpose(0, 2, 1)
    return x.astype(mx.float32)


def global_norm(grads: Mapping[str, mx.array]) -> mx.array:
    """Root of the sum of squares over all tensors, float32."""
    return mx.sqrt(fsum(mx.stack([fsum(mx.square(g)) for g in grads.values()])))


def clip_scale(norm: mx.array, max_grad_norm: mx.array) -> mx.array:
    """The factor of the clip; 1 where `max_grad_norm` is 0."""
    return mx.where(max_grad_norm > 0, mx.minimum(1.0, max_grad_norm / (norm + CLIP_EPS)), 1.0)


def adamw_update(
    w: mx.array, g: mx.array, m: mx.array, v: mx.array, *, numbers: Sequence[mx.array], eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """The parameter and both moments after one AdamW update.

    Args:
        w: Parameter, float32.
        g: Its clipped gradient.
        m: First moment.
        v: Second moment.
        numbers: decay (1 - lr weight_decay), keep1, gain1, keep2, gain2, correct2, rate: scalars; rate
            includes the first moment's bias correction.
        eps: Added to the root.
    """
    decay, keep1, gain1, keep2, gain2, correct2, rate = numbers
    m = keep1 * m + gain1 * g
    v = keep2 * v + gain2 * mx.square(g)
    return w * decay - rate * (m / (mx.sqrt(v / correct2) + eps)), m, v


def muon_update(
    ws: Sequence[mx.array],
    gs: Sequence[mx.array],
    bufs: Sequence[mx.array],
    *,
    numbers: Sequence[mx.array],
    steps: int,
    dtype: mx.Dtype,
    ns_elements: int,
) -> tuple[list[mx.array], list[mx.array]]:
    """Parameters and momentum of matrices of one shape after one Muon update.

    Args:
        ws: Parameters, float32 `[out, in]` each, or `[E, out, in]` of stacked experts, each by itself.
        gs: Their clipped gradients.
        bufs: Their momentum.
        numbers: decay (1 - lr weight_decay), keep, gain, rate: scalars; rate includes Muon's scale.
        steps: Newton-Schulz steps.
        dtype: dtype of Newton-Schulz.
        ns_elements: Elements that it works on at a time.
    """
    decay, keep, gain, rate = numbers
    bufs = [keep * buf + gain * g for buf, g in zip(bufs, gs)]
    count = max(1, ns_elements // ws[0].size)
    new = []
    for i in range(0, len(ws), count):
        part = slice(i, i + count)
        updates = [gain * g + keep * buf for g, buf in zip(gs[part], bufs[part])]
        # Iterated together: few large matmuls instead of many small ones.
        x = _orthogonal(mx.stack(updates), steps, dtype, ns_elements)
        new += [w * decay - rate * x[j] for j, w in enumerate(ws[part])]
    return new, bufs


def _orthogonal(x: mx.array, steps: int, dtype: mx.Dtype, ns_elements: int) -> mx.array:
    """`newton_schulz` of every matrix of `[..., out, in]`, so many elements at a time."""
    if x.ndim == 3:
        return newton_schulz(x, steps, dtype)
    matrices = x.flatten(0, -3)
    count = max(1, ns_elements // matrices[0].size)
    parts = range(0, matrices.shape[0], count)
    done = [newton_schulz(matrices[i : i + count], steps, dtype) for i in parts]
    return mx.concatenate(done).reshape(x.shape)


class Optimizer:
    """Which tensor is updated how; holds no array.

    Args:
        config: Section `train`.
        specs: The parameter table.
        ns_elements: Elements of matrices that Newton-Schulz works on at a time.
    """

    def __init__(
        self,
        config: TrainConfig,
        specs: Sequence[ParamSpec],
        *,
        ns_elements: int = NS_ELEMENTS["mlx_cpu"],
    ) -> None:
        self.config, self.ns_elements = config, ns_elements
        self.slots = slot_specs(config.optimizer, specs)
        self.adamw = [s for s in specs if s.trainable and not uses_muon(s, config.optimizer)]
        self.muon: dict[tuple[int, ...], list[ParamSpec]] = {}
        for spec in specs:
            if spec.trainable and uses_muon(spec, config.optimizer):
                self.muon.setdefault(spec.shape, []).append(spec)
        self.ns_dtype = {"float32": mx.float32, "bfloat16": mx.bfloat16}[config.ns_dtype]

    def initial_state(self) -> Arrays:
        """Zeros for every slot."""
        return {slot.key: mx.zeros(slot.shape) for slot in self.slots}

    def step(
        self,
        params: Mapping[str, mx.array],
        grads: Mapping[str, mx.array],
        state: Mapping[str, mx.array],
        hyper: Mapping[str, mx.array],
        ok: mx.array,
    ) -> tuple[Arrays, Arrays]:
        """One update of every tensor; where not `ok`, every value stays as it is.

        Args:
            params: Masters by name.
            grads: Gradients by name, clipped, zeros where not ok.
            state: Slots by key.
            hyper: `lr.<group>`, `decay.<group>` (which is 1 - lr weight_decay), `momentum`, `gain` (1 -
                momentum), `correct1` and `correct2` (1 - beta^t); float32 scalars.
            ok: bool scalar.

        Returns:
            New params and state.
        """
        new, slots = dict(params), dict(state)
        done: list[mx.array] = []
        for shape, specs in self.muon.items():
            keys = [f"optim/momentum/{s.name}" for s in specs]
            ws, bufs = muon_update(
                [params[s.name] for s in specs],
                [grads[s.name] for s in specs],
                [state[key] for key in keys],
                numbers=self._muon_numbers(specs[0].group, shape, hyper, ok),
                steps=self.config.ns_steps,
                dtype=self.ns_dtype,
                ns_elements=self.ns_elements,
            )
            new.update(zip((s.name for s in specs), ws))
            slots.update(zip(keys, bufs))
            done += ws
        for spec in self.adamw:
            keys = [f"optim/{slot}/{spec.name}" for slot in ("exp_avg", "exp_avg_sq")]
            given = [params[spec.name], grads[spec.name], *(state[key] for key in keys)]
            if done:
                # After Muon and one after another, or the temporaries of all are alive together.
                given = mx.depends(given, done)
            w, g, m, v = given
            done = list(
                adamw_update(
                    *(w, g, m, v),
                    numbers=self._adamw_numbers(spec.group, hyper, ok),
                    eps=self.config.adam_eps,
                )
            )
            new[spec.name], *moments = done
            slots.update(zip(keys, moments))
        return new, slots

    def _adamw_numbers(
        self, group: str, hyper: Mapping[str, mx.array], ok: mx.array
    ) -> list[mx.array]:
        b1, b2 = self.config.beta1, self.config.beta2
        return [
            mx.where(ok, hyper[f"decay.{group}"], 1.0),
            mx.where(ok, b1, 1.0),
            mx.where(ok, 1 - b1, 0.0),
            mx.where(ok, b2, 1.0),
            mx.where(ok, 1 - b2, 0.0),
            hyper["correct2"],
            mx.where(ok, hyper[f"lr.{group}"] / hyper["correct1"], 0.0),
        ]

    def _muon_numbers(
        self, group: str, shape: tuple[int, ...], hyper: Mapping[str, mx.array], ok: mx.array
    ) -> list[mx.array]:
        out, inner = shape[-2:]
        rms = 0.2 * math.sqrt(max(out, inner))
        scale = rms if self.config.muon_scale == "rms" else math.sqrt(max(1.0, out / inner))
        return [
            mx.where(ok, hyper[f"decay.{group}"], 1.0),
            mx.where(ok, hyper["momentum"], 1.0),
            mx.where(ok, hyper["gain"], 0.0),
            mx.where(ok, hyper[f"lr.{group}"] * scale, 0.0),
        ]


class LossScaler:
    """Float16's loss scale (section 5) and the counters of skipped steps (section 7).

    Pure: `update` takes the state, float32 scalars by name, and returns the next.
    """

    def __init__(self, precision: str) -> None:
        self.enabled = precision == "float16"

    def load(self, values: Mapping[str, float]) -> Arrays:
        """A state; missing numbers are those of a start."""
        start = dict.fromkeys(SCALER_FIELDS, 0.0)
        start["loss_scale"] = SCALE_START if self.enabled else 1.0
        if not self.enabled:
            values = {k: v for k, v in values.items() if k != "loss_scale"}
        return {k: mx.array(float(values.get(k, start[k])), mx.float32) for k in SCALER_FIELDS}

    def update(
        self, state: Arrays, loss: mx.array, norm: mx.array, normalizer: mx.array
    ) -> tuple[mx.array, Arrays]:
        """Judge a step: whether it counts, a bool scalar, and the next state."""
        fair = mx.isfinite(loss) & (normalizer > 0)
        ok = fair & mx.isfinite(norm)
        # Without any weight there was nothing to skip: the counters stay as they are.
        empty = normalizer == 0
        skipped = ~ok & ~empty
        new = dict(state)
        if self.enabled:
            scale = state["loss_scale"]
            overflow = fair & ~mx.isfinite(norm) & (scale > 1)
            skipped = skipped & ~overflow
            good = state["good_steps"]
            good = mx.where(ok, good + 1, mx.where(empty, good, 0.0))
            grown = good >= SCALE_GROWTH_INTERVAL
            scale = mx.where(overflow, mx.maximum(scale / 2, 1.0), scale)
            new["loss_scale"] = mx.where(grown, mx.minimum(scale * 2, SCALE_MOST), scale)
            new["good_steps"] = mx.where(grown, 0.0, good)
            new["overflows_total"] = state["overflows_total"] + overflow
        new["skipped_total"] = state["skipped_total"] + skipped
        new["skipped_in_a_row"] = mx.where(ok, 0.0, state["skipped_in_a_row"] + skipped)
        return ok, new
