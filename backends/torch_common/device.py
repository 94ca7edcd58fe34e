"""What differs between the devices that torch runs on, and the CPU, which is the reference.

A `DevicePolicy` answers for one device; everything else in this package is the same on all of them.
Policies of other devices live in packages of their own and are handed in.

Legend: B rows, T query tokens, S key tokens, H query heads, K key/value heads, Dh head_dim.
"""

import ctypes
import platform
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from core.backend import DeviceInfo, MemoryStats
from core.chunks import LOSS_CHUNK_ELEMENTS, TILE_COST
from core.config.schema import RunConfig

# A loss and, of a mixture of experts, the balance of its use, as `losses.pretrain_loss` returns them.
Loss = Callable[..., tuple[Tensor, Tensor | None]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DevicePolicy(Protocol):
    """One device: where arrays live, which kernels are right there, what its counters say.

    Attributes:
        name: Backend name, "cpu", "mps" or "cuda".
        device: Where parameters and batches are.
        compute_dtype: dtype of matmuls and attention.
        loss_chunk_elements: Logits that the loss holds at a time, as a number of elements.
        skips_padding: Whether the head leaves out what has weight 0. Its shapes then vary with the
            data, and the host must know how many there are.
        tile_cost: Rows of a product that take as long as copying its matrix, for tiles of experts.
        key_block: Keys that decoding reads are rounded up to a multiple of this, so that a growing
            text has few shapes where a new shape costs memory or a compilation.
    """

    name: str
    device: torch.device
    compute_dtype: torch.dtype
    loss_chunk_elements: int
    skips_padding: bool
    tile_cost: int
    key_block: int

    def place(self, array: NDArray[Any]) -> Tensor:
        """The array on the device, complete for whatever is computed there from now on.

        The copy itself may still be under way (CUDA), or be none: on the CPU the memory is shared.
        """
        ...

    def prepare_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """Turn a mask into what `attention` wants, once per forward pass.

        Args:
            mask: bool `[B, 1, T, S]`, True where a key is visible, or None: causal where T equals S,
                every key where T is 1.
            length: T.
        """
        ...

    def lookup(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """Rows of `weight` `[V, D]` at `tokens` `[B, T]`, with a gradient that never varies."""
        ...

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, from_start: bool
    ) -> Tensor:
        """Attention in the dtype of `q`, scores and softmax in float32.

        Args:
            q: `[B, H, T, Dh]`.
            k: `[B, K, S, Dh]`, read by query head h at `h // (H / K)`.
            v: `[B, K, S, Dh]`.
            mask: Result of `prepare_mask`.
            from_start: Whether query and key t are both of position t, in every row. Equal T and S
                do not say so: a full cache may hold as many keys as there are new tokens.

        Returns:
            `[B, H, T, Dh]`.
        """
        ...

    def compile(self, function: Loss) -> Loss:
        """The function, compiled for static shapes."""
        ...

    def info(self) -> DeviceInfo: ...
    def memory(self, *, reset_peak: bool) -> MemoryStats: ...
    def synchronize(self) -> None: ...
    def release(self) -> None:
        """Give cached memory back, after work of other shapes than a training step."""
        ...


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each key/value head for its query heads: `[B, K, S, Dh]` to `[B, H, S, Dh]`."""
    b, kv_heads, s, dh = x.shape
    if kv_heads == num_heads:
        return x
    x = x[:, :, None].expand(b, kv_heads, num_heads // kv_heads, s, dh)
    return x.reshape(b, num_heads, s, dh)  # [B, H, S, Dh]


def compile_static(function: Loss) -> Loss:
    """`torch.compile` for the fixed shapes of training."""
    compiled: Loss = torch.compile(function, dynamic=False)
    return compiled


def has_native_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 here; builds without it, as for macOS, lack the operator."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees, for the next step; elsewhere nothing is done.

    Its malloc gives large buffers back to the system and faults every page in again: up to 8,000
    faults and 30 ms of a step of 0.4 s (docs/LOG.md). `man 3 mallopt` has the names and numbers.
    """
    trim_threshold, mmap_threshold = -1, -3
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest it takes
        libc.mallopt(trim_threshold, (1 << 31) - 1)


class CpuPolicy:
    """The CPU: fused attention, the number of threads left to torch, no memory counters."""

    def __init__(self, config: RunConfig) -> None:
        self.name = "cpu"
        self.device = torch.device("cpu")
        self.compute_dtype = DTYPES[config.train.precision]
        # 4 MiB of float32: a chunk stays in cache, and its pages are reused. At 3072 tokens and
        # 4096 words the loss takes about half the time of one block of logits (2-core EPYC).
        self.loss_chunk_elements = LOSS_CHUNK_ELEMENTS["cpu"]
        self.skips_padding = True
        self.tile_cost = TILE_COST["cpu"]
        self.key_block = 1
        keep_freed_memory()

    def place(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    def prepare_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        return mask

    def lookup(self, weight: Tensor, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, weight)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, from_start: bool
    ) -> Tensor:
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )

    def compile(self, function: Loss) -> Loss:
        return compile_static(function)

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            backend=self.name,
            framework=f"torch {torch.__version__}",
            device=f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})",
            budget_bytes=None,
            native_bf16=has_native_bf16(),
        )

    def memory(self, *, reset_peak: bool) -> MemoryStats:
        return MemoryStats(active_bytes=None, peak_bytes=None, cached_bytes=None)

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass
