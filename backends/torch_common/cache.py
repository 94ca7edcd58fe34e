"""The cache of keys and values that decoding reads and grows.

Legend: B rows, T tokens, S keys, K key/value heads, Dh head_dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.torch_common.device import DevicePolicy
from core.config.schema import ModelConfig
from core.errors import PippinError


class KVCache:
    """Keys and values of B sequences in buffers `[B, K, max_len, Dh]`, one pair per layer.

    Rows have lengths of their own, kept on the host. A forward pass is `begin`, one `update` per
    layer, `advance`.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, policy: DevicePolicy
    ) -> None:
        shape = (batch_size, config.n_kv_heads, max_len, config.head_dim)
        kind = {"dtype": policy.compute_dtype, "device": policy.device}
        self.keys = [torch.zeros(shape, **kind) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, **kind) for _ in range(config.n_layers)]
        self.max_len = max_len
        self.policy = policy
        self._lengths = np.zeros(batch_size, np.int32)
        self._num_keys = 0
        self._slots: tuple[Tensor, Tensor, Tensor] | None = None
        self._start = 0

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 `[B]`: tokens that each row holds."""
        return self._lengths.copy()

    @property
    def from_start(self) -> bool:
        """Whether the tokens of this pass are the first of every row, and its only keys."""
        return self._num_keys == 0

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named twice.

        Raises:
            PippinError: P601 for a row that the cache does not have.
        """
        chosen = np.asarray(rows, np.int64)
        if chosen.ndim != 1 or np.any((chosen < 0) | (chosen >= len(self._lengths))):
            raise PippinError("P601", f"the cache has {len(self._lengths)} rows, not {list(rows)}.")
        index = self.policy.place(chosen)
        self.keys = [x.index_select(0, index) for x in self.keys]
        self.values = [x.index_select(0, index) for x in self.values]
        self._lengths = self._lengths[chosen]

    def trim(self, row: int, n: int) -> None:
        """Forget the last `n` tokens of a row.

        Raises:
            PippinError: P601 if the row does not hold so many.
        """
        held = int(self._lengths[row]) if 0 <= row < len(self._lengths) else -1
        if not 0 <= n <= held:
            raise PippinError("P601", f"row {row} of the cache cannot forget {n} tokens.")
        self._lengths[row] -= n

    def begin(
        self, lengths: NDArray[np.int32], length: int
    ) -> tuple[NDArray[np.int64], Tensor | None]:
        """Prepare for `length` tokens a row, of which `lengths[b]` count.

        Returns:
            Positions int64 `[B, T]`, and the mask bool `[B, 1, T, S]` or None for plain causal.

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
        positions = held[:, None] + np.arange(length)  # [B, T]
        aligned = bool((held == held[0]).all() and (new == length).all())
        self._start = int(held[0])
        self._slots = None if aligned else self._ragged_slots(positions, new)
        if not held.any():
            self._num_keys = 0
            return positions, None
        last, block = int((held + new).max()), self.policy.key_block
        self._num_keys = min(self.max_len, -(-last // block) * block)
        if aligned and length == 1 and self._num_keys == last:
            return positions, None
        visible = np.arange(self._num_keys) <= positions[:, :, None]  # [B, T, S]
        return positions, self.policy.place(visible[:, None])

    def _ragged_slots(
        self, positions: NDArray[np.int64], new: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = np.nonzero(np.arange(positions.shape[1]) < new[:, None])
        place = self.policy.place
        return place(rows), place(columns), place(positions[rows, columns])

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` `[B, K, T, Dh]` and return what attention reads, `[B, K, S, Dh]`."""
        for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self._slots is None:
                buffer[:, :, self._start : self._start + new.shape[2]] = new
            else:
                rows, columns, places = self._slots
                buffer[rows, :, places] = new[rows, :, columns]
        if self.from_start:
            return k, v
        s = self._num_keys
        return self.keys[layer][:, :, :s], self.values[layer][:, :, :s]

    def advance(self, lengths: NDArray[np.int32]) -> None:
        """Count the new tokens."""
        self._lengths = self._lengths + lengths.astype(np.int32)
