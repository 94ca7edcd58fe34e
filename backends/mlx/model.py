"""The model of docs/numerics.md section 2.

Legend: B rows, T tokens, S keys, D d_model, K key/value heads, Dh head_dim, V vocab_size.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from backends.mlx.blocks import DecoderLayer
from backends.mlx.cache import KVCache, Mask
from backends.mlx.layers import Embedding, Linear, RMSNorm
from core.config.schema import ModelConfig
from core.rope import rope_tables


class Transformer(nn.Module):
    """Decoder of Qwen3's shape, Qwen3-MoE's with experts, Llama's without `qk_norm`.

    Attribute paths are canonical names.

    Args:
        config: The architecture.
        dtype: Compute dtype.
        gradient_checkpointing: Whether training computes each block again in the backward pass.
        loss_chunk_elements: Logits that the loss holds at a time, as a number of elements.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: mx.Dtype,
        *,
        gradient_checkpointing: bool = False,
        loss_chunk_elements: int = 1 << 24,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.loss_chunk_elements = loss_chunk_elements
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.layers = [DecoderLayer(config, i) for i in range(config.n_layers)]
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        # The underscore hides the tables from the tree of parameters.
        self._rope = self._rope_tables(config.max_seq_len)

    def _rope_tables(self, max_len: int) -> tuple[mx.array, mx.array]:
        cos, sin = rope_tables(max_len, self.config.head_dim, self.config.rope_theta)
        return mx.array(cos), mx.array(sin)

    def reserve(self, length: int) -> None:
        """Have rotary tables for at least `length` positions."""
        if length > self._rope[0].shape[0]:
            self._rope = self._rope_tables(length)

    @property
    def head_weight(self) -> mx.array:
        """`[V, D]`: the head's matrix, the embedding's where tied."""
        head = self.embed_tokens if self.config.tie_embeddings else self.lm_head
        return head.weight

    def hidden(
        self,
        tokens: mx.array,
        segments: mx.array | None = None,
        row_keys: mx.array | None = None,
        cache: KVCache | None = None,
        lengths: NDArray[np.int32] | None = None,
    ) -> mx.array:
        """The last hidden states, normed.

        Args:
            tokens: int32 `[B, T]`.
            segments: int32 `[B, T]`; attention stays where they are equal.
            row_keys: uint32 `[B]` keys of dropout, in training; None is no dropout.
            cache: Keys and values of what came before, extended.
            lengths: int32 `[B]`, with a cache: how many tokens of each row count.

        Returns:
            `[B, T, D]` in the compute dtype.
        """
        return self.hidden_and_balance(tokens, segments, row_keys, cache, lengths)[0]

    def hidden_and_balance(
        self,
        tokens: mx.array,
        segments: mx.array | None = None,
        row_keys: mx.array | None = None,
        cache: KVCache | None = None,
        lengths: NDArray[np.int32] | None = None,
        weights: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """What `hidden` returns, and how evenly experts are used.

        Args:
            tokens: As `hidden` takes it.
            segments: As `hidden` takes it.
            row_keys: As `hidden` takes it.
            cache: As `hidden` takes it.
            lengths: As `hidden` takes it.
            weights: float32 `[B, T]` weights of the tokens, in training.

        Returns:
            Hidden states, and the mean of the layers' `balance_sum`: None without experts or weights.
        """
        t = tokens.shape[1]
        cos, sin = self._rope
        if cache is not None and lengths is not None:
            positions, mask = cache.begin(lengths, t)
            index = mx.array(np.minimum(positions, cos.shape[0] - 1))
            cos, sin = cos[index][:, None], sin[index][:, None]  # [B, 1, T, Dh/2]
        else:
            cos, sin, mask = cos[:t], sin[:t], segment_mask(segments)
        rope = cos, sin
        x = self.embed_tokens(tokens, self.dtype)
        balances: list[mx.array | None] = []
        for layer in self.layers:
            if self.gradient_checkpointing and row_keys is not None:
                x, balance = _checkpoint(layer, x, rope, mask, row_keys, weights)
            else:
                x, balance = layer(x, rope, mask, row_keys, cache, weights)
            balances.append(balance)
        if cache is not None and lengths is not None:
            cache.advance(lengths)
        known = [b for b in balances if b is not None]
        return self.norm(x), mx.stack(known).sum() * (1 / len(known)) if known else None

    def logits(self, hidden: mx.array) -> mx.array:
        """`[..., D]` to logits float32 `[..., V]`."""
        return (hidden @ self.head_weight.astype(hidden.dtype).T).astype(mx.float32)


def segment_mask(segments: mx.array | None) -> Mask:
    """Bool `[B, 1, T, T]`: causal within equal segments; None is "causal"."""
    if segments is None:
        return "causal"
    t = mx.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
    return (same & (t[:, None] >= t[None, :]))[:, None]  # [B, 1, T, T]


def _checkpoint(
    layer: DecoderLayer,
    x: mx.array,
    rope: tuple[mx.array, mx.array],
    mask: Mask,
    row_keys: mx.array,
    weights: mx.array | None,
) -> tuple[mx.array, mx.array | None]:
    """One block, computed again in the backward pass.

    Parameters are arguments, since `mx.checkpoint` differentiates nothing else. Keys of dropout and
    weights of tokens are captured: they need no gradient, and the same keys give the same mask both
    times.
    """

    def block(params: dict[str, Any], x: mx.array) -> list[mx.array]:
        outer = layer.parameters()
        layer.update(params)
        y, balance = layer(x, rope, mask, row_keys, None, weights)
        layer.update(outer)
        return [y] if balance is None else [y, balance]

    out: Any = mx.checkpoint(block)(layer.parameters(), x)
    return out[0], out[1] if len(out) > 1 else None
