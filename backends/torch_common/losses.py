"""The loss of docs/numerics.md section 3, over chunks of tokens.

The gradient of the head is made in the forward pass, chunk by chunk, so that logits and their gradient
never exist for all tokens at once. The scale of the objective (float16's loss scale, over the
normalizer) is applied before the gradient is rounded to the compute dtype.

Legend: N tokens of a micro-batch, B rows, T tokens of a row, D d_model, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from backends.torch_common.model import Transformer


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """`logsumexp(logits) - logits[target]` in float32: `[..., V]` and `[...]` to `[...]`."""
    logits = logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(logits, dim=-1) - chosen


class _HeadLoss(torch.autograd.Function):
    """`coefficient * sum(weight * nll)`, of hidden states and the head's matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        coefficient: Tensor,
        chunk: int,
    ) -> Tensor:
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            x, target, scale = hidden[part], targets[part, None], weights[part, None]
            logits = (x @ head.T).float()  # [chunk, V]
            top = logits.amax(-1, keepdim=True)
            logits.sub_(top)
            chosen = logits.gather(-1, target)
            sums = logits.exp_().sum(-1, keepdim=True)
            total = total + (scale * (sums.log() - chosen)).sum()
            scale = scale * coefficient
            grad = logits.mul_(scale / sums)
            grad.scatter_(-1, target, grad.gather(-1, target) - scale)
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ head
            grad_weight += (grad.T @ x).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total * coefficient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None, None, None


def pretrain_loss(
    model: Transformer,
    tokens: Tensor,
    targets: Tensor,
    weights: Tensor,
    coefficient: Tensor,
    segments: Tensor | None = None,
    row_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`coefficient * sum(weight * nll)` of one micro-batch, differentiable once.

    Args:
        model: The model.
        tokens: int64 `[B, T]`.
        targets: int64 `[B, T]`.
        weights: float32 `[B, T]`.
        coefficient: float32 scalar: loss scale over normalizer.
        segments: int64 `[B, T]` or None.
        row_keys: int32 `[B]` keys of dropout, or None.

    Returns:
        float32 scalar, and with experts `coefficient` times their `balance_sum`, another one.
    """
    states, balance = model.hidden_and_balance(tokens, segments, row_keys, weights=weights)
    hidden = states.flatten(0, 1)  # [N, D]
    targets, weights = targets.flatten(), weights.flatten()
    if model.policy.skips_padding:
        kept = weights.nonzero().squeeze(-1)
        hidden = hidden.index_select(0, kept)
        targets, weights = targets[kept], weights[kept]
    chunk = max(1, model.policy.loss_chunk_elements // model.config.vocab_size)
    loss: Tensor = _HeadLoss.apply(hidden, model.head_weight, targets, weights, coefficient, chunk)
    return loss, None if balance is None else coefficient * balance
