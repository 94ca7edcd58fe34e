"""The model of docs/numerics.md sections 2, 3 and 6 in float64 numpy: the arbiter of both frameworks.

Slow, plain and written from the formulas, sharing no code with a backend. Gradients are checked by
directional differences of `loss`, exact to about 1e-8 in float64.

Legend: B rows, T tokens, D d_model, H query heads, K key/value heads, Dh head_dim, V vocab_size.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from core.backend import Batch, dropout_row_keys, dropout_site_salt, dropout_threshold, mix32
from core.config.schema import ModelConfig

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


def logits(
    p: Params,
    tokens: NDArray[np.int32],
    c: ModelConfig,
    *,
    segments: NDArray[np.int32] | None = None,
    row_keys: NDArray[np.uint32] | None = None,
) -> Array:
    """Logits float64 `[B, T, V]`; with `row_keys`, under dropout."""
    t = tokens.shape[1]
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
        gate = activation(c.ffn_activation, h @ p[layer + "mlp.gate_proj.weight"].T)
        y = (gate * (h @ p[layer + "mlp.up_proj.weight"].T)) @ p[layer + "mlp.down_proj.weight"].T
        x = x + dropout(y, row_keys, dropout_site_salt(i, 1), c.dropout)
    x = rms_norm(x, p["norm.weight"], c.norm_eps)
    head = "embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"
    return x @ p[head].T


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
    keys = dropout_row_keys(seed, step, batch.row0, batch.tokens.shape[0])
    z = logits(p, batch.tokens, c, segments=batch.segments, row_keys=keys)
    nll = token_nll(z, batch.targets)
    return float((batch.weights.astype(np.float64) * nll).sum() / normalizer)
