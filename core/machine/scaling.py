"""How large a model a machine and a text are good for: tiers by memory, a ladder of sizes, epochs.

Memory sets a ceiling (the tiers); what is chosen below it is what the time can train. Nothing here knows
a framework or a draft: numbers in, numbers out.
"""

import math
from dataclasses import dataclass

from core.machine.facts import MachineFacts

GB = 10**9
# What a device reports may be this much below what it was sold as. Memory is sold in GiB (a "16 GB"
# Mac has 17.2e9 bytes), of which drivers, graphics and firmware keep a part: a T4 of "16 GB" reports
# 16.1e9, a PC of "16 GB" whose graphics take 2 GB 14.9e9. Nothing is sold between that and 12 GB.
TIER_TOLERANCE = 0.07
# Repeating a text is worth as much as new text at first and little in the end: Muennighoff et al.,
# 2023 (arXiv:2305.16264), with the constant that they fitted.
REPEATS_WORTH = 15.39
# Up to here a repetition is nearly as good as new text (ibid.).
GOOD_EPOCHS = 4
# Passes over a text after which a small model only memorises it.
MAX_EPOCHS = 20
STORY_BYTES_PER_TOKEN = 4.4
# Stories to write: their number grows with the time at first and with its root from here on, as the
# tokens of a compute-optimal run do (Hoffmann et al., 2022, arXiv:2203.15556).
LINEAR_MINUTES = 20.0
CORPUS_BYTES_A_MINUTE = {"cpu": 4_000_000, "gpu": 16_000_000}
MIN_CORPUS_BYTES, MAX_CORPUS_BYTES = 4_000_000, 4_000_000_000


@dataclass(frozen=True)
class Tier:
    """The largest model that is decided for a device by itself.

    Attributes:
        name: Small, Medium, Large or XL.
        memory_gb: The least memory, in GB of 10^9 bytes, as it is sold.
        d_model: Width.
        n_layers: Blocks.
        n_heads: Query heads.
    """

    name: str
    memory_gb: int
    d_model: int
    n_layers: int
    n_heads: int


# Of seed guide 000; the memory is that of one replica, never a sum over GPUs.
TIERS = (
    Tier("Small", 0, 256, 4, 4),
    Tier("Medium", 16, 384, 6, 8),
    Tier("Large", 64, 768, 12, 12),
    Tier("XL", 256, 1536, 24, 24),
)
# Width and depth of the sizes that are tried, smallest first.
# A model below the first one writes no stories, however many it reads: slower machines train it too.
LADDER = (
    (96, 4),
    (128, 4),
    (192, 4),
    (256, 6),
    (384, 6),
    (512, 8),
    (640, 10),
    (768, 12),
    (1024, 16),
    (1280, 20),
    (1536, 24),
)


def tier_of(memory_bytes: int) -> Tier:
    """The tier of a device.

    Args:
        memory_bytes: Memory that one replica of a model has: a Mac's unified memory, one card's
            own, or a computer's.
    """
    least = [t for t in TIERS if memory_bytes >= (1 - TIER_TOLERANCE) * t.memory_gb * GB]
    return least[-1]


def replica_memory_bytes(backend: str, facts: MachineFacts) -> int | None:
    """The memory by which a device is sold and its tier is named, None where it is not known.

    A Mac's GPU shares the machine's memory; of several NVIDIA cards the smallest counts, since each
    holds a whole replica; the CPU has the computer's, or a container's share of it.
    """
    if backend == "cuda" and facts.nvidia is not None:
        return facts.nvidia.replica_memory_bytes
    return facts.usable_memory_bytes


def sizes_of(tier: Tier) -> tuple[tuple[int, int], ...]:
    """(width, depth) of the sizes that a tier allows, smallest first; its own is the last."""
    top = (tier.d_model, tier.n_layers)
    below = tuple(s for s in LADDER if s[0] <= top[0] and s[1] <= top[1] and s != top)
    return (*below, top)


def tier_heads(d_model: int, n_layers: int) -> int | None:
    """Heads of the tier that has exactly this size, None for others."""
    found = [t.n_heads for t in TIERS if (t.d_model, t.n_layers) == (d_model, n_layers)]
    return found[0] if found else None


def worth_of_tokens(read: float, distinct: float) -> float:
    """How many new tokens reading `read` tokens of a text of `distinct` is worth.

    Muennighoff et al., 2023: U + U R* (1 - exp(-R / R*)), with U distinct tokens and
    R = read / U - 1 repetitions; what is read once is worth itself.
    """
    if distinct <= 0 or read <= distinct:
        return max(read, 0.0)
    repeats = read / distinct - 1
    return distinct * (1 + REPEATS_WORTH * (1 - math.exp(-repeats / REPEATS_WORTH)))


def corpus_bytes(minutes: float, *, is_gpu: bool) -> int:
    """Bytes of stories for a time: about one epoch of what the quick start reads in it."""
    rate = CORPUS_BYTES_A_MINUTE["gpu" if is_gpu else "cpu"]
    linear = min(minutes, LINEAR_MINUTES)
    root = math.sqrt(max(minutes / LINEAR_MINUTES, 1.0))
    return _within_corpus(linear * rate * root)


def corpus_bytes_for(tokens: float) -> int:
    """Bytes of stories for a number of tokens, each read at most `GOOD_EPOCHS` times."""
    # Two significant digits, so that small changes of a plan find the same stories prepared.
    wanted = tokens * STORY_BYTES_PER_TOKEN / GOOD_EPOCHS
    scale = 10 ** max(math.floor(math.log10(max(wanted, 1.0))) - 1, 0)
    return _within_corpus(math.ceil(wanted / scale) * scale)


def _within_corpus(size: float) -> int:
    return int(min(max(size, MIN_CORPUS_BYTES), MAX_CORPUS_BYTES))
