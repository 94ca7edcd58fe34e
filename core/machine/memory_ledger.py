"""A ledger of what is held in memory as a step goes on, and what was held when it was the most.

A predictor walks through a step as the backend does it, booking what is made and what is freed. The peak
is then a fact of the walk, with the parts of that moment and its name. Sizes are bytes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Names of the parts, in the order of the schema of a report.
WEIGHTS, GRADIENTS, OPTIMIZER, NEW_STATE = "weights", "gradients", "optimizer", "new state"
ACTIVATIONS, LOGITS, WORKSPACE, CACHE = "activations", "logits", "workspace", "KV cache"
FRAMEWORK, ALLOCATOR = "framework", "allocator"


@dataclass
class Ledger:
    """What is held, by part.

    Attributes:
        held: Bytes of each part now.
        peak: Bytes of each part when their sum was the largest.
        moment: What was being done then.
    """

    held: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    moment: str = ""
    _now: int = 0
    _most: int = -1

    def add(self, part: str, size: float, moment: str = "") -> None:
        """Book `size` bytes more (fewer where negative)."""
        self.held[part] += round(size)
        self._now += round(size)
        if self._now > self._most:
            self._most, self.peak = self._now, self.held.copy()
            self.moment = moment or self.moment

    def drop(self, part: str, size: float) -> None:
        """Book `size` bytes as freed."""
        self.add(part, -size)

    def spike(self, part: str, size: float, moment: str = "") -> None:
        """Book `size` bytes that are freed at once."""
        self.add(part, size, moment)
        self.drop(part, size)

    @contextmanager
    def hold(self, part: str, size: float, moment: str = "") -> Iterator[None]:
        """Book `size` bytes for the length of a block."""
        self.add(part, size, moment)
        yield
        self.drop(part, size)

    @property
    def most(self) -> int:
        """The largest sum there was."""
        return max(self._most, 0)
