"""The rates of the groups follow `train.lr` where it alone is given.

A preset or a checkpoint states the rate of each group. Whoever then gives `train.lr` means all of them,
so those that are not given too are scaled by the same factor.
"""

from collections.abc import Collection

from core.config.draft import Draft, Source

FOLLOWERS = (
    "train.lr_matrix",
    "train.lr_embed",
    "train.lr_head",
    "train.lr_vector",
    "train.lr_router",
    "train.min_lr",
)


def scale_rates(draft: Draft, *, old_lr: float, given: Collection[str]) -> None:
    """Scale the stated rates by `train.lr` / `old_lr`.

    Args:
        draft: Changed in place; its values have been checked.
        old_lr: The rate that the stated ones belong to.
        given: Keys that the user gave beside `train.lr`, which stay.
    """
    lr, source = float(draft.values["train.lr"]), draft.sources["train.lr"]
    if lr == old_lr:
        return
    for name in FOLLOWERS:
        if name in given or draft.is_auto(name):
            continue
        before = float(draft.values[name])
        scaled = float(f"{before * lr / old_lr:.6g}")
        reason = f"{before:g} x {lr:g} / {old_lr:g}, with train.lr"
        draft.set(name, scaled, Source(source.kind, source.where, reason))
