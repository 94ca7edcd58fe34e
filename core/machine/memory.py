"""Predicted memory of one training step, from the parameter table and the configuration.

The formula counts what must be alive at the peak: master weights, optimizer state, gradients,
activations kept for the backward pass, and the logits of one micro-batch. It is an estimate to refuse
what cannot fit and to forecast; the backends' own counters are the truth while a run goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.config.schema import RunConfig
from core.params import ParamSpec, num_parameters, slot_specs

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Resident memory of the framework itself, before any tensor (torch CPU, measured 2026-11).
FRAMEWORK_BYTES = {"cpu": 250_000_000, "mps": 300_000_000, "cuda": 500_000_000, "mlx": 100_000_000}
# Backends whose training attention keeps the T x T probabilities of every layer.
UNFUSED_ATTENTION = ("mps", "mlx")
# Backends whose step makes new weights and state beside the old ones, which a failed step returns to.
NEW_STATE = ("mlx",)


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes by part; `total` is their sum."""

    weights: int
    gradients: int
    optimizer: int
    new_state: int
    activations: int
    logits: int
    framework: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name, largest first."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "new state": self.new_state,
            "activations": self.activations,
            "logits": self.logits,
            "framework": self.framework,
        }
        return dict(sorted(parts.items(), key=lambda item: -item[1]))


def predict_training_memory(config: RunConfig, specs: Sequence[ParamSpec]) -> MemoryForecast:
    """Forecast the peak of a training step.

    Args:
        config: Resolved configuration.
        specs: Its parameter table.
    """
    m, t = config.model, config.train
    width = _BYTES[t.precision]
    tokens = t.micro_batch_size * config.data.seq_len
    n = num_parameters(specs)
    state = sum(4 * _size(slot.shape) for slot in slot_specs(t.optimizer, specs))
    # Kept per token and layer: two norms, q, k, v, rotated q and k, attention output, residuals; gate,
    # up, activation and product of the MLP. Norms and rotary positions keep float32 copies.
    heads = (m.n_heads + 2 * m.n_kv_heads) * m.head_dim
    layer = width * (7 * m.d_model + 2 * heads + 4 * m.d_ff) + 4 * 2 * m.d_model
    if t.backend in UNFUSED_ATTENTION:
        layer += 2 * width * m.n_heads * config.data.seq_len
    if m.dropout > 0:
        layer += 2 * 5 * m.d_model
    if t.gradient_checkpointing:
        activations = tokens * (m.n_layers * width * m.d_model + layer)
    else:
        activations = tokens * m.n_layers * layer
    logits = tokens * m.vocab_size * (width + 8)
    return MemoryForecast(
        weights=4 * n + (0 if width == 4 else width * n),
        gradients=4 * n,
        optimizer=state,
        new_state=4 * n + state if t.backend in NEW_STATE else 0,
        activations=activations,
        logits=logits,
        framework=FRAMEWORK_BYTES[t.backend],
    )


def checkpoint_bytes(config: RunConfig, specs: Sequence[ParamSpec]) -> int:
    """Size of one full checkpoint: weights and optimizer state in float32."""
    slots = slot_specs(config.train.optimizer, specs)
    return 4 * (num_parameters(specs) + sum(_size(slot.shape) for slot in slots))


def _size(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
