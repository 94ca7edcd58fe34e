"""The mixture of experts of docs/numerics.md section 9.

Choices are sorted by expert into tiles of rows, each of one expert, so that every projection is one
batched product. How many tiles there are depends on shapes alone: nothing waits for the device to say
how many tokens an expert has, no token is dropped, and nothing is added by atomics.

Legend: B rows, T tokens, N = B T, D d_model, E experts, k top_k, A = N k choices, J tiles, P rows of a
tile, F d_ff.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backends.torch_common.device import DevicePolicy
from backends.torch_common.layers import Linear, gate_activation
from core.chunks import num_tiles, tile_rows
from core.config.schema import ModelConfig


class Plan(NamedTuple):
    """Where each choice is computed.

    Attributes:
        slots: int64 `[N, k]`, the row of each choice, of J P rows.
        choices: int64 `[J P]`, the choice `n k + j` that a row holds; A where it holds none.
        tokens: int64 `[J P]`, the token n of that choice; 0 where there is none.
        experts: int64 `[J]`, the expert of each tile, in rising order.
    """

    slots: Tensor
    choices: Tensor
    tokens: Tensor
    experts: Tensor


def expert_index(n_experts: int, device: torch.device) -> Tensor:
    """0 to E - 1, int32: reductions of int64 are not on every device."""
    return torch.arange(n_experts, dtype=torch.int32, device=device)


def largest(probs: Tensor, k: int) -> Tensor:
    """Indices int32 `[..., k]` of the k largest of `[..., E]`, descending; of equal ones the first.

    Not `topk`, which leaves open what it does with equal ones. Indices are valid even for NaN.
    """
    left = probs.detach()
    index = expert_index(left.shape[-1], left.device)
    chosen = []
    for _ in range(k):
        lower = left != left.amax(-1, keepdim=True)
        others = index.expand_as(lower).masked_fill(lower, left.shape[-1] - 1)
        first = others.amin(-1, keepdim=True)
        chosen.append(first)
        left = left.masked_fill(index == first, -1.0)
    return torch.cat(chosen, -1)


def pick(probs: Tensor, chosen: Tensor) -> Tensor:
    """`probs` `[..., E]` at `chosen` `[..., k]`, with a gradient that is no scatter."""
    others = chosen.unsqueeze(-1) != expert_index(probs.shape[-1], probs.device)  # [..., k, E]
    return probs.unsqueeze(-2).masked_fill(others, 0.0).sum(-1)


def make_plan(chosen: Tensor, n_experts: int, rows: int) -> Plan:
    """Give each of the choices int32 `[N, k]` a row; those of one expert are in order of tokens.

    Args:
        chosen: Experts of each token.
        n_experts: E.
        rows: P, a power of two.
    """
    flat = chosen.reshape(-1)  # [A]
    device, count, shift = flat.device, flat.numel(), rows.bit_length() - 1
    is_expert = flat[:, None] == expert_index(n_experts, device)  # [A, E]
    seen = is_expert.int().cumsum(0, dtype=torch.int32)  # [A, E]
    tiles = (seen[-1] + (rows - 1)) >> shift  # [E]
    ends = tiles.cumsum(0, dtype=torch.int32)
    place = seen - 1 + ((ends - tiles) << shift)  # [A, E]
    slots = place.masked_fill(~is_expert, 0).sum(1)  # [A]
    size = num_tiles(count, n_experts, rows)
    # Tiles that are left over are empty, of the last expert.
    experts = (expert_index(size, device)[:, None] >= ends[:-1]).sum(1)
    choices = torch.full((size * rows,), count, device=device)
    choices = choices.scatter(0, slots, torch.arange(count, device=device))
    token = torch.arange(chosen.shape[0], device=device)[:, None].expand(chosen.shape)
    tokens = torch.zeros(size * rows, dtype=torch.int64, device=device)
    tokens = tokens.scatter(0, slots, token.reshape(-1))
    return Plan(slots.view_as(chosen), choices, tokens, experts)


class _DispatchFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        parts = grad.index_select(0, slots.flatten()).view(*slots.shape, -1)  # [N, k, D]
        return parts.float().sum(1).to(grad.dtype), None, None


def dispatch(x: Tensor, plan: Plan) -> Tensor:
    """The token `[N, D]` of every row: `[J P, D]`; rows without one have no gradient."""
    rows: Tensor = _DispatchFunction.apply(x, plan.slots, plan.tokens)
    return rows


class _CollectFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, choices: Tensor) -> Tensor:
        ctx.save_for_backward(choices)
        return rows.index_select(0, slots.flatten()).view(*slots.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (choices,) = ctx.saved_tensors
        flat = grad.flatten(0, 1)  # [A, D]
        empty = (choices == flat.shape[0]).unsqueeze(-1)
        rows = flat.index_select(0, choices.clamp(max=flat.shape[0] - 1))
        return rows.masked_fill(empty, 0.0), None, None


def collect(rows: Tensor, plan: Plan) -> Tensor:
    """The rows `[J P, D]` of every choice: `[N, k, D]`."""
    parts: Tensor = _CollectFunction.apply(rows, plan.slots, plan.choices)
    return parts


class _ExpertLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, experts)
        tiles = weight.to(x.dtype).index_select(0, experts)  # [J, out, in]
        return torch.bmm(x, tiles.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, experts = ctx.saved_tensors
        grad_x = torch.bmm(grad, weight.to(x.dtype).index_select(0, experts))
        tiles = torch.bmm(grad.transpose(1, 2), x).float()  # [J, out, in]
        # A product, since sums by index add with atomics.
        index = expert_index(weight.shape[0], experts.device)
        is_expert = (index[:, None] == experts).float()  # [E, J]
        return grad_x, (is_expert @ tiles.flatten(1)).view_as(weight), None


class ExpertLinear(nn.Module):
    """`x @ W[e].T` for tiles of rows, each of one expert, in the dtype of x; no bias."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """`[J, P, in]` to `[J, P, out]`."""
        y: Tensor = _ExpertLinearFunction.apply(x, self.weight, experts)
        return y


class Experts(nn.Module):
    """E gated MLPs, their matrices stacked `[E, out, in]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, f = config.n_experts, config.d_model, config.d_ff
        self.gate_proj = ExpertLinear(e, d, f)
        self.up_proj = ExpertLinear(e, d, f)
        self.down_proj = ExpertLinear(e, f, d)
        self.act: Callable[[Tensor], Tensor] = gate_activation(config)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """`[J, P, D]` to `[J, P, D]`, each tile by its expert."""
        hidden = self.act(self.gate_proj(x, experts)) * self.up_proj(x, experts)
        y: Tensor = self.down_proj(hidden, experts)
        return y


class MixtureOfExperts(nn.Module):
    """A router that sends each token to its `top_k` experts, and their weighted sum."""

    def __init__(self, config: ModelConfig, policy: DevicePolicy) -> None:
        super().__init__()
        self.n_experts, self.top_k = config.n_experts, config.top_k
        self.tile_cost = policy.tile_cost
        self.gate = Linear(config.d_model, config.n_experts)
        self.experts = Experts(config)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output `[B, T, D]`, and `balance_sum` where weights `[B, T]` of the tokens are given."""
        probs = self.gate(x.float()).softmax(-1)  # [B, T, E]
        chosen = largest(probs, self.top_k)  # [B, T, k]
        shares = pick(probs, chosen)
        shares = shares / shares.sum(-1, keepdim=True)
        rows = tile_rows(chosen.numel(), self.n_experts, self.tile_cost)
        plan = make_plan(chosen.flatten(0, 1), self.n_experts, rows)
        tiles = dispatch(x.flatten(0, 1), plan).unflatten(0, (-1, rows))  # [J, P, D]
        parts = collect(self.experts(tiles, plan.experts).flatten(0, 1), plan)  # [N, k, D]
        y = (parts.float() * shares.flatten(0, 1).unsqueeze(-1)).sum(1)
        balance = None if weights is None else balance_sum(probs, chosen, weights)
        return y.to(x.dtype).view_as(x), balance


def balance_sum(probs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
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
    hits = (chosen.unsqueeze(-1) == expert_index(n_experts, probs.device)).sum(-2).float()
    weights = weights.unsqueeze(-1)  # [B, T, 1]
    counts, mass = (hits * weights).sum(1), (probs * weights).sum(1)  # [B, E]
    total = weights.sum(1)  # [B, 1]
    # A row without weight has counts of 0.
    total = torch.where(total == 0, torch.ones_like(total), total)
    return (counts * mass / total).sum() * (n_experts / k)
