"""The block of docs/numerics.md section 2, of the layers and the experts.

Legend: B rows, T tokens, D d_model.
"""

from torch import Tensor, nn

from backends.torch_common.cache import KVCache
from backends.torch_common.device import DevicePolicy
from backends.torch_common.experts import MixtureOfExperts
from backends.torch_common.layers import MLP, Attention, RMSNorm, dropout
from core.config.schema import ModelConfig
from core.dropout import SITE_ATTENTION, SITE_MLP, dropout_site_salt


class DecoderLayer(nn.Module):
    """One block: attention and MLP or experts, each normed before and dropped out after."""

    def __init__(self, config: ModelConfig, layer: int, policy: DevicePolicy) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, layer, policy)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MixtureOfExperts(config, policy) if config.n_experts else MLP(config)
        self.rate = config.dropout
        self.attention_salt = dropout_site_salt(layer, SITE_ATTENTION)
        self.mlp_salt = dropout_site_salt(layer, SITE_MLP)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        row_keys: Tensor | None = None,
        cache: KVCache | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, D]` to `[B, T, D]`, and `balance_sum` where there are experts and weights."""
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        x = x + dropout(y, row_keys, self.attention_salt, self.rate)
        h, balance = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MixtureOfExperts):
            y, balance = self.mlp(h, weights)
        else:
            y = self.mlp(h)
        return x + dropout(y, row_keys, self.mlp_salt, self.rate), balance
