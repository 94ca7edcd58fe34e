"""The cache of keys and values that decoding reads and grows.

Legend: B rows, T tokens, S keys, K key/value heads, Dh head_dim.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from core.config.schema import ModelConfig
from core.errors import PippinError

# An array that is added to the scores, "causal", or None where every key is seen.
Mask = mx.array | str | None


class KVCache:
    """Keys and values of B sequences in buffers `[B, K, max_len + 1, Dh]`, one pair per layer.

    Rows have lengths of their own, kept on the host. A forward pass is `begin`, one `update` per
    layer, `advance`. Padding is written to the slot behind the last one, which nothing reads.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, dtype: mx.Dtype) -> None:
        shape = (batch_size, config.n_kv_heads, max_len + 1, config.head_dim)
        self.keys = [mx.zeros(shape, dtype) for _ in range(config.n_layers)]
        self.values = [mx.zeros(shape, dtype) for _ in range(config.n_layers)]
        self.max_len = max_len
        self._lengths = np.zeros(batch_size, np.int32)
        self._num_keys = 0
        self._slots: mx.array | None = None
        self._start = 0

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 `[B]`: tokens that each row holds."""
        return self._lengths.copy()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named twice.

        Raises:
            PippinError: P601 for a row that the cache does not have.
        """
        chosen = np.asarray(rows, np.int32)
        if chosen.ndim != 1 or np.any((chosen < 0) | (chosen >= len(self._lengths))):
            raise PippinError("P601", f"the cache has {len(self._lengths)} rows, not {list(rows)}.")
        index = mx.array(chosen)
        self.keys = [x[index] for x in self.keys]
        self.values = [x[index] for x in self.values]
        self._lengths = self._lengths[chosen]
        mx.eval(self.keys, self.values)

    def trim(self, row: int, n: int) -> None:
        """Forget the last `n` tokens of a row.

        Raises:
            PippinError: P601 if the row does not hold so many.
        """
        held = int(self._lengths[row]) if 0 <= row < len(self._lengths) else -1
        if not 0 <= n <= held:
            raise PippinError("P601", f"row {row} of the cache cannot forget {n} tokens.")
        self._lengths[row] -= n

    def begin(self, lengths: NDArray[np.int32], length: int) -> tuple[NDArray[np.int32], Mask]:
        """Prepare for `length` tokens a row, of which `lengths[b]` count.

        Returns:
            Positions int32 `[B, T]`, and the mask: bool `[B, 1, T, S]`, or "causal", or None where
            every key is visible.

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
        positions = (held[:, None] + np.arange(length)).astype(np.int32)  # [B, T]
        aligned = bool((held == held[0]).all() and (new == length).all())
        self._start = int(held[0])
        used = np.where(np.arange(length) < new[:, None], positions, self.max_len)
        self._slots = None if aligned else mx.array(used.astype(np.int32))
        self._num_keys = int((held + new).max())
        if aligned and (length == 1 or not held.any()):
            return positions, None if length == 1 else "causal"
        visible = np.arange(self._num_keys) <= positions[:, :, None]  # [B, T, S]
        return positions, mx.array(visible[:, None])

    def update(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store `k` and `v` `[B, K, T, Dh]` and return what attention reads, `[B, K, S, Dh]`."""
        for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self._slots is None:
                buffer[:, :, self._start : self._start + new.shape[2]] = new
            else:
                # Indices around a slice come first, so the values are [B, T, K, Dh].
                rows = mx.arange(new.shape[0])[:, None]
                buffer[rows, :, self._slots] = new.transpose(0, 2, 1, 3)
        s = self._num_keys
        return self.keys[layer][:, :, :s], self.values[layer][:, :, :s]

    def advance(self, lengths: NDArray[np.int32]) -> None:
        """Count the new tokens."""
        self._lengths = self._lengths + lengths.astype(np.int32)
