"""The block of docs/numerics.md section 2, of the layers and the experts.

Legend: B rows, T tokens, D d_model.
"""

import mlx.core as mx
from mlx import nn

from backends.mlx.cache import KVCache, Mask
from backends.mlx.experts import MixtureOfExperts
from backends.mlx.layers import MLP, Attention, RMSNorm, dropout
from core.config.schema import ModelConfig
from core.dropout import SITE_ATTENTION, SITE_MLP, dropout_site_salt


class DecoderLayer(nn.Module):
    """One block: attention and MLP or experts, each normed before and dropped out after."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MixtureOfExperts(config) if config.n_experts else MLP(config)
        self.rate = config.dropout
        self.attention_salt = dropout_site_salt(layer, SITE_ATTENTION)
        self.mlp_salt = dropout_site_salt(layer, SITE_MLP)

    def __call__(
        self,
        x: mx.array,
        rope: tuple[mx.array, mx.array],
        mask: Mask,
        row_keys: mx.array | None = None,
        cache: KVCache | None = None,
        weights: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """`[B, T, D]` to `[B, T, D]`, and `balance_sum` where there are experts and weights."""
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        x = x + dropout(y, row_keys, self.attention_salt, self.rate)
        h, balance = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MixtureOfExperts):
            y, balance = self.mlp(h, weights)
        else:
            y = self.mlp(h)
        return x + dropout(y, row_keys, self.mlp_salt, self.rate), balance
