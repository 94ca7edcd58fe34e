"""`--depth N`: one dial that sets width, heads, batch, learning rates and horizon together.

The rules, each by its source:

- width 64 N, heads of 64: the aspect of nanochat's `--depth`, and of seed guide 000's tiers, which are the
  depths 4, 6, 12 and 24 of this rule (256, 384, 768, 1536 wide).
- horizon: 20 tokens for each stored parameter (Hoffmann et al., 2022, arXiv:2203.15556), at most
  `MAX_EPOCHS` passes over the text.
- batch: tokens of a step grow with the horizon to the power 0.383 (Bergsma et al., 2025,
  arXiv:2505.13738), from 3,072 at 2.1M tokens, where the quick start was measured (docs/LOG.md).
- learning rates: `train.lr` grows with the root of the batch (Malladi et al., 2022, arXiv:2205.10287) and
  falls with the horizon to the power -0.32 (Bjorck et al., 2024, arXiv:2409.19913), which together
  is the horizon to the power -0.13.
- the matrices' rate falls besides with the root of the width under `muon_scale: rms`, so that the
  spectral norm of an update, 0.2 sqrt(width), stays what it was at width 128 (Yang, Simon and
  Bernstein, 2023, arXiv:2310.17813); AdamW's with the width itself (Yang et al., 2022,
  arXiv:2203.03466), as the head's does.

The anchor is measured at width 128; the exponents are taken from these papers, not measured here. At depth
12, with the batch brought into line, matrices, embedding and head have 2.2, 0.5 and 1.7 times the rates
that nanochat tuned there. What the user sets wins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.config.draft import AUTO, Draft, Source
from core.config.rates import FOLLOWERS
from core.config.schema import ModelConfig
from core.errors import PippinError

MAX_DEPTH = 128
ASPECT = HEAD = 64
TOKENS_PER_PARAMETER = 20
# The quick start, where batch and rates were measured.
ANCHOR_TOKENS, ANCHOR_BATCH, ANCHOR_WIDTH = 2_100_000, 3072, 128
BATCH_EXPONENT, HORIZON_EXPONENT = 0.383, -0.32
SHAPE = ("model.d_model", "model.n_layers", "model.n_heads")
# What belongs to the size that a file states and must follow the new one.
DERIVED_SHAPE = ("model.n_kv_heads", "model.head_dim", "model.d_ff")
LENGTH = ("train.total_steps", "train.warmup_steps")
BATCH = ("train.micro_batch_size",)


@dataclass(frozen=True)
class Dial:
    """What a depth sets.

    Attributes:
        depth: Blocks.
        notes: What the user set besides, and what of the file gives way, one line each.
    """

    depth: int
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return ASPECT * self.depth

    @property
    def flag(self) -> str:
        """How it was asked for."""
        return f"--depth {self.depth}"


def check_depth(depth: int) -> None:
    """Refuse a depth that no model has.

    Raises:
        PippinError: P012 outside 1 to `MAX_DEPTH`.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise PippinError(
            "P012",
            f"--depth is {depth}; it must be 1 to {MAX_DEPTH}.",
            found=f"depth 4 is {4 * ASPECT} wide, depth 12 {12 * ASPECT}, depth 24 {24 * ASPECT}",
            remedy="python train.py --depth 4 --dry-run",
        )


def apply_depth(draft: Draft, depth: int) -> Dial:
    """Set the shape, and give way to nothing but what the user set on the command line.

    Args:
        draft: Changed in place: the shape is set, and what a file states about sizes, rates, batch
            and length is automatic again.
        depth: Number of blocks.

    Raises:
        PippinError: P012 for a depth out of range.
    """
    check_depth(depth)
    dial = Dial(depth)
    notes = []
    wanted = {"model.d_model": dial.width, "model.n_layers": depth}
    reasons = {"model.d_model": f"{ASPECT} x depth", "model.n_layers": "the depth"}
    if not is_given(draft, "model.d_model"):
        wanted["model.n_heads"], reasons["model.n_heads"] = depth, f"heads of {HEAD}"
    for name, value in wanted.items():
        if is_given(draft, name):
            if draft.values[name] != value:
                notes.append(
                    f"{name} = {draft.values[name]} is given and stands; {dial.flag} alone would "
                    f"set {value}"
                )
            continue
        draft.set(name, value, Source("flag", dial.flag, f"{dial.flag}: {reasons[name]}"))
    given_way = [n for n in (*DERIVED_SHAPE, *FOLLOWERS, *LENGTH, *BATCH) if is_stated(draft, n)]
    for name in given_way:
        draft.set(name, AUTO, Source("default"))
    if is_stated(draft, "train.lr"):
        given_way.append("train.lr")
        draft.set("train.lr", measured_lr(), Source("default"))
    if given_way:
        notes.append(f"{dial.flag} sets these anew, whatever the file says: {', '.join(given_way)}")
    return Dial(depth, tuple(notes))


