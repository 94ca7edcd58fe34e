"""The layers of docs/numerics.md sections 1, 2 and 6.

Parameters are float32 masters, cast to the compute dtype where they are used. Nothing but parameters
is stored in a module as an array. Nothing draws a random number.

Legend: B rows, T tokens, S keys, D d_model, H query heads, K key/value heads, Dh head_dim, F d_ff.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn

from backends.mlx.cache import KVCache, Mask
from core.chunks import FSUM_BLOCK
from core.config.schema import ModelConfig
from core.dropout import dropout_threshold


def fsum(x: mx.array, *, batch_dims: int = 0) -> mx.array:
    """Sum in float32 by blocks of at most 4,096 (section 1), over all but the leading dims."""
    x = x.astype(mx.float32).reshape(*x.shape[:batch_dims], -1)
    while x.shape[-1] > FSUM_BLOCK:
        pad = -x.shape[-1] % FSUM_BLOCK
        x = mx.pad(x, [(0, 0)] * batch_dims + [(0, pad)]) if pad else x
        x = x.reshape(*x.shape[:-1], -1, FSUM_BLOCK).sum(axis=-1)
    return x.sum(axis=-1)


class RMSNorm(nn.Module):
    """`w * (x * rsqrt(mean(x^2) + eps))` in float32 over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        # Explicit casts: the fused kernel computes in the dtype that it is given.
        y = mx.fast.rms_norm(x.astype(mx.float32), self.weight, self.eps)
        return y.astype(x.dtype)


class Linear(nn.Module):
    """`x @ W.T` in the dtype of x, W cast from its master; no bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = mx.zeros((out_features, in_features))

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T


class Embedding(nn.Module):
    """Rows of the master, `[V, D]`, cast to the compute dtype."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = mx.zeros((vocab_size, d_model))

    def __call__(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        rows: Any = _lookup(self.weight, tokens)
        return rows.astype(dtype)


@mx.custom_function
def _lookup(weight: mx.array, tokens: mx.array) -> mx.array:
    return weight[tokens]


@_lookup.vjp
def _lookup_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
    weight, tokens = primals
    return scatter_rows(tokens, cotangent, weight.shape[0]), mx.zeros_like(tokens)


def scatter_rows(tokens: mx.array, grads: mx.array, num_rows: int) -> mx.array:
    """Sum of the gradients of each id, `[V, D]`, in an order that never varies.

    The built-in gradient of a lookup adds with atomics on a GPU, in another order each time, so that a
    resumed run would not equal an uninterrupted one. Here rows are sorted by id and summed within
    runs of equal ids by doubling steps; integers alone are counted with atomics.

    Args:
        tokens: int32 `[B, T]`.
        grads: Gradients of the looked-up rows, `[B, T, D]`.
        num_rows: V.
    """
    ids = tokens.reshape(-1)  # [B * T]
    order = mx.argsort(ids)
    ids = ids[order]
    sums = grads.reshape(ids.size, -1)[order]  # [B * T, D]
    step = 1
    while step < ids.size:
        same = (ids[step:] == ids[:-step])[:, None]
        added = sums[step:] + mx.where(same, sums[:-step], 0)
        sums = mx.concatenate([sums[:step], added])
        step *= 2
    counts = mx.zeros((num_rows,), mx.int32).at[ids].add(mx.array(1, mx.int32))
    last = mx.maximum(mx.cumsum(counts) - 1, 0)  # where the run of each id ends
    return mx.where((counts > 0)[:, None], sums[last], 0)


def apply_rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the halves of `[B, heads, T, Dh]` by angles that broadcast to `[B, 1, T, Dh/2]`."""
    x1, x2 = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def _shift(x: mx.array, n: int) -> mx.array:
    return x >> mx.array(n, mx.uint32)


def _mix32(x: mx.array) -> mx.array:
    """`core.dropout.mix32` in wrapping uint32."""
    x = (x ^ _shift(x, 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ _shift(x, 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ _shift(x, 16)


def dropout(x: mx.array, row_keys: mx.array | None, salt: int, rate: float) -> mx.array:
    """Dropout by a hash of (row, site, element), section 6.

    Args:
        x: `[B, T, D]`.
        row_keys: uint32 `[B]`; None is no dropout.
        salt: Constant of the site.
        rate: Share that is dropped.
    """
    if row_keys is None or rate == 0:
        return x
    keys = _mix32(row_keys + mx.array(salt, mx.uint32))
    index = mx.arange(x[0].size, dtype=mx.uint32)
    hashed = _mix32(index * mx.array(0x9E3779B9, mx.uint32) + keys[:, None])  # [B, T*D]
    limit = mx.array(dropout_threshold(rate), mx.uint32)
    kept = (_shift(hashed, 8) >= limit).reshape(x.shape)  # [B, T, D]
    return mx.where(kept, x * (1 / (1 - rate)), mx.array(0, x.dtype))


def attention(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """Scaled dot-product attention in the dtype of `q`, softmax in float32.

    Args:
        q: `[B, H, T, Dh]`.
        k: `[B, K, S, Dh]`, read by query head h at `h // (H / K)`.
        v: `[B, K, S, Dh]`.
        mask: bool, broadcasts to `[B, H, T, S]`, True where a key is visible; "causal"; or None:
            every key is visible.
    """
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, optional QK-norm, and RoPE."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d, dh = config.d_model, config.head_dim
        self.head_dim, self.layer, self.qk_norm = dh, layer, config.qk_norm
        self.q_proj = Linear(d, config.n_heads * dh)
        self.k_proj = Linear(d, config.n_kv_heads * dh)
        self.v_proj = Linear(d, config.n_kv_heads * dh)
        self.o_proj = Linear(config.n_heads * dh, d)
        if config.qk_norm:
            self.q_norm = RMSNorm(dh, config.norm_eps)
            self.k_norm = RMSNorm(dh, config.norm_eps)

    def __call__(
        self,
        x: mx.array,
        rope: tuple[mx.array, mx.array],
        mask: Mask,
        cache: KVCache | None = None,
    ) -> mx.array:
        """Attend from `x` `[B, T, D]`, to its own keys or to those of the cache."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).reshape(shape)  # [B, T, H, Dh]
        k = self.k_proj(x).reshape(shape)  # [B, T, K, Dh]
        v = self.v_proj(x).reshape(shape)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(0, 2, 1, 3) for y in (q, k, v))  # [B, H or K, T, Dh]
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attention(q, k, v, mask)  # [B, H, T, Dh]
        return self.o_proj(y.transpose(0, 2, 1, 3).flatten(2))  # [B, T, D]


def gate_activation(config: ModelConfig) -> Callable[[mx.array], mx.array]:
    """What the gate of an MLP goes through."""
    return _silu if config.ffn_activation == "silu" else _gelu


class MLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff)
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)
        self.act = gate_activation(config)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x * math.sqrt(0.5))) * 0.5
