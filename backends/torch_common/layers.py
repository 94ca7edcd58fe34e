"""The layers of docs/numerics.md sections 1, 2 and 6.

Parameters are float32 masters, cast to the compute dtype where they are used. Nothing but parameters
is stored in a module. RMSNorm and RoPE have hand-written gradients: fewer passes over memory, and
only the input is kept for the backward pass.

Legend: B rows, T tokens, S keys, D d_model, H query heads, K key/value heads, Dh head_dim, F d_ff.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.torch_common.cache import KVCache
from backends.torch_common.device import DevicePolicy, expand_heads
from core.chunks import FSUM_BLOCK
from core.config.schema import ModelConfig
from core.dropout import dropout_threshold

# Added to hidden scores. Finite, and in range of float16: -inf gives NaN on some devices.
MASKED = -3e4


def fsum(x: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Sum in float32 by blocks of at most 4,096 (section 1), over all but the leading dims."""
    x = x.float().reshape(*x.shape[:batch_dims], -1)
    while x.shape[-1] > FSUM_BLOCK:
        pad = -x.shape[-1] % FSUM_BLOCK
        x = F.pad(x, (0, pad)) if pad else x
        x = x.unflatten(-1, (-1, FSUM_BLOCK)).sum(-1)
    return x.sum(-1)


def _fresh_product(x: Tensor, y: Tensor) -> Tensor:
    """`x * y` in a contiguous tensor of x's shape.

    `addcmul_` on others has been wrong on MPS (pytorch #118115).
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.mul(x, y, out=out)


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        product = grad * wide
        # mean(w g x) over the last axis, as a matrix-vector product.
        slope = (product @ weight).unsqueeze(-1) * rstd.pow(3) / -x.shape[-1]
        grad_x = _fresh_product(grad, weight).mul_(rstd).addcmul_(wide, slope)
        return grad_x.to(x.dtype), product.mul_(rstd).flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """`w * (x * rsqrt(mean(x^2) + eps))` in float32 over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNormFunction.apply(x, self.weight, self.eps)
        return y


class Linear(nn.Module):
    """`x @ W.T` in the dtype of x, W cast from its master; no bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Rows of the master, `[V, D]`, cast to the compute dtype."""

    def __init__(self, vocab_size: int, d_model: int, policy: DevicePolicy) -> None:
        super().__init__()
        self.lookup = policy.lookup
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.lookup(self.weight, tokens).to(dtype)


class _LookupFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return scatter_rows(tokens, grad, ctx.num_rows), None


def ordered_lookup(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows of `weight`, for devices whose own gradient of a lookup adds in an order that varies."""
    rows: Tensor = _LookupFunction.apply(weight, tokens)
    return rows


def scatter_rows(tokens: Tensor, grads: Tensor, num_rows: int) -> Tensor:
    """Sum of the gradients of each id, `[V, D]`, in an order that never varies.

    Rows are sorted by id and summed within runs of equal ids by doubling steps; nothing is added by
    atomics.

    Args:
        tokens: int64 `[B, T]`.
        grads: Gradients of the looked-up rows, `[B, T, D]`.
        num_rows: V.
    """
    ids, order = tokens.reshape(-1).sort(stable=True)  # [B * T]
    sums = grads.reshape(ids.numel(), -1).index_select(0, order)  # [B * T, D]
    step = 1
    while step < ids.numel():
        differ = (ids[step:] != ids[:-step]).unsqueeze(-1)
        added = sums[step:] + sums[:-step].masked_fill(differ, 0.0)
        sums = torch.cat((sums[:step], added))
        step *= 2
    rows = torch.arange(num_rows, device=ids.device)
    last = (torch.searchsorted(ids, rows, right=True) - 1).clamp(min=0)  # where a run ends
    absent = ids.index_select(0, last) != rows
    return sums.index_select(0, last).masked_fill(absent.unsqueeze(-1), 0.0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    x1, x2 = wide.chunk(2, dim=-1)
    swapped = torch.cat((x2, x1), dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return _fresh_product(wide, cos).addcmul_(swapped, sin).to(x.dtype)


class _RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of `[B, T, heads, Dh]` by angles that broadcast to `[B, T, 1, Dh/2]`."""
    y: Tensor = _RopeFunction.apply(x, cos, sin)
    return y


def _signed(x: int) -> int:
    return (x & 0xFFFFFFFF) - (1 << 32) if x & 0x80000000 else x & 0xFFFFFFFF


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> n) & ((1 << (32 - n)) - 1)


