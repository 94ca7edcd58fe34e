"""The angles of the rotary position embedding, of docs/numerics.md section 2."""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def rope_tables(max_len: int, head_dim: int, theta: float) -> tuple[Float32, Float32]:
    """Cosines and sines, made in float64 and rounded once: the same bits for every backend.

    Args:
        max_len: Positions, from 0.
        head_dim: Dh, even.
        theta: Base of the frequencies.

    Returns:
        Two float32 `[max_len, Dh/2]`.
    """
    freqs = theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    angles = np.arange(max_len)[:, None] * freqs  # [max_len, Dh/2]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
