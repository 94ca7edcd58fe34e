"""The model of docs/numerics.md section 2 and its cache of keys and values.

Legend: B rows, T tokens, S keys, D d_model, K key/value heads, Dh head_dim, V vocab_size.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from backends.mlx.blocks import DecoderLayer
from backends.mlx.layers import Embedding, Linear, Mask, RMSNorm
from core.config.schema import ModelConfig
from core.errors import PippinError
from core.rope import rope_tables


class KVCache:
    """Keys and values of B sequences in buffers `[B, K, max_len + 1, Dh]`, one pair per layer.

    Rows have lengths of their own, kept on the host. A forward pass is `begin`, one `update` per
    layer, `advance`. Padding is written to the slot behind the last one, which nothing reads.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, dtype: mx.Dtype) -> None:
        shape = (batch_size, config.n_kv_heads, max_len + 1, config.head_dim)
        self.keys = [mx.zeros(shape, dtype) for _ in range(config.n_layers)]
        self.values = [mx.zeros(shape, dtype) for _ in range(config.n_layers)]
        self.max_len = max_len
        self._lengths = np.zeros(batch_size, np.int32)
        self._num_keys = 0
        self._slots: mx.array | None = None
        self._start = 0

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 `[B]`: tokens that each row holds."""
        return self._lengths.copy()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named twice.

        Raises:
            PippinError: P601 for a row that the cache does not have.
        """
        chosen = np.asarray(rows, np.int32)
        if chosen.ndim != 1 or np.any((chosen < 0) | (chosen >= len(self._lengths))):
            raise PippinError("P601", f"the cache has {len(self._lengths)} rows, not {list(rows)}.")
        index = mx.array(chosen)
        self.keys = [x[index] for x in self.keys]
        self.values = [x[index] for x in self.values]
        self._lengths = self._lengths[chosen]
        mx.eval(self.keys, self.values)

    def trim(self, row: int, n: int) -> None:
        """Forget the last `n` tokens of a row.

        Raises:
            PippinError: P601 if the row does not hold so many.
        """
        held = int(self._lengths[row]) if 0 <= row < len(self._lengths) else -1
        if not 0 <= n <= held:
            raise PippinError("P601", f"row {row} of the cache cannot forget {n} tokens.")
        self._lengths[row] -= n

    def begin(self, lengths: NDArray[np.int32], length: int) -> tuple[NDArray[np.int32], Mask]:
        """Prepare for `length` tokens a row, of which `lengths[b]` count.

        Returns:
            Positions int32 `[B, T]`, and the mask: bool `[B, 1, T, S]`, or "causal", or None where
            every key is visible.

        Raises:
            PippinError: P601 where the rows or their lengths do not fit the cache.
        """
        held, new = self._lengths.astype(np.int64), np.asarray(lengths, np.int64)
        if new.shape != held.shape or new.min() < 1 or new.max() > length:
            raise PippinError(
                "P601",
                f"each of the {len(held)} rows of the cache needs 1 to {length} tokens.",
                found=f"lengths {new.tolist()}",
            )
        if (held + new).max() > self.max_len:
            raise PippinError(
                "P601",
                f"the context of {self.max_len} tokens is full.",
                found=f"{int((held + new).max())} tokens are needed",
            )
        positions = (held[:, None] + np.arange(length)).astype(np.int32)  # [B, T]
        aligned = bool((held == held[0]).all() and (new == length).all())
        self._start = int(held[0])
        used = np.where(np.arange(length) < new[:, None], positions, self.max_len)
        self._slots = None if aligned else mx.array(used.astype(np.int32))
        self._num_keys = int((held + new).max())
        if aligned and (length == 1 or not held.any()):
            return positions, None if length == 1 else "causal"
        visible = np.arange(self._num_keys) <= positions[:, :, None]  # [B, T, S]
        return positions, mx.array(visible[:, None])

    def update(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store `k` and `v` `[B, K, T, Dh]` and return what attention reads, `[B, K, S, Dh]`."""
        for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self._slots is None:
                buffer[:, :, self._start : self._start + new.shape[2]] = new
            else:
                # Indices around a slice come first, so the values are [B, T, K, Dh].
                rows = mx.arange(new.shape[0])[:, None]
                buffer[rows, :, self._slots] = new.transpose(0, 2, 1, 3)
        s = self._num_keys
        return self.keys[layer][:, :, :s], self.values[layer][:, :, :s]

    def advance(self, lengths: NDArray[np.int32]) -> None:
        """Count the new tokens."""
        self._lengths = self._lengths + lengths.astype(np.int32)


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
