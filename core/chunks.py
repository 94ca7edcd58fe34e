"""How backends cut work into pieces that fit, for them and for the forecast of memory alike.

Tiles of a mixture of experts: a tile is P rows of one expert. Their numbers follow from shapes alone, so
nothing waits for a device to say how many tokens an expert has (docs/numerics.md section 9).
"""

import math

# Logits that the loss holds at a time, elements: on a CPU what stays in its cache, on a GPU what fills it
# (float32: 128 MiB on mps, 1 GiB on cuda).
LOSS_CHUNK_ELEMENTS = {
    "cpu": 1 << 21,
    "mps": 1 << 25,
    "cuda": 1 << 28,
    "mlx_cpu": 1 << 20,
    "mlx_gpu": 1 << 24,
}
# Elements of a stack of matrices that Newton-Schulz takes at a time: bounds its memory. MLX runs ahead, so
# that temporaries of 16 to 25 stacks are alive: with stacks of 2^24 a step of 20 M parameters takes 11
# times their memory, with 2^20 4.3 times (mlx 0.32.4, CPU). A GPU gets 64 matrices of 256 x 256 at a
# time, 2 GFLOP a matmul, which is what it takes to fill one; 25 such stacks are 0.4 GB.
NS_ELEMENTS = {"torch": 1 << 26, "mlx_cpu": 1 << 20, "mlx_gpu": 1 << 22}
# Values that `fsum` adds up at a time; it pads longer rows to a multiple.
FSUM_BLOCK = 4096
# Rows of a product that take as long as beginning a tile. torch copies the expert's matrix for each
# (cpu: 512 x 256 on one core of an EPYC, 1.1 ms a copy and 5 us a row; mps, cuda: from FLOP/s over
# bytes/s of such chips, not measured); for MLX small products are slower a row.
TILE_COST = {"cpu": 24, "mps": 128, "cuda": 128, "mlx": 4}


def tile_rows(num_choices: int, n_experts: int, tile_cost: int) -> int:
    """Rows P of a tile: few rows need many tiles, many are mostly empty.

    There are about `E + (A - E) / P` tiles at a cost of `tile_cost + P` each, least at
    `P = sqrt(tile_cost A / E)`; a power of two.
    """
    best = math.sqrt(max(tile_cost * num_choices / n_experts, 1.0))
    return 1 << min(round(math.log2(best)), int(math.log2(num_choices)))


def num_tiles(num_choices: int, n_experts: int, rows: int) -> int:
    """As many tiles as the worst distribution of the choices needs."""
    return (num_choices + min(n_experts, num_choices) * (rows - 1)) // rows