def _mix32(x: Tensor) -> Tensor:
    """`core.dropout.mix32` in wrapping int32."""
    x = (x ^ _shift(x, 16)) * _signed(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * _signed(0x846CA68B)
    return x ^ _shift(x, 16)


def dropout(x: Tensor, row_keys: Tensor | None, salt: int, rate: float) -> Tensor:
    """Dropout by a hash of (row, site, element), section 6.

    Args:
        x: `[B, T, D]`.
        row_keys: int32 `[B]`, the bits of the uint32 keys; None is no dropout.
        salt: Constant of the site.
        rate: Share that is dropped.
    """
    if row_keys is None or rate == 0:
        return x
    keys = _mix32(row_keys + _signed(salt))
    index = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)
    hashed = _mix32(index * _signed(0x9E3779B9) + keys[:, None])  # [B, T*D]
    dropped = (_shift(hashed, 8) < dropout_threshold(rate)).view(x.shape)  # [B, T, D]
    return (x * (1 / (1 - rate))).masked_fill(dropped, 0.0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, block: int, *, from_start: bool
) -> Tensor:
    """Attention in plain operators, for devices whose fused kernels are not to be trusted.

    Scores are float32 from the product on: one that is rounded to half precision is off by percents
    where it is large. From the start of the rows it is block-causal: a block of queries reads only
    the keys up to its own end, which is exact, since the mask hides the others, and saves up to half
    of the work.

    Args:
        q: `[B, H, T, Dh]`.
        k: `[B, K, S, Dh]`.
        v: `[B, K, S, Dh]`.
        bias: float32, broadcasts to `[B, 1, T, S]`: 0 or `MASKED`; None: every key is visible.
        block: Queries of a block.
        from_start: Whether query and key t are both of position t; `bias` is then causal.
    """
    t, s = q.shape[2], k.shape[2]
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    scaled, keys = q.float() * q.shape[-1] ** -0.5, k.float().transpose(2, 3)  # [B, H, Dh, S]
    outputs = []
    for i, part in enumerate(scaled.split(block, dim=2)):
        start, end = i * block, min(t, (i + 1) * block)
        seen = end if from_start else s
        scores = part @ keys[..., :seen]  # [B, H, block, seen]
        if bias is not None:
            scores = scores + bias[..., start:end, :seen]
        probs = scores.softmax(-1).to(v.dtype)
        outputs.append(probs @ v[:, :, :seen])
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, optional QK-norm, and RoPE."""

    def __init__(self, config: ModelConfig, layer: int, policy: DevicePolicy) -> None:
        super().__init__()
        d, dh = config.d_model, config.head_dim
        self.head_dim, self.layer = dh, layer
        self.kernel = policy.attention
        self.q_proj = Linear(d, config.n_heads * dh)
        self.k_proj = Linear(d, config.n_kv_heads * dh)
        self.v_proj = Linear(d, config.n_kv_heads * dh)
        self.o_proj = Linear(config.n_heads * dh, d)
        self.q_norm = RMSNorm(dh, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dh, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from `x` `[B, T, D]`, to its own keys or to those of the cache."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(shape)  # [B, T, H, Dh]
        k = self.k_proj(x).view(shape)  # [B, T, K, Dh]
        v = self.v_proj(x).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or K, T, Dh]
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        from_start = cache is None or cache.from_start
        y = self.kernel(q, k, v, mask, from_start=from_start)  # [B, H, T, Dh]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, D]


def gate_activation(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """What the gate of an MLP goes through."""
    return F.silu if config.ffn_activation == "silu" else F.gelu


class MLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff)
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)
        self.act = gate_activation(config)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y
