"""The model of docs/numerics.md sections 2, 3, 6 and 9 in float64 numpy: the arbiter of both frameworks.

Slow, plain and written from the formulas, sharing no code with a backend. Gradients are checked by
directional differences of `loss`, exact to about 1e-8 in float64.

Legend: B rows, T tokens, D d_model, H query heads, K key/value heads, Dh head_dim, V vocab_size.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.backend import Batch
from core.config.schema import ModelConfig
from core.dropout import dropout_row_keys, dropout_site_salt, dropout_threshold, mix32

Array = NDArray[np.float64]
Params = Mapping[str, Array]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rope(x: Array, theta: float) -> Array:
    """Half-split rotary positions on `[B, heads, T, Dh]`, positions from 0."""
    half = x.shape[-1] // 2
    freqs = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    angles = np.arange(x.shape[2])[:, None] * freqs  # [T, Dh/2]
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def activation(name: str, x: Array) -> Array:
    if name == "silu":
        return x / (1 + np.exp(-x))
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def dropout(x: Array, row_keys: NDArray[np.uint32] | None, salt: int, rate: float) -> Array:
    if row_keys is None or rate == 0:
        return x
    b, t, d = x.shape
    keys = mix32(row_keys + np.uint32(salt))
    index = np.arange(t * d, dtype=np.uint32) * np.uint32(0x9E3779B9)
    bits = mix32(index[None] + keys[:, None]) >> np.uint32(8)
    kept = (bits >= dropout_threshold(rate)).reshape(b, t, d)
    return np.where(kept, x / (1 - rate), 0.0)


def attention(
    p: Params, prefix: str, x: Array, visible: NDArray[np.bool_], c: ModelConfig
) -> Array:
    b, t, _ = x.shape

    def heads(name: str, n: int) -> Array:
        y = x @ p[f"{prefix}{name}_proj.weight"].T
        return y.reshape(b, t, n, c.head_dim).transpose(0, 2, 1, 3)  # [B, n, T, Dh]

    q, k, v = heads("q", c.n_heads), heads("k", c.n_kv_heads), heads("v", c.n_kv_heads)
    if c.qk_norm:
        q = rms_norm(q, p[prefix + "q_norm.weight"], c.norm_eps)
        k = rms_norm(k, p[prefix + "k_norm.weight"], c.norm_eps)
    q, k = rope(q, c.rope_theta), rope(k, c.rope_theta)
    out = np.empty_like(q)
    for h in range(c.n_heads):
        g = h // (c.n_heads // c.n_kv_heads)
        scores = q[:, h] @ k[:, g].transpose(0, 2, 1) / math.sqrt(c.head_dim)  # [B, T, T]
        out[:, h] = softmax(np.where(visible, scores, -np.inf)) @ v[:, g]
    return out.transpose(0, 2, 1, 3).reshape(b, t, -1) @ p[prefix + "o_proj.weight"].T


def gated_mlp(gate: Array, up: Array, down: Array, x: Array, name: str) -> Array:
    return (activation(name, x @ gate.T) * (x @ up.T)) @ down.T


def mixture(p: Params, prefix: str, x: Array, c: ModelConfig) -> tuple[Array, Array, NDArray[Any]]:
    """Every expert on every token, weighted: the output, probabilities `[B, T, E]`, choices."""
    probs = softmax(x @ p[prefix + "gate.weight"].T)
    chosen = np.argsort(-probs, axis=-1, kind="stable")[..., : c.top_k]  # [B, T, k]
    total = np.take_along_axis(probs, chosen, -1).sum(-1)
    y = np.zeros_like(x)
    for e in range(c.n_experts):
        names = [f"{prefix}experts.{n}_proj.weight" for n in ("gate", "up", "down")]
        share = probs[..., e] / total * (chosen == e).any(-1)
        y += share[..., None] * gated_mlp(*(p[n][e] for n in names), x, c.ffn_activation)
    return y, probs, chosen


def balance_sum(probs: Array, chosen: NDArray[Any], weights: Array) -> float:
    """Section 9, by counting: the rows' load-balancing losses times their weights."""
    b, t, n_experts = probs.shape
    total = 0.0
    for row in range(b):
        weight = weights[row].sum()
        if weight == 0:
            continue
        loss = 0.0
        for e in range(n_experts):
            used = sum(weights[row, i] * list(chosen[row, i]).count(e) for i in range(t)) / weight
            mean = (weights[row] * probs[row, :, e]).sum() / weight
            loss += used * mean
        total += weight * loss * n_experts / chosen.shape[-1]
    return total


