"""What is special about NVIDIA GPUs, and nothing else.

Fused causal attention, pinned copies that overlap with the step before, real memory counters, and
deterministic kernels, so that a resumed run equals an uninterrupted one bit for bit.
"""

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from backends.torch_common.device import DTYPES, Loss, compile_static, expand_heads
from core.backend import DeviceInfo, MemoryStats
from core.chunks import LOSS_CHUNK_ELEMENTS, TILE_COST
from core.config.schema import RunConfig

# Compute capability of Ampere, the first with bfloat16 units.
BF16_CAPABILITY = (8, 0)
# Workspaces under which cuBLAS repeats its results; with any other, torch refuses a matmul.
CUBLAS_WORKSPACES = (":4096:8", ":16:8")


def _use_deterministic_kernels() -> None:
    """Kernels that repeat their results, and an error where there is none.

    No operator of a step is without one, by the list of `torch.use_deterministic_algorithms` of
    torch 2.13; none was run on a GPU. Were it `warn_only`, the backward pass of fused attention would
    add with atomics.
    """
    # Read by cuBLAS when its handle is made.
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACES[0]
    torch.use_deterministic_algorithms(True, warn_only=False)
    # Nothing here reads memory before it writes it, so filling it is a pass for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False


class CudaPolicy:
    """One NVIDIA GPU: the current device."""

    def __init__(self, config: RunConfig) -> None:
        self.name = "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.compute_dtype = DTYPES[config.train.precision]
        self.loss_chunk_elements = LOSS_CHUNK_ELEMENTS["cuda"]
        self.skips_padding = False
        self.tile_cost = TILE_COST["cuda"]
        self.key_block = 64
        _use_deterministic_kernels()
        torch.cuda.set_per_process_memory_fraction(config.train.memory_fraction, self.device)
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")

    def place(self, array: NDArray[Any]) -> Tensor:
        """The array on the device; the pinned copy is alive until the stream has read it."""
        pinned = torch.from_numpy(np.ascontiguousarray(array)).pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def prepare_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        return mask

    def lookup(self, weight: Tensor, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, weight)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, from_start: bool
    ) -> Tensor:
        causal = mask is None and q.shape[2] > 1
        # Without expanding, masked and float32 attention would fall back to the unfused kernel.
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def compile(self, function: Loss) -> Loss:
        return compile_static(function)

    def info(self) -> DeviceInfo:
        free_and_total = torch.cuda.mem_get_info(self.device)
        return DeviceInfo(
            backend=self.name,
            framework=f"torch {torch.__version__}",
            device=torch.cuda.get_device_name(self.device),
            budget_bytes=int(free_and_total[1]),
            native_bf16=torch.cuda.get_device_capability(self.device) >= BF16_CAPABILITY,
        )

    def memory(self, *, reset_peak: bool) -> MemoryStats:
        active = torch.cuda.memory_allocated(self.device)
        stats = MemoryStats(
            active_bytes=active,
            peak_bytes=torch.cuda.max_memory_allocated(self.device),
            cached_bytes=torch.cuda.memory_reserved(self.device) - active,
        )
        if reset_peak:
            torch.cuda.reset_peak_memory_stats(self.device)
        return stats

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """The caching allocator serves all shapes from one pool: nothing to give back."""
