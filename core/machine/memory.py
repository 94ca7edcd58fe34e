"""Predicted memory of training and of inference, from the configuration and the parameter table.

A step is walked through as the backend takes it (`memory_torch`, `memory_mlx`), and the peak is the
largest sum of what is held at one moment; the parts of a forecast are those of that moment. So a part
can be 0: while the optimizer works, activations are gone. No framework is imported.

Measured against real steps by `python tools/benchmark.py memory`, which writes docs/memory.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.config.schema import RunConfig
from core.machine import memory_mlx, memory_torch
from core.machine.memory_ledger import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    NEW_STATE,
    OPTIMIZER,
    WEIGHTS,
    WORKSPACE,
    Ledger,
)
from core.params import ParamSpec, num_parameters, slot_specs

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# Resident memory of the process with the framework, before any tensor. cpu and mlx: measured on Linux
# with torch 2.13 and mlx 0.32.4; mps and cuda: not measured, torch's and the driver's context.
FRAMEWORK_BYTES = {"cpu": 270_000_000, "mps": 300_000_000, "cuda": 500_000_000, "mlx": 100_000_000}
# torch loads its compiler where it compiles, and also at the first use of `torch.utils.checkpoint`.
COMPILER_BYTES = 75_000_000
# What glibc's heap holds beyond the tensors that are alive, as a share of them: freed blocks
# that no later tensor fits. Only where tensors come from the process's own heap.
ALLOCATOR_OVERHEAD = {"cpu": 0.45}


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes by part at the moment of the peak; `total` is their sum.

    Attributes:
        weights: Master weights, and copies in a narrower dtype that live as long.
        gradients: Gradients that are there at that moment.
        optimizer: Optimizer state.
        new_state: New weights and state beside the old ones.
        activations: What forward keeps for backward.
        logits: The chunk of logits, and gradients that the loss makes.
        framework: The process itself.
        workspace: Temporaries of operators and of the update.
        cache: Keys and values; 0 in training.
        allocator: What the process's heap adds.
        moment: What is being done at the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    new_state: int
    activations: int
    logits: int
    framework: int
    workspace: int = 0
    cache: int = 0
    allocator: int = 0
    moment: str = ""

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(self.parts().values())

    @property
    def tensors(self) -> int:
        """What a device's own counter shows: all but the framework and the allocator."""
        return self.total - self.framework - self.allocator

    def parts(self) -> dict[str, int]:
        """Bytes by name, largest first."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "new state": self.new_state,
            "activations": self.activations,
            "logits": self.logits,
            "workspace": self.workspace,
            "KV cache": self.cache,
            "framework": self.framework,
            "allocator": self.allocator,
        }
        return dict(sorted(parts.items(), key=lambda item: -item[1]))


def predict_training_memory(config: RunConfig, specs: Sequence[ParamSpec]) -> MemoryForecast:
    """Forecast the peak of a training step.

    Args:
        config: Resolved configuration.
        specs: Its parameter table.
    """
    t = config.train
    state = sum(4 * _size(slot.shape) for slot in slot_specs(t.optimizer, specs))
    ledger = Ledger()
    ledger.add(WEIGHTS, 4 * num_parameters(specs), "start")
    ledger.add(OPTIMIZER, state)
    if t.backend == "mlx":
        memory_mlx.walk_step(ledger, config, specs)
    else:
        memory_torch.walk_micro_batches(ledger, config, specs)
        memory_torch.walk_update(ledger, config, specs)
    peak = ledger.peak
    return MemoryForecast(
        weights=peak[WEIGHTS],
        gradients=peak[GRADIENTS],
        optimizer=peak[OPTIMIZER],
        new_state=peak[NEW_STATE],
        activations=peak[ACTIVATIONS],
        logits=peak[LOGITS],
        framework=framework_bytes(config),
        workspace=peak[WORKSPACE],
        allocator=round(ALLOCATOR_OVERHEAD.get(t.backend, 0.0) * ledger.most),
        moment=ledger.moment,
    )


def predict_inference_memory(
    config: RunConfig, specs: Sequence[ParamSpec], batch: int, length: int
) -> MemoryForecast:
    """Forecast the peak of generating: weights, the cache, and the pass over a prompt of this length.

    Args:
        config: Resolved configuration.
        specs: Its parameter table.
        batch: Sequences at a time.
        length: Tokens of a sequence, prompt and answer.
    """
    m, backend = config.model, config.train.backend
    width = WIDTHS[config.train.precision]
    narrow = sum(s.size for s in specs if s.group not in ("vector", "router"))
    weights = width * narrow + 4 * (num_parameters(specs) - narrow)
    cache = kv_cache_bytes(config, batch, length)
    rows = batch * length
    # One block at a time: the stream twice, one norm, and the widest of its parts.
    inner = m.n_heads * m.head_dim + 2 * m.n_kv_heads * m.head_dim
    work = rows * width * (3 * m.d_model + max(3 * m.d_ff, 2 * inner))
    if backend in ("mlx", "mps"):  # scores of the prompt, float32, and their softmax
        work += 2 * 4 * batch * m.n_heads * length * length
    return MemoryForecast(
        weights=weights,
        gradients=0,
        optimizer=0,
        new_state=0,
        activations=0,
        logits=2 * 4 * batch * m.vocab_size,
        framework=FRAMEWORK_BYTES[backend],
        workspace=work,
        cache=cache,
        allocator=round(ALLOCATOR_OVERHEAD.get(backend, 0.0) * work),
        moment="the prompt",
    )


def framework_bytes(config: RunConfig) -> int:
    """The process with its framework, before any tensor."""
    t = config.train
    loads = t.backend != "mlx" and (t.gradient_checkpointing or t.compile)
    return FRAMEWORK_BYTES[t.backend] + (COMPILER_BYTES if loads else 0)


def kv_cache_bytes(config: RunConfig, batch: int, length: int) -> int:
    """Keys and values of every block for `batch` sequences of `length` tokens, in the compute dtype."""
    m = config.model
    slots = length + (1 if config.train.backend == "mlx" else 0)  # MLX has one for padding
    per_token = 2 * m.n_layers * m.n_kv_heads * m.head_dim
    return WIDTHS[config.train.precision] * batch * slots * per_token


def checkpoint_bytes(config: RunConfig, specs: Sequence[ParamSpec]) -> int:
    """Size of one full checkpoint: weights and optimizer state in float32."""
    slots = slot_specs(config.train.optimizer, specs)
    return 4 * (num_parameters(specs) + sum(_size(slot.shape) for slot in slots))


def _size(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
