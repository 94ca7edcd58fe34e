"""Learning rate, momentum and weight decay as pure functions of the optimizer step.

Steps count from 1. A schedule depends on `total_steps`, never on where a run stops or resumes.
"""

import math

from core.backend import StepHyper
from core.config.schema import TrainConfig


def lr_scale(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: str,
    decay_fraction: float,
    final_scale: float,
) -> float:
    """Share of the peak learning rate at a step.

    Linear warm-up to 1 at `warmup_steps`, then: `constant` stays; `linear` and `cosine` fall to
    `final_scale` at `total_steps`; `wsd` (warm-up, stable, decay) stays at 1 until the last
    `decay_fraction` of the run and falls linearly there. Past `total_steps` the last value stays.

    Args:
        step: Optimizer step, from 1.
        total_steps: Step at which the schedule ends.
        warmup_steps: Steps of warm-up, below `total_steps`.
        schedule: "cosine", "wsd", "linear" or "constant".
        decay_fraction: Share of `total_steps` in which wsd decays.
        final_scale: Value at `total_steps`, in [0, 1].
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, total_steps - round(decay_fraction * total_steps))
    span = total_steps - start
    if span <= 0:
        # The decay of wsd rounds to no step: the peak up to the last one, the last value past it.
        progress = 0.0 if step <= start else 1.0
    else:
        progress = min(max((step - start) / span, 0.0), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return final_scale + (1 - final_scale) * shape


def momentum(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """Muon's momentum: linear from `start` at step 1 to `end` at step `warmup_steps` + 1."""
    if warmup_steps <= 0:
        return end
    return start + (end - start) * min((step - 1) / warmup_steps, 1.0)


def step_hyper(step: int, train: TrainConfig, normalizer: float) -> StepHyper:
    """Everything that a step needs from the schedule.

    Weight decay is stated for `train.lr`: each group's decay is scaled by `lr / lr_group`, so that
    one step shrinks every group by the same `lr * weight_decay` whatever its own rate. The gains of
    norms (group vector) do not decay.
    """
    scale = lr_scale(
        step,
        total_steps=train.total_steps,
        warmup_steps=train.warmup_steps,
        schedule=train.schedule,
        decay_fraction=train.decay_fraction,
        final_scale=train.min_lr / train.lr,
    )
    peaks = group_rates(train)
    decay = {
        group: 0.0 if group == "vector" or peak == 0 else train.weight_decay * train.lr / peak
        for group, peak in peaks.items()
    }
    return StepHyper(
        step=step,
        lr={group: peak * scale for group, peak in peaks.items()},
        weight_decay=decay,
        momentum=momentum(
            step,
            start=train.momentum_start,
            end=train.momentum,
            warmup_steps=train.momentum_warmup_steps,
        ),
        normalizer=normalizer,
        max_grad_norm=train.max_grad_norm,
    )


def group_rates(train: TrainConfig) -> dict[str, float]:
    """Peak learning rate of every optimizer group."""
    return {
        "matrix": train.lr_matrix,
        "embed": train.lr_embed,
        "head": train.lr_head,
        "vector": train.lr_vector,
        "router": train.lr_router,
    }
