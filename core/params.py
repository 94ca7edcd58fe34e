"""The parameter table: names, shapes, groups and initial values, in one place.

`param_specs` is the single source for both models, the optimizers, checkpoints, counts and export.
Names are Hugging Face's (Qwen3 or Qwen3-MoE with QK-norm, Llama without) less the `model.` prefix;
shapes are `[out, in]` as in both frameworks. The experts of a block are stacked, `[E, out, in]`.

Legend: V vocab_size, D d_model, H n_heads, K n_kv_heads, Dh head_dim, F d_ff, E n_experts.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.config.schema import ModelConfig

Group = Literal["matrix", "embed", "head", "vector", "router", "adapter"]
GROUPS: tuple[Group, ...] = ("matrix", "embed", "head", "vector", "router")


@dataclass(frozen=True)
class Init:
    """How a tensor starts: `normal` with `std`, `ones` or `zeros`."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


@dataclass(frozen=True)
class ParamSpec:
    """One trainable tensor.

    Attributes:
        name: Canonical name, which is the attribute path in both frameworks.
        shape: `[out, in]` for a matrix, `[E, out, in]` for those of the experts of a block, `[V, D]`
            for the embedding, `[D]` for a norm's gain.
        group: Optimizer group; decides Muon or AdamW, the learning rate, and weight decay.
        init: Initial values.
        layer: Block index, or None outside the blocks.
        tied_to: The other role this tensor plays, `lm_head.weight` for a tied embedding. Tied weights
            are one row of the table and one tensor of a checkpoint.
        trainable: False for a frozen base under an adapter.
        dtype: Storage dtype of the master copy.
        experts_used: Of stacked experts, how many a token goes to; None for any other tensor.
    """

    name: str
    shape: tuple[int, ...]
    group: Group
    init: Init
    layer: int | None = None
    tied_to: str | None = None
    trainable: bool = True
    dtype: str = "float32"
    experts_used: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def active_size(self) -> int:
        """Number of elements that one token uses."""
        if self.experts_used is None:
            return self.size
        return self.experts_used * self.size // self.shape[0]


@dataclass(frozen=True)
class SlotSpec:
    """One tensor of optimizer state: `key` is its name in a checkpoint."""

    key: str
    slot: str
    param: str
    shape: tuple[int, ...]
    dtype: str = "float32"


def param_specs(model: ModelConfig) -> tuple[ParamSpec, ...]:
    """The parameter table of an architecture, in the order of the forward pass."""
    d, dh = model.d_model, model.head_dim
    q, kv = model.n_heads * dh, model.n_kv_heads * dh
    std = model.init_std
    normal = Init("normal", std)
    ones = Init("ones")
    residual = (
        Init("zeros")
        if model.zero_init_outputs
        else Init("normal", std / math.sqrt(2 * model.n_layers))
    )
    tied = model.tie_embeddings
    specs = [
        ParamSpec(
            "embed_tokens.weight",
            (model.vocab_size, d),
            "embed",
            Init("normal", model.embed_init_std),
            tied_to="lm_head.weight" if tied else None,
        )
    ]
    for i in range(model.n_layers):
        p = f"layers.{i}."
        specs.append(ParamSpec(p + "input_layernorm.weight", (d,), "vector", ones, i))
        specs.append(ParamSpec(p + "self_attn.q_proj.weight", (q, d), "matrix", normal, i))
        specs.append(ParamSpec(p + "self_attn.k_proj.weight", (kv, d), "matrix", normal, i))
        specs.append(ParamSpec(p + "self_attn.v_proj.weight", (kv, d), "matrix", normal, i))
        if model.qk_norm:
            specs.append(ParamSpec(p + "self_attn.q_norm.weight", (dh,), "vector", ones, i))
            specs.append(ParamSpec(p + "self_attn.k_norm.weight", (dh,), "vector", ones, i))
        specs.append(ParamSpec(p + "self_attn.o_proj.weight", (d, q), "matrix", residual, i))
        specs.append(ParamSpec(p + "post_attention_layernorm.weight", (d,), "vector", ones, i))
        specs += _mlp_specs(model, i, normal, residual)
    specs.append(ParamSpec("norm.weight", (d,), "vector", ones))
    if not tied:
        head = Init("zeros") if model.zero_init_outputs else normal
        specs.append(ParamSpec("lm_head.weight", (model.vocab_size, d), "head", head))
    return tuple(specs)


