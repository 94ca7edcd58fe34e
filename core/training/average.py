"""The running average of a series, such as the loss of a run, and where it is going."""

import math
from collections import deque


class Ema:
    """De-biased exponential moving average, with a noise estimate for its trend."""

    def __init__(self, beta: float = 0.9) -> None:
        self._beta = beta
        self._sum = self._weight = 0.0
        self._last: float | None = None
        self._drift = self._noise = 0.0  # mean and variance of successive differences
        self._differences = 0
        self._history: deque[tuple[int, float]] = deque()
        self._past: float | None = None  # the newest average that is a tenth of the run old

    @property
    def value(self) -> float | None:
        """The newest average."""
        return self._history[-1][1] if self._history else None

    def with_value(self, value: float) -> float:
        """The average if a value were added, which it is not."""
        if not math.isfinite(value):
            return self._sum / self._weight if self._weight else value
        total = self._beta * self._sum + (1 - self._beta) * value
        return total / (self._beta * self._weight + (1 - self._beta))

    def update(self, step: int, value: float) -> float:
        """Add a value; returns the average."""
        if math.isfinite(value):
            if self._last is not None:
                self._differences += 1
                rate = max(1 / self._differences, 1 - self._beta)
                change = value - self._last - self._drift
                self._drift += rate * change
                self._noise += rate * (change * change - self._noise)
            self._last = value
            self._sum = self._beta * self._sum + (1 - self._beta) * value
            self._weight = self._beta * self._weight + (1 - self._beta)
        average = self._sum / self._weight if self._weight else value
        self._history.append((step, average))
        return average

    def trend(self, total_steps: int) -> str:
        """An arrow against the average 10 % of the run ago, beyond two standard errors.

        The variance of one value is half that of a difference; an average has (1-beta)/(1+beta) of
        it, and two averages are compared.
        """
        if self._differences < 2:
            return ""
        step, now = self._history[-1]
        # Each average is passed once, so a long run costs no more a row than a short one.
        while len(self._history) > 1 and self._history[0][0] <= step - 0.1 * total_steps:
            self._past = self._history.popleft()[1]
        if self._past is None:
            return ""
        error = 2 * math.sqrt(self._noise * (1 - self._beta) / (1 + self._beta))
        if abs(now - self._past) <= error:
            return "→"
        return "↘" if now < self._past else "↗"
