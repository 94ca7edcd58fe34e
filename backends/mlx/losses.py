"""The loss of docs/numerics.md section 3, over chunks of tokens.

The gradient of the head is made in the forward pass, chunk by chunk, so that logits and their gradient
never exist for all tokens at once. The scale of the objective (float16's loss scale, over the
normalizer) is applied before the gradient is rounded to the compute dtype.

Legend: N tokens of a micro-batch, B rows, T tokens of a row, D d_model, V vocab_size.
"""

from typing import Any

import mlx.core as mx

from backends.mlx.layers import fsum
from backends.mlx.model import Transformer


def token_nll(logits: mx.array, targets: mx.array) -> mx.array:
    """`logsumexp(logits) - logits[target]` in float32: `[..., V]` and `[...]` to `[...]`."""
    logits = logits.astype(mx.float32)
    top = logits.max(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits - top, targets[..., None], axis=-1)[..., 0]
    return mx.log(fsum(mx.exp(logits - top), batch_dims=logits.ndim - 1)) - chosen


def _chunk_loss(
    x: mx.array, head: mx.array, target: mx.array, scale: mx.array, coefficient: mx.array
) -> tuple[mx.array, mx.array]:
    """`sum(scale * nll)` of some tokens, and its gradient by the logits times `coefficient`."""
    logits = (x @ head.T).astype(mx.float32)  # [chunk, V]
    logits = logits - logits.max(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, target, axis=-1)
    exps = mx.exp(logits)
    sums = fsum(exps, batch_dims=1)[:, None]
    total = fsum(scale * (mx.log(sums) - chosen))
    scale = scale * coefficient
    grad = exps * (scale / sums)
    # Not a scatter: a GPU's adds with atomics.
    hit = target == mx.arange(head.shape[0], dtype=target.dtype)
    return total, grad - mx.where(hit, scale, 0.0)


def _head_loss(
    hidden: mx.array,
    weight: mx.array,
    targets: mx.array,
    weights: mx.array,
    coefficient: mx.array,
    chunk: int,
) -> mx.array:
    """`coefficient * sum(weight * nll)`, of hidden states and the head's matrix."""

    @mx.custom_function
    def function(hidden: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        head = weight.astype(hidden.dtype)
        grad_hidden: list[mx.array] = []
        grad_weight, total = mx.zeros_like(weight), mx.array(0.0)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            x, target, scale = hidden[part], targets[part, None], weights[part, None]
            if grad_hidden:
                # One chunk after another: MLX orders what is independent as it likes, and would have
                # the logits of all chunks alive together.
                x, target, scale = mx.depends(
                    [x, target, scale], [total, grad_hidden[-1], grad_weight]
                )
            loss, grad = _chunk_loss(x, head, target, scale, coefficient)
            grad = grad.astype(hidden.dtype)
            total = total + loss
            grad_hidden.append(grad @ head)
            grad_weight = grad_weight + (grad.T @ x).astype(mx.float32)
        return total * coefficient, mx.concatenate(grad_hidden), grad_weight

    @function.vjp
    def vjp(_: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        grad, (_, grad_hidden, grad_weight) = cotangents[0], outputs
        return grad_hidden * grad.astype(grad_hidden.dtype), grad_weight * grad

    outputs: Any = function(hidden, weight)
    return outputs[0]


def pretrain_loss(
    model: Transformer,
    tokens: mx.array,
    targets: mx.array,
    weights: mx.array,
    coefficient: mx.array,
    segments: mx.array | None = None,
    row_keys: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """`coefficient * sum(weight * nll)` of one micro-batch, differentiable once.

    Args:
        model: The model.
        tokens: int32 `[B, T]`.
        targets: int32 `[B, T]`.
        weights: float32 `[B, T]`.
        coefficient: float32 scalar: loss scale over normalizer.
        segments: int32 `[B, T]` or None.
        row_keys: uint32 `[B]` keys of dropout, or None.

    Returns:
        float32 scalar, and with experts `coefficient` times their `balance_sum`, another one.
    """
    states, balance = model.hidden_and_balance(tokens, segments, row_keys, weights=weights)
    hidden, targets = states.flatten(0, 1), targets.flatten()  # [N, D], [N]
    chunk = max(1, model.loss_chunk_elements // model.config.vocab_size)
    loss = _head_loss(hidden, model.head_weight, targets, weights.flatten(), coefficient, chunk)
    return loss, None if balance is None else coefficient * balance
