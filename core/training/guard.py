"""The budget of a run's memory, watched while it runs.

A Mac does not refuse memory that it lacks: it swaps, and a step of a second takes a minute. So a run
does not wait for an error. `Guard` judges readings one after the other, and is pure; `MemoryWatch` takes
them in a thread of its own, and the loop asks it between two steps.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from core.machine.pressure import CRITICAL, PRESSURE_NAMES, WARNING, Reading, read_memory
from core.training.format import gigabytes

INTERVAL_S = 2.0
# Checks in a row that must agree before anything is done: 6 seconds.
IN_A_ROW = 3
# Swap that must be added between two checks to count as growing; macOS swaps in segments of 64 MB
# and more, and a few MB come and go on a healthy machine.
GROWTH_BYTES = 32_000_000
# Swap added since the start, as a share of the machine's memory, that is worth a word.
WORTH_A_WORD = 0.05
# Checks after the run was made smaller in which nothing is judged: its memory has to come down.
SETTLE = 5


@dataclass(frozen=True)
class Budget:
    """What a run may use.

    Attributes:
        limit_bytes: The share of the device's memory.
        is_shared: Whether the process's memory counts against it: on a CPU, and on a Mac, where the
            GPU's buffers are part of the process.
    """

    limit_bytes: int
    is_shared: bool

    def used(self, reading: Reading) -> int:
        """Bytes of the reading that count."""
        device = reading.device_bytes or 0
        return max(reading.process_bytes, device) if self.is_shared else device


@dataclass(frozen=True)
class Notice:
    """What the loop is told: `warn`, or `shrink` where the machine would soon stand still."""

    kind: Literal["warn", "shrink"]
    text: str


class Guard:
    """Judges readings in their order; at most one warning until it is reset."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.peak_bytes = 0
        self.swap_grown_bytes = 0
        self._first_swap: int | None = None
        self._recent: deque[Reading] = deque(maxlen=IN_A_ROW + 1)
        self._warned = False
        self._settling = 0

    def reset(self) -> None:
        """Begin anew after the run was made smaller."""
        self._first_swap = None
        self._recent.clear()
        self._warned = False
        self._settling = SETTLE

    def observe(self, reading: Reading) -> Notice | None:
        """Judge one more reading.

        Returns:
            `shrink` where the run is above its budget and swap grew in each of `IN_A_ROW` checks, or
            the pressure was critical in each; `warn` where it is above its budget, or much was
            swapped out or the pressure is raised while it uses more than half of it.
        """
        used = self.budget.used(reading)
        self.peak_bytes = max(self.peak_bytes, used)
        if self._settling > 0:
            self._settling -= 1
            return None
        swap = reading.swap_used_bytes
        if self._first_swap is None:
            self._first_swap = swap
        grown = 0 if swap is None or self._first_swap is None else swap - self._first_swap
        self.swap_grown_bytes = max(self.swap_grown_bytes, grown)
        self._recent.append(reading)
        over = all(self.budget.used(r) > self.budget.limit_bytes for r in list(self._recent)[1:])
        if len(self._recent) > IN_A_ROW and over and self._is_failing():
            return Notice("shrink", self._words(reading, used, grown))
        if not self._warned and self._is_worth_a_word(reading, used, grown):
            self._warned = True
            return Notice("warn", self._words(reading, used, grown))
        return None

    def _is_failing(self) -> bool:
        readings = list(self._recent)
        swaps = [r.swap_used_bytes for r in readings]
        growing = all(
            a is not None and b is not None and b - a >= GROWTH_BYTES
            for a, b in itertools.pairwise(swaps)
        )
        return growing or all(r.pressure == CRITICAL for r in readings[1:])

    def _is_worth_a_word(self, reading: Reading, used: int, grown: int) -> bool:
        if used > self.budget.limit_bytes:
            return True
        swapped = grown > WORTH_A_WORD * reading.total_bytes
        latest = list(self._recent)[-IN_A_ROW:]
        pressed = len(latest) == IN_A_ROW and all((r.pressure or 0) >= WARNING for r in latest)
        return used > self.budget.limit_bytes / 2 and (swapped or pressed)

    def _words(self, reading: Reading, used: int, grown: int) -> str:
        parts = [
            f"memory: the run uses {gigabytes(used)} of its {gigabytes(self.budget.limit_bytes)}"
        ]
        if grown >= GROWTH_BYTES:
            parts.append(f"swap grew by {gigabytes(grown)}")
        if reading.pressure is not None and reading.pressure >= WARNING:
            parts.append(f"memory pressure is {PRESSURE_NAMES[reading.pressure]}")
        parts.append(f"{gigabytes(reading.available_bytes)} of the machine are left")
        return ", ".join(parts)


class MemoryWatch:
    """Takes readings in a thread, and keeps what the loop must be told until it asks.

    Args:
        budget: What the run may use.
        read: Takes a reading, given the device's bytes as the loop saw them last.
        interval_s: Between readings; None takes one at each `poll`, without a thread.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        read: Callable[[int | None], Reading] = read_memory,
        interval_s: float | None = INTERVAL_S,
    ) -> None:
        self.guard = Guard(budget)
        self.device_bytes: int | None = None
        self._read, self._interval_s = read, interval_s
        self._notice: Notice | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "MemoryWatch":
        """Start the thread."""
        if self._interval_s is not None:
            self._thread = threading.Thread(target=self._watch, name="pippin-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def poll(self) -> Notice | None:
        """What is to be told since the last call."""
        if self._interval_s is None:
            self._look()
        with self._lock:
            notice, self._notice = self._notice, None
        return notice

    def reset(self) -> None:
        """Begin anew after the run was made smaller."""
        with self._lock:
            self.guard.reset()
            self.device_bytes = self._notice = None

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        reading = self._read(self.device_bytes)
        with self._lock:
            notice = self.guard.observe(reading)
            # A warning never hides that the run must become smaller.
            if notice is not None and (self._notice is None or notice.kind == "shrink"):
                self._notice = notice
