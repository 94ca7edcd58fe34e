"""How fast a run is, and how long the rest of it takes. Seconds are handed in, never measured here."""

from core.training import format as fmt

# Before this much of the run is over, the time left is told as a range.
EARLY_SHARE = 0.05


class Pace:
    """Seconds of the steps since the last log, and of everything else in the whole run.

    Args:
        phases: Seconds by kind of work, of which "steps" is one; kept up to date.
    """

    def __init__(self, phases: dict[str, float]) -> None:
        self.phases = phases
        self.seconds_a_step: float | None = None
        self.last_speed: float | None = None
        self._seconds = 0.0
        self._tokens = self._steps = 0

    def add(self, name: str, seconds: float) -> None:
        """Count seconds of one kind of work."""
        self.phases[name] = self.phases.get(name, 0.0) + seconds

    def add_step(self, seconds: float, tokens: int, *, typical: bool) -> None:
        """Count a step; one that is not typical, since it compiles and allocates, tells no speed."""
        if typical:
            self._seconds += seconds
            self._tokens += tokens
            self._steps += 1
        self.add("steps", seconds)

    def speed(self) -> float | None:
        """Tokens per second of the steps since the last log, None where there were none."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def logged(self) -> float | None:
        """The speed, once a log has it; the next is that of the steps after it."""
        speed = self.speed()
        if speed is not None:
            self.last_speed, self.seconds_a_step = speed, self._seconds / self._steps
        self.forget()
        return speed

    def forget(self) -> None:
        """Leave out the steps since the last log."""
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def seconds_left(self, steps: int) -> float | None:
        """What so many steps will take, with validation and saving; None while that is unknown."""
        a_step = self.seconds_a_step
        if a_step is None and self._steps:
            a_step = self._seconds / self._steps
        if not a_step:
            return None
        spent = self.phases.get("steps", 0.0)
        other = sum(seconds for name, seconds in self.phases.items() if name != "steps")
        return steps * a_step * (1 + other / spent) if spent > 5 else steps * a_step

    def left_in_words(self, step: int, stop_step: int) -> str:
        """The time that is left at a step, rounded; early in a run as a range."""
        left = self.seconds_left(stop_step - step)
        if left is None:
            return "..."
        if step < EARLY_SHARE * stop_step:
            return f"{fmt.duration(0.8 * left)}-{fmt.duration(1.3 * left)}"
        return fmt.duration(left)
