"""Dropout's masks: a counter-based hash, not a generator, of docs/numerics.md section 6.

Equal on every backend, for every split of the step into micro-batches, and when a checkpointed block
is run again. What is here is numpy; each backend has the same `mix32` on its device.
"""

import numpy as np
from numpy.typing import NDArray

_U32 = 0xFFFFFFFF
# Sites of dropout in a block.
SITE_ATTENTION, SITE_MLP = 0, 1


def mix32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The 32-bit finaliser `lowbias32` (Chris Wellons, 2018), elementwise, wrapping."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    out: NDArray[np.uint32] = x ^ (x >> np.uint32(16))
    return out


def dropout_row_keys(seed: int, step: int, row0: int, num_rows: int) -> NDArray[np.uint32]:
    """Keys of the rows of a micro-batch, uint32 `[B]`: functions of (seed, step, global row)."""
    rows = np.arange(row0, row0 + num_rows, dtype=np.uint64).astype(np.uint32)
    base = mix32(np.array([seed & _U32], np.uint32)) + np.uint32(step & _U32)
    return mix32((mix32(base) + rows).astype(np.uint32))


def dropout_site_salt(layer: int, site: int) -> int:
    """A constant of (layer, site), mixed into the row key; below 2**32."""
    return int(mix32(np.array([2 * layer + site + 1], np.uint32))[0])


def dropout_threshold(rate: float) -> int:
    """An element is dropped where its 24 hashed bits are below this."""
    return round(rate * (1 << 24))
