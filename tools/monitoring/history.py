"""The course of memory while the monitor looks: series, peaks, growth, and where it leads. Pure."""

import itertools
from collections import deque
from dataclasses import dataclass, field

from core.training.watch import Snapshot

# Looks that are kept: an hour at the usual interval of 2 s.
MOST = 1800
# What lies further back says nothing of the pace now.
PACE_S = 300.0
MIN_PACE_S = 30.0
# Growth over the window, as a share of the limit, below which there is no pace to speak of.
MIN_GROWTH = 0.02


@dataclass
class Series:
    """One figure in bytes over time; `peak` is the largest since the monitor began."""

    points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MOST))
    peak: float = 0.0

    def add(self, now: float, value: float) -> None:
        """One more look, at `now` seconds."""
        self.points.append((now, value))
        self.peak = max(self.peak, value)

    def values(self) -> list[float]:
        """All values that are kept, oldest first."""
        return [value for _, value in self.points]

    def growth(self, seconds: float) -> tuple[float, float]:
        """(bytes that were added, seconds they took) from the lowest point of the last `seconds`."""
        if not self.points:
            return 0.0, 0.0
        now, value = self.points[-1]
        recent = [(v, t) for t, v in self.points if t >= now - seconds]
        low, since = min(recent, key=lambda point: (point[0], -point[1]))
        return value - low, now - since

    def seconds_to(self, limit: float) -> float | None:
        """When the figure reaches `limit` at its pace of the last minutes; None where it does not.

        The pace is the slope between the means of the window's two halves, and each half must have
        grown, so that one large allocation is no pace.
        """
        if len(self.points) < 8:
            return None
        now, value = self.points[-1]
        recent = [(t, v) for t, v in self.points if t >= now - PACE_S]
        if now - recent[0][0] < MIN_PACE_S or value >= limit:
            return None
        quarter = max(1, len(recent) // 4)
        parts = [recent[i * quarter : (i + 1) * quarter] for i in range(3)] + [
            recent[3 * quarter :]
        ]
        means = [sum(v for _, v in part) / len(part) for part in parts]
        times = [sum(t for t, _ in part) / len(part) for part in parts]
        rising = all(b > a for a, b in itertools.pairwise(means))
        if not rising or means[-1] - means[0] < MIN_GROWTH * limit:
            return None
        return (limit - value) * (times[-1] - times[0]) / (means[-1] - means[0])


class History:
    """Every series of a monitor, by the name that its row has."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}

    def add(self, snapshot: Snapshot, now: float) -> None:
        """Remember one look."""
        system, gpu, process = snapshot.system, snapshot.gpu, snapshot.status.process
        seen: dict[str, float | None] = {
            "system": system.total_bytes - system.available_bytes,
            "swap": system.swap_used_bytes,
            "GPU": snapshot.metrics.get("memory_active_bytes") if gpu is not None else None,
            "process": None if process is None else process.memory_bytes,
        }
        if gpu is not None and gpu.used_bytes is not None:
            seen["GPU"] = gpu.used_bytes
        for name, value in seen.items():
            if value is not None:
                self.series.setdefault(name, Series()).add(now, value)

    def __getitem__(self, name: str) -> Series:
        """A series, empty where nothing was seen."""
        return self.series.get(name) or Series()


def graph(values: list[float], limit: float, width: int, *, ascii_only: bool = False) -> str:
    """A line of `width` cells, the newest at the right; full height is `limit`.

    Where there are more values than cells, a cell is the largest of its share: a peak is never lost.
    """
    levels = " .:-=+*#" if ascii_only else " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
    top = len(levels) - 1
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [max(values[a:b]) for a, b in itertools.pairwise(edges)]
    cells = [
        levels[min(top, max(1, round(top * value / limit)))] if value > 0 else levels[0]
        for value in values
    ]
    return "".join(cells).rjust(width)
