"""The arithmetic of docs/numerics.md in float64 numpy: the arbiter of the self-tests.

Slow, plain, written from the formulas, and sharing no code with a backend. Gradients are compared by
central differences of `loss`, exact to about 1e-8 in float64.

Legend: B rows, T tokens, D d_model, H query heads, K key/value heads, Dh head_dim, V vocab_size.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from core.backend import Batch
from core.config.schema import ModelConfig, TrainConfig
from core.dropout import (
    SITE_ATTENTION,
    SITE_MLP,
    dropout_row_keys,
    dropout_site_salt,
    dropout_threshold,
    mix32,
)

Array = NDArray[np.float64]
Params = Mapping[str, Array]
# Keller Jordan's Muon, 2024.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def logits(
    p: Params,
    tokens: NDArray[np.int32],
    c: ModelConfig,
    *,
    segments: NDArray[np.int32] | None = None,
    row_keys: NDArray[np.uint32] | None = None,
) -> Array:
    """Logits `[B, T, V]`, under dropout where `row_keys` are given."""
    length = tokens.shape[1]
    visible = np.tril(np.ones((length, length), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    x = p["embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        name = f"layers.{i}."
        h = _rms_norm(x, p[name + "input_layernorm.weight"], c.norm_eps)
        y = _attention(p, name + "self_attn.", h, visible, c)
        x = x + _dropout(y, row_keys, dropout_site_salt(i, SITE_ATTENTION), c.dropout)
        h = _rms_norm(x, p[name + "post_attention_layernorm.weight"], c.norm_eps)
        gate = h @ p[name + "mlp.gate_proj.weight"].T
        y = gate / (1 + np.exp(-gate)) * (h @ p[name + "mlp.up_proj.weight"].T)
        y = y @ p[name + "mlp.down_proj.weight"].T
        x = x + _dropout(y, row_keys, dropout_site_salt(i, SITE_MLP), c.dropout)
    x = _rms_norm(x, p["norm.weight"], c.norm_eps)
    out: Array = x @ p["embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"].T
    return out


def token_nll(z: Array, targets: NDArray[np.int32]) -> Array:
    """Negative log-likelihood in nats, of logits `[..., V]` and targets `[...]`."""
    top = z.max(-1)
    lse = top + np.log(np.exp(z - top[..., None]).sum(-1))
    out: Array = lse - np.take_along_axis(z, targets[..., None], -1)[..., 0]
    return out


def loss(p: Params, batch: Batch, c: ModelConfig, *, seed: int = 0, step: int = 1) -> float:
    """Weighted mean of the nll, under the dropout of (seed, step)."""
    rows = batch.tokens.shape[0]
    keys = dropout_row_keys(seed, step, batch.row0, rows) if c.dropout > 0 else None
    z = logits(p, batch.tokens, c, segments=batch.segments, row_keys=keys)
    weights = batch.weights.astype(np.float64)
    return float((weights * token_nll(z, batch.targets)).sum() / weights.sum())


def newton_schulz(u: Array, steps: int) -> Array:
    """One matrix towards its nearest orthogonal one."""
    a, b, c = NS_COEFFICIENTS
    x = u / (np.sqrt((u * u).sum()) + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Array = x.T if tall else x
    return out


def muon_change(momentum: Array, grad: Array, beta: float, c: TrainConfig) -> Array:
    """What Muon subtracts per unit of learning rate, given the momentum after this step."""
    rows, columns = grad.shape
    rms = 0.2 * math.sqrt(max(rows, columns))
    scale = rms if c.muon_scale == "rms" else math.sqrt(max(1.0, rows / columns))
    return scale * newton_schulz((1 - beta) * grad + beta * momentum, c.ns_steps)


def adamw_change(exp_avg: Array, exp_avg_sq: Array, step: int, c: TrainConfig) -> Array:
    """What AdamW subtracts per unit of learning rate, given both moments after this step."""
    root = np.sqrt(exp_avg_sq / (1 - c.beta2**step))
    out: Array = exp_avg / (1 - c.beta1**step) / (root + c.adam_eps)
    return out


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    out: Array = weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return out


def _rope(x: Array, theta: float) -> Array:
    """Half-split rotary positions on `[B, heads, T, Dh]`."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[2])[:, None] * theta ** (-np.arange(half) / half)  # [T, Dh/2]
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def _attention(p: Params, name: str, x: Array, visible: NDArray[np.bool_], c: ModelConfig) -> Array:
    rows, length, _ = x.shape

    def heads(which: str, count: int) -> Array:
        y: Array = x @ p[f"{name}{which}_proj.weight"].T
        y = y.reshape(rows, length, count, c.head_dim).transpose(0, 2, 1, 3)  # [B, n, T, Dh]
        return y

    q, k, v = heads("q", c.n_heads), heads("k", c.n_kv_heads), heads("v", c.n_kv_heads)
    if c.qk_norm:
        q = _rms_norm(q, p[name + "q_norm.weight"], c.norm_eps)
        k = _rms_norm(k, p[name + "k_norm.weight"], c.norm_eps)
    q, k = _rope(q, c.rope_theta), _rope(k, c.rope_theta)
    k, v = (np.repeat(y, c.n_heads // c.n_kv_heads, axis=1) for y in (k, v))  # [B, H, T, Dh]
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(c.head_dim)  # [B, H, T, T]
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = (weights @ v).transpose(0, 2, 1, 3).reshape(rows, length, -1)
    out: Array = y @ p[name + "o_proj.weight"].T
    return out


def _dropout(x: Array, row_keys: NDArray[np.uint32] | None, salt: int, rate: float) -> Array:
    if row_keys is None or rate == 0:
        return x
    _, length, width = x.shape
    keys = mix32(row_keys + np.uint32(salt))
    index = np.arange(length * width, dtype=np.uint32) * np.uint32(0x9E3779B9)
    bits = mix32(index[None] + keys[:, None]) >> np.uint32(8)
    kept = (bits >= dropout_threshold(rate)).reshape(x.shape)
    return np.where(kept, x / (1 - rate), 0.0)
