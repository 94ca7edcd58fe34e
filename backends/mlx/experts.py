"""The mixture of experts of docs/numerics.md section 9.

Choices are sorted by expert into tiles of rows, each of one expert, so that every projection is one
gathered product. How many tiles there are depends on shapes alone: nothing waits for the device to say
how many tokens an expert has, no token is dropped, and nothing but integers is added by atomics.

Legend: B rows, T tokens, N = B T, D d_model, E experts, k top_k, A = N k choices, J tiles, P rows of a
tile, F d_ff.
"""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from backends.mlx.layers import Linear, gate_activation
from backends.mlx.runtime import on_gpu
from core.chunks import TILE_COST, num_tiles, tile_rows
from core.config.schema import ModelConfig


class Plan(NamedTuple):
    """Where each choice is computed.

    Attributes:
        slots: int32 `[N, k]`, the row of each choice, of J P rows.
        choices: int32 `[J P]`, the choice `n k + j` that a row holds; A where it holds none.
        tokens: int32 `[J P]`, the token n of that choice; the last one where there is none.
        experts: uint32 `[J]`, the expert of each tile, in rising order.
        segments: uint32 `[E, 2]`, the first row of each expert, and the one after its last.
    """

    slots: mx.array
    choices: mx.array
    tokens: mx.array
    experts: mx.array
    segments: mx.array


def largest(probs: mx.array, k: int) -> mx.array:
    """Indices int32 `[..., k]` of the k largest of `[..., E]`, descending; of equal ones the first.

    Not `argsort`, which leaves open what it does with equal ones. Indices are valid even for NaN.
    """
    left = mx.stop_gradient(probs)
    index = mx.arange(left.shape[-1])
    chosen = []
    for _ in range(k):
        top = left == left.max(axis=-1, keepdims=True)
        first = mx.where(top, index, left.shape[-1] - 1).min(axis=-1, keepdims=True)
        chosen.append(first)
        left = mx.where(index == first, -1.0, left)
    return mx.concatenate(chosen, axis=-1)


def pick(probs: mx.array, chosen: mx.array) -> mx.array:
    """`probs` `[..., E]` at `chosen` `[..., k]`, with a gradient that is no scatter."""
    is_expert = chosen[..., None] == mx.arange(probs.shape[-1])  # [..., k, E]
    return mx.where(is_expert, probs[..., None, :], 0.0).sum(axis=-1)


def make_plan(chosen: mx.array, n_experts: int, rows: int) -> Plan:
    """Give each of the choices int32 `[N, k]` a row; those of one expert are in order of tokens.

    Args:
        chosen: Experts of each token.
        n_experts: E.
        rows: P, a power of two.
    """
    flat = chosen.reshape(-1)  # [A]
    count = flat.size
    is_expert = flat[:, None] == mx.arange(n_experts)  # [A, E]
    seen = mx.cumsum(is_expert.astype(mx.int32), axis=0)  # [A, E]
    tiles = (seen[-1] + (rows - 1)) // rows  # [E]
    ends = mx.cumsum(tiles)
    starts = (ends - tiles) * rows  # [E]
    slots = mx.where(is_expert, seen - 1 + starts, 0).sum(axis=1)  # [A]
    tile = mx.arange(num_tiles(count, n_experts, rows))
    # Tiles that are left over are empty, of the last expert.
    experts = (tile[:, None] >= ends[:-1]).sum(axis=1)
    choices = mx.full((tile.size * rows,), count, mx.int32)
    choices = choices.at[slots].add(mx.arange(count) - count)
    tokens = mx.minimum(choices, count - 1) // chosen.shape[1]
    segments = mx.stack([starts, starts + seen[-1]], axis=1)
    experts, segments = experts.astype(mx.uint32), segments.astype(mx.uint32)
    slots = slots.astype(mx.int32).reshape(chosen.shape)
    return Plan(slots, choices, tokens, experts, segments)


@mx.custom_function
def _dispatch(x: mx.array, slots: mx.array, tokens: mx.array) -> mx.array:
    return x[tokens]


@_dispatch.vjp
def _dispatch_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
    _, slots, tokens = primals
    grad = cotangent[slots].astype(mx.float32).sum(axis=1)  # [N, D]
    return grad.astype(cotangent.dtype), mx.zeros_like(slots), mx.zeros_like(tokens)


def dispatch(x: mx.array, plan: Plan) -> mx.array:
    """The token `[N, D]` of every row: `[J P, D]`; rows without one have no gradient."""
    rows: Any = _dispatch(x, plan.slots, plan.tokens)
    return rows


@mx.custom_function
def _collect(rows: mx.array, slots: mx.array, choices: mx.array) -> mx.array:
    return rows[slots]


@_collect.vjp
def _collect_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
    _, slots, choices = primals
    flat = cotangent.flatten(0, 1)  # [A, D]
    empty = (choices == flat.shape[0])[:, None]
    grad = mx.where(empty, 0, flat[mx.minimum(choices, flat.shape[0] - 1)])
    return grad.astype(cotangent.dtype), mx.zeros_like(slots), mx.zeros_like(choices)