def _mlp_specs(model: ModelConfig, layer: int, normal: Init, residual: Init) -> list[ParamSpec]:
    """The MLP of a block, or its router and experts."""
    d, f, e = model.d_model, model.d_ff, model.n_experts
    p = f"layers.{layer}.mlp."
    projections = (
        ("gate_proj.weight", (f, d), normal),
        ("up_proj.weight", (f, d), normal),
        ("down_proj.weight", (d, f), residual),
    )
    if not e:
        return [ParamSpec(p + n, shape, "matrix", init, layer) for n, shape, init in projections]
    # Not zeros: with equal probabilities every token would go to the first experts.
    router = ParamSpec(p + "gate.weight", (e, d), "router", normal, layer)
    return [router] + [
        ParamSpec(p + "experts." + n, (e, *shape), "matrix", init, layer, experts_used=model.top_k)
        for n, shape, init in projections
    ]


def uses_muon(spec: ParamSpec, optimizer: str) -> bool:
    """Whether a tensor is updated by Muon: the matrices, where the optimizer is muon.

    Each expert of a stack counts as a matrix of its own. A router does not count as one: its rows are
    separate scores, and Muon would step as far along noise as along what tells experts apart, so that
    the choices never settle.
    """
    return optimizer == "muon" and spec.group == "matrix"


def slot_specs(optimizer: str, specs: Sequence[ParamSpec]) -> tuple[SlotSpec, ...]:
    """Every tensor of optimizer state, in the order of the table."""
    slots = []
    for spec in specs:
        if not spec.trainable:
            continue
        names = ("momentum",) if uses_muon(spec, optimizer) else ("exp_avg", "exp_avg_sq")
        slots += [SlotSpec(f"optim/{s}/{spec.name}", s, spec.name, spec.shape) for s in names]
    return tuple(slots)


def num_parameters(specs: Sequence[ParamSpec]) -> int:
    """Number of stored parameters; a tied matrix counts once."""
    return sum(spec.size for spec in specs)


def num_active_parameters(specs: Sequence[ParamSpec]) -> int:
    """Number of parameters that one token uses: of a block's experts those that it goes to."""
    return sum(spec.active_size for spec in specs)


def num_matmul_parameters(specs: Sequence[ParamSpec]) -> int:
    """Parameters that are multiplied for a token: matrices, routers and the head, tied or not.

    Of a block's experts those that it goes to.
    """
    groups = ("matrix", "head", "router")
    return sum(s.active_size for s in specs if s.group in groups or s.tied_to is not None)


# Irwin-Hall: the sum of 12 uniform 16-bit integers, a normal to within 0.01 in its density.
_UNIFORMS = 12
_SUM_MEAN_TWICE = _UNIFORMS * 65_535
_SUM_STD = math.sqrt(_UNIFORMS * (65_536**2 - 1) / 12)
_BLOCK = 1 << 18


def initial_values(spec: ParamSpec, seed: int) -> NDArray[np.float32]:
    """Initial values of one tensor: the same bits on every machine.

    Normal values are sums of twelve 16-bit integers from PCG64 keyed by (seed, name), scaled by one
    IEEE double multiplication: no libm, no numpy distribution, both of which differ between
    machines and versions.

    Returns:
        float32 array of `spec.shape`.
    """
    if spec.init.kind == "ones":
        return np.ones(spec.shape, np.float32)
    if spec.init.kind == "zeros":
        return np.zeros(spec.shape, np.float32)
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    source = np.random.PCG64(int.from_bytes(digest, "little"))
    scale = spec.init.std / (2 * _SUM_STD)
    out = np.empty(spec.size, np.float32)
    for start in range(0, spec.size, _BLOCK):
        n = min(_BLOCK, spec.size - start)
        raw = source.random_raw(3 * n).astype("<u8", copy=False)
        sums = raw.view("<u2").reshape(n, _UNIFORMS).sum(axis=1, dtype=np.int64)
        out[start : start + n] = (2 * sums - _SUM_MEAN_TWICE) * scale
    return out.reshape(spec.shape)