def logits(
    p: Params,
    tokens: NDArray[np.int32],
    c: ModelConfig,
    *,
    segments: NDArray[np.int32] | None = None,
    row_keys: NDArray[np.uint32] | None = None,
) -> Array:
    """Logits float64 `[B, T, V]`; with `row_keys`, under dropout."""
    return forward(p, tokens, c, segments=segments, row_keys=row_keys)[0]


def forward(
    p: Params,
    tokens: NDArray[np.int32],
    c: ModelConfig,
    *,
    segments: NDArray[np.int32] | None = None,
    row_keys: NDArray[np.uint32] | None = None,
) -> tuple[Array, list[tuple[Array, NDArray[Any]]]]:
    """Logits float64 `[B, T, V]`, and of each layer with experts probabilities and choices."""
    t = tokens.shape[1]
    routes = []
    visible = np.tril(np.ones((t, t), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    x = p["embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        layer = f"layers.{i}."
        h = rms_norm(x, p[layer + "input_layernorm.weight"], c.norm_eps)
        y = attention(p, layer + "self_attn.", h, visible, c)
        x = x + dropout(y, row_keys, dropout_site_salt(i, 0), c.dropout)
        h = rms_norm(x, p[layer + "post_attention_layernorm.weight"], c.norm_eps)
        if c.n_experts:
            y, probs, chosen = mixture(p, layer + "mlp.", h, c)
            routes.append((probs, chosen))
        else:
            names = [f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
            y = gated_mlp(*(p[n] for n in names), h, c.ffn_activation)
        x = x + dropout(y, row_keys, dropout_site_salt(i, 1), c.dropout)
    x = rms_norm(x, p["norm.weight"], c.norm_eps)
    head = "embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"
    return x @ p[head].T, routes


def token_nll(z: Array, targets: NDArray[np.int32]) -> Array:
    """Negative log-likelihood in nats `[B, T]`."""
    top = z.max(-1)
    lse = top + np.log(np.exp(z - top[..., None]).sum(-1))
    return lse - np.take_along_axis(z, targets[..., None], -1)[..., 0]


def loss(
    p: Params,
    batch: Batch,
    c: ModelConfig,
    *,
    normalizer: float,
    seed: int = 0,
    step: int = 1,
) -> float:
    """sum(weight * nll) / normalizer of one micro-batch, under the dropout of (seed, step)."""
    return losses(p, batch, c, normalizer=normalizer, seed=seed, step=step)[0]


def losses(
    p: Params,
    batch: Batch,
    c: ModelConfig,
    *,
    normalizer: float,
    seed: int = 0,
    step: int = 1,
) -> tuple[float, float]:
    """What `loss` returns, and the load-balancing loss, 0 without experts."""
    keys = dropout_row_keys(seed, step, batch.row0, batch.tokens.shape[0])
    z, routes = forward(p, batch.tokens, c, segments=batch.segments, row_keys=keys)
    nll, weights = token_nll(z, batch.targets), batch.weights.astype(np.float64)
    balances = [balance_sum(probs, chosen, weights) for probs, chosen in routes]
    aux = float(np.mean(balances)) / normalizer if balances else 0.0
    return float((weights * nll).sum() / normalizer), aux