def dialled_shape(model: ModelConfig, depth: int, other: int) -> dict[str, int | bool]:
    """What another depth changes of the shape that `--depth` gave; what differs from it was given.

    Args:
        model: The architecture at `depth`.
        depth: That it was dialled with.
        other: The other depth.
    """
    changes: dict[str, int | bool] = {}
    if model.n_layers == depth:
        changes["model.n_layers"] = other
    if model.d_model != ASPECT * depth:
        return changes
    changes["model.d_model"] = ASPECT * other
    if model.d_ff == hidden_width(model.mlp_multiple, model.d_model):
        changes["model.d_ff"] = hidden_width(model.mlp_multiple, ASPECT * other)
    if model.n_heads == depth:
        changes["model.n_heads"] = other
        if model.n_kv_heads == depth:
            changes["model.n_kv_heads"] = other
    return changes


def hidden_width(multiple: float, width: int) -> int:
    """The MLP's inner width: `multiple` of the stream's, by eights."""
    return max(8 * round(multiple * width / 8), 8)


def is_given(draft: Draft, name: str) -> bool:
    """Whether the user set a key on the command line."""
    return draft.sources[name].kind == "flag" and not draft.is_auto(name)


def is_stated(draft: Draft, name: str) -> bool:
    """Whether a file or preset states a key."""
    return draft.sources[name].kind in ("file", "preset") and not draft.is_auto(name)


def horizon_tokens(num_parameters: int) -> int:
    """Tokens of a compute-optimal run."""
    return TOKENS_PER_PARAMETER * num_parameters


def batch_tokens(horizon: float) -> float:
    """Tokens of one step for a run of `horizon` tokens."""
    ratio: float = max(horizon, 1.0) / ANCHOR_TOKENS
    return float(ANCHOR_BATCH * ratio**BATCH_EXPONENT)


def rate_factor(horizon: float, batch: float) -> float:
    """`train.lr` as a multiple of the measured one."""
    ratio: float = max(horizon, 1.0) / ANCHOR_TOKENS
    return float(math.sqrt(batch / ANCHOR_BATCH) * ratio**HORIZON_EXPONENT)


def matrix_factor(values: Mapping[str, Any]) -> tuple[float, str]:
    """The matrices' rate relative to the one at `ANCHOR_WIDTH`, and how it is written."""
    width = int(values["model.d_model"])
    if width <= ANCHOR_WIDTH:
        return 1.0, ""
    if values["train.optimizer"] == "adamw":
        return ANCHOR_WIDTH / width, f" x {ANCHOR_WIDTH} / model.d_model"
    if values["train.muon_scale"] == "spectral":
        return 1.0, ""
    return math.sqrt(ANCHOR_WIDTH / width), f" x sqrt({ANCHOR_WIDTH} / model.d_model)"


def set_rate(draft: Draft, dial: Dial, horizon: float, batch: float) -> None:
    """Set `train.lr` unless the user did."""
    if is_given(draft, "train.lr"):
        return
    base = measured_lr()
    factor = rate_factor(horizon, batch)
    why = f"{dial.flag}: {base:g} x {factor:.3g} for {horizon / 1e6:,.0f} M tokens"
    draft.set("train.lr", float(f"{base * factor:.4g}"), Source("flag", dial.flag, why))


def measured_lr() -> float:
    """`train.lr` at the anchor, which is its default."""
    from core.config.schema import TrainConfig

    return float(TrainConfig.model_fields["lr"].default)
