"""What is special about MPS, and nothing else.

- Attention is plain operators under an explicit float mask. The fused kernel's `is_causal` leaks
  future tokens in half precision (pytorch #195910), decoding kernels read past odd key lengths
  (pytorch #169222), and training takes the unfused path anyway (pytorch #179294). It is block-causal,
  which saves up to half of that path's work.
- The gradient of a lookup is summed in a fixed order: the built-in one adds with atomics, in another
  order each time (pytorch #195404), and a resumed run would not equal an uninterrupted one.
- Nothing is float64, nothing relies on type promotion, and masks are finite (pytorch #156707).
- Copies block: a copy from memory that is not pinned could race.
- The allocator keeps the blocks of every shape it met, so memory is given back after evaluation,
  sampling and saving, and decoding sees few shapes.
- What the compiler makes is compared with the eager model before it is used.
- Operators without an MPS kernel are errors, unless a user has the CPU compute them (--allow-cpu-fallback,
  backends/fallback.py).
"""

import platform
import re
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.torch_common.device import DTYPES, Loss, compile_static
from backends.torch_common.layers import MASKED, attention, ordered_lookup
from backends.torch_mps.compiler import verified
from core.backend import DeviceInfo, MemoryStats
from core.chunks import LOSS_CHUNK_ELEMENTS, TILE_COST
from core.config.schema import RunConfig
from core.errors import PippinError

# Above this share of the recommended memory macOS starts to swap and may fail.
MAX_MEMORY_FRACTION = 0.9
# An attention score tensor stays below 2^31 elements; larger ones are silently wrong (pytorch #179592).
MAX_ELEMENTS = (1 << 31) - 1
MIN_BLOCK, NUM_BLOCKS = 64, 8


class MpsPolicy:
    """One Apple GPU.

    Args:
        config: The run.
        device: Where tensors live; tests run the same choices on another device.
    """

    def __init__(self, config: RunConfig, *, device: str = "mps") -> None:
        self.name = "mps"
        self.device = torch.device(device)
        self.compute_dtype = DTYPES[config.train.precision]
        self.loss_chunk_elements = LOSS_CHUNK_ELEMENTS["mps"]
        self.skips_padding = False
        self.tile_cost = TILE_COST["mps"]
        self.key_block = 64
        self._causal_bias: Tensor | None = None
        self._peak_bytes = 0
        self._prepare_device(config)

    def _prepare_device(self, config: RunConfig) -> None:
        share = min(config.train.memory_fraction, MAX_MEMORY_FRACTION)
        torch.mps.set_per_process_memory_fraction(share)
        torch.set_float32_matmul_precision("highest")
        self._check_dtype()

    def _check_dtype(self) -> None:
        try:
            probe = torch.ones(4, 4, dtype=self.compute_dtype, device=self.device)
            complete = float((probe @ probe).float().sum()) == 64.0
        except (RuntimeError, TypeError) as error:
            raise self._no_dtype(str(error).splitlines()[0]) from error
        if not complete:
            raise self._no_dtype("a product of ones is wrong")

    def _no_dtype(self, found: str) -> PippinError:
        return PippinError(
            "P502",
            f"{self.compute_dtype} does not work on this Mac (macOS {platform.mac_ver()[0]}).",
            found=f"{found}; bfloat16 needs macOS 14",
            remedy="train.precision=float32",
            kept="nothing was started.",
        )

    def place(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def prepare_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """A float32 bias for `attention`; the causal one is kept, as training has one length."""
        if mask is not None:
            return mask.logical_not().float() * MASKED
        if length == 1:
            return None
        if self._causal_bias is None or self._causal_bias.shape[-1] < length:
            shape = (length, length)
            self._causal_bias = torch.full(shape, MASKED, device=self.device).triu(1)
        return self._causal_bias[:length, :length]

    def lookup(self, weight: Tensor, tokens: Tensor) -> Tensor:
        return ordered_lookup(weight, tokens)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, from_start: bool
    ) -> Tensor:
        return attention(q, k, v, mask, self._block(q, k), from_start=from_start)

    def _block(self, q: Tensor, k: Tensor) -> int:
        rows, t, s = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
        wanted = max(MIN_BLOCK, -(-t // NUM_BLOCKS))
        return max(1, min(wanted, MAX_ELEMENTS // (rows * s)))

    def compile(self, function: Loss) -> Loss:
        return verified(compile_static(function), function)

    def info(self) -> DeviceInfo:
        chip = chip_name()
        return DeviceInfo(
            backend=self.name,
            framework=f"torch {torch.__version__}",
            device=chip,
            budget_bytes=int(torch.mps.recommended_max_memory()),
            native_bf16=has_native_bf16(chip),
        )

    def memory(self, *, reset_peak: bool) -> MemoryStats:
        """Bytes; the peak is the largest that was seen here, since MPS has no counter for it."""
        active = int(torch.mps.current_allocated_memory())
        driver = int(torch.mps.driver_allocated_memory())
        peak = max(self._peak_bytes, driver)
        self._peak_bytes = driver if reset_peak else peak
        return MemoryStats(
            active_bytes=active, peak_bytes=peak, cached_bytes=max(0, driver - active)
        )

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def release(self) -> None:
        self._peak_bytes = max(self._peak_bytes, int(torch.mps.driver_allocated_memory()))
        torch.mps.empty_cache()


def chip_name() -> str:
    """Marketing name of the chip, "Apple M3 Pro"; the architecture where it is not known."""
    if sys.platform != "darwin":
        return platform.machine()
    out = subprocess.run(
        ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
        capture_output=True,
        text=True,
        check=False,
    )
    return out.stdout.strip() or platform.machine()


def has_native_bf16(chip: str) -> bool:
    """Whether bfloat16 runs at the rate of float16: from M3 on; M1 and M2 emulate it at half."""
    found = re.search(r"\bM(\d+)", chip)
    return found is not None and int(found.group(1)) >= 3
