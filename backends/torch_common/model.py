"""The model of docs/numerics.md section 2.

Legend: B rows, T tokens, S keys, D d_model, K key/value heads, Dh head_dim, V vocab_size.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends.torch_common.blocks import DecoderLayer
from backends.torch_common.cache import KVCache
from backends.torch_common.device import DevicePolicy
from backends.torch_common.layers import Embedding, Linear, RMSNorm
from core.config.schema import ModelConfig
from core.rope import rope_tables


class Transformer(nn.Module):
    """Decoder of Qwen3's shape, Qwen3-MoE's with experts, Llama's without `qk_norm`.

    Attribute paths are canonical names.
    """

    def __init__(
        self, config: ModelConfig, policy: DevicePolicy, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.policy = config, policy
        self.gradient_checkpointing = gradient_checkpointing
        self.embed_tokens = Embedding(config.vocab_size, config.d_model, policy)
        self.layers = nn.ModuleList(DecoderLayer(config, i, policy) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        self._rope = self._rope_tables(config.max_seq_len)

    def _rope_tables(self, max_len: int) -> tuple[Tensor, Tensor]:
        cos, sin = rope_tables(max_len, self.config.head_dim, self.config.rope_theta)
        return self.policy.place(cos), self.policy.place(sin)

    def reserve(self, length: int) -> None:
        """Have rotary tables for at least `length` positions."""
        if length > self._rope[0].shape[0]:
            self._rope = self._rope_tables(length)

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`: the head's matrix, the embedding's where tied."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        weight: Tensor = head.weight
        return weight

    def hidden(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        row_keys: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: NDArray[np.int32] | None = None,
    ) -> Tensor:
        """The last hidden states, normed.

        Args:
            tokens: int64 `[B, T]`.
            segments: int64 `[B, T]`; attention stays where they are equal.
            row_keys: int32 `[B]` keys of dropout; None is no dropout.
            cache: Keys and values of what came before, extended in place.
            lengths: int32 `[B]`, with a cache: how many tokens of each row count.

        Returns:
            `[B, T, D]` in the compute dtype.
        """
        return self.hidden_and_balance(tokens, segments, row_keys, cache, lengths)[0]

    def hidden_and_balance(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        row_keys: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: NDArray[np.int32] | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
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
            index = self.policy.place(np.minimum(positions, cos.shape[0] - 1))
            cos, sin = cos[index], sin[index]  # [B, T, Dh/2]
        else:
            cos, sin, mask = cos[:t], sin[:t], segment_mask(segments)
        rope = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [(B,) T, 1, Dh/2]
        mask = self.policy.prepare_mask(mask, t)
        x = self.embed_tokens(tokens, self.policy.compute_dtype)
        balances: list[Tensor | None] = []
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Nothing random is inside: dropout is a function of row_keys.
                x, balance = checkpoint(
                    layer,
                    *(x, rope, mask, row_keys, None, weights),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x, balance = layer(x, rope, mask, row_keys, cache, weights)
            balances.append(balance)
        if cache is not None and lengths is not None:
            cache.advance(lengths)
        known = [b for b in balances if b is not None]
        return self.norm(x), torch.stack(known).sum() * (1 / len(known)) if known else None

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` to logits float32 `[..., V]`."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()


def segment_mask(segments: Tensor | None) -> Tensor | None:
    """Bool `[B, 1, T, T]`: causal within equal segments; None stays None."""
    if segments is None:
        return None
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
    return same.tril().unsqueeze(1)  # [B, 1, T, T]