def collect(rows: mx.array, plan: Plan) -> mx.array:
    """The rows `[J P, D]` of every choice: `[N, k, D]`."""
    parts: Any = _collect(rows, plan.slots, plan.choices)
    return parts


def _product_dtype(x: mx.array) -> mx.Dtype:
    """On a CPU gathered products are float32 only (mlx 0.32.4)."""
    return x.dtype if on_gpu(mx) else mx.float32


@mx.custom_function
def _expert_linear(
    x: mx.array, weight: mx.array, experts: mx.array, segments: mx.array
) -> mx.array:
    dtype = _product_dtype(x)
    matrices = weight.astype(x.dtype).astype(dtype).swapaxes(1, 2)  # [E, in, out]
    return mx.gather_mm(x.astype(dtype), matrices, rhs_indices=experts).astype(x.dtype)


@_expert_linear.vjp
def _expert_linear_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
    x, weight, experts, segments = primals
    dtype = _product_dtype(x)
    wide, grad = x.astype(dtype), cotangent.astype(dtype)
    matrices = weight.astype(x.dtype).astype(dtype)
    grad_x = mx.gather_mm(grad, matrices, rhs_indices=experts).astype(x.dtype)
    grad_weight = mx.segmented_mm(grad.flatten(0, 1).T, wide.flatten(0, 1), segments)
    rest = mx.zeros_like(experts), mx.zeros_like(segments)
    return grad_x, grad_weight.astype(x.dtype).astype(mx.float32), *rest


class ExpertLinear(nn.Module):
    """`x @ W[e].T` for tiles of rows, each of one expert, in the dtype of x; no bias."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = mx.zeros((n_experts, out_features, in_features))

    def __call__(self, x: mx.array, plan: Plan) -> mx.array:
        """`[J, P, in]` to `[J, P, out]`."""
        y: Any = _expert_linear(x, self.weight, plan.experts, plan.segments)
        return y


class Experts(nn.Module):
    """E gated MLPs, their matrices stacked `[E, out, in]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, f = config.n_experts, config.d_model, config.d_ff
        self.gate_proj = ExpertLinear(e, d, f)
        self.up_proj = ExpertLinear(e, d, f)
        self.down_proj = ExpertLinear(e, f, d)
        self.act = gate_activation(config)

    def __call__(self, x: mx.array, plan: Plan) -> mx.array:
        """`[J, P, D]` to `[J, P, D]`, each tile by its expert."""
        hidden = self.act(self.gate_proj(x, plan)) * self.up_proj(x, plan)
        return self.down_proj(hidden, plan)


class MixtureOfExperts(nn.Module):
    """A router that sends each token to its `top_k` experts, and their weighted sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_experts, self.top_k = config.n_experts, config.top_k
        self.tile_cost = TILE_COST["mlx"]
        self.gate = Linear(config.d_model, config.n_experts)
        self.experts = Experts(config)

    def __call__(
        self, x: mx.array, weights: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """The output `[B, T, D]`, and `balance_sum` where weights `[B, T]` of the tokens are given."""
        logits = self.gate(x.astype(mx.float32))  # [B, T, E]
        probs = mx.softmax(logits, axis=-1)
        chosen = largest(probs, self.top_k)  # [B, T, k]
        shares = pick(probs, chosen)
        shares = shares / shares.sum(axis=-1, keepdims=True)
        rows = tile_rows(chosen.size, self.n_experts, self.tile_cost)
        plan = make_plan(chosen.flatten(0, 1), self.n_experts, rows)
        tiles = dispatch(x.flatten(0, 1), plan).reshape(-1, rows, x.shape[-1])  # [J, P, D]
        parts = collect(self.experts(tiles, plan).flatten(0, 1), plan)  # [N, k, D]
        y = (parts.astype(mx.float32) * shares.flatten(0, 1)[..., None]).sum(axis=1)
        balance = None if weights is None else balance_sum(probs, chosen, weights)
        return y.astype(x.dtype).reshape(x.shape), balance


def balance_sum(probs: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
    """The load-balancing loss of each row times its weight, summed; a row's is 1 where all is even.

    Of a row: `E / k sum_i f_i P_i`, with f_i the choices of expert i a token and P_i its mean probability,
    both over the row's tokens by their weights (Fedus et al., 2021, arXiv:2101.03961, eq. 4 to 6, for
    k choices as in OLMoE, arXiv:2409.02060).

    Args:
        probs: float32 `[B, T, E]`.
        chosen: int32 `[B, T, k]`.
        weights: float32 `[B, T]`.

    Returns:
        float32 scalar, differentiable by `probs`.
    """
    n_experts, k = probs.shape[-1], chosen.shape[-1]
    hits = (chosen[..., None] == mx.arange(n_experts)).sum(axis=-2).astype(mx.float32)
    weights = weights[..., None]  # [B, T, 1]
    counts, mass = (hits * weights).sum(axis=1), (probs * weights).sum(axis=1)  # [B, E]
    total = weights.sum(axis=1)  # [B, 1]
    # A row without weight has counts of 0.
    total = mx.where(total == 0, 1.0, total)
    return (counts * mass / total).sum() * (n_experts / k)
