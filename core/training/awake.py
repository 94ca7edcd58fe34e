"""Whether the computer slept during a run, and how to keep a Mac awake. Clocks are handed in."""

from core.training.format import duration

SLEEP_GAP_S = 30.0
# A run that has longer to go is likely to be left alone.
LONG_S = 1800.0
STAY_AWAKE = "caffeinate -i python train.py ...  keeps a Mac awake (a closed lid still sleeps)"


class Awake:
    """Compares two clocks, of which one stands still while the computer sleeps.

    Args:
        on_mac: Whether `caffeinate` is there.
        wall_s: The wall clock, in seconds since 1970.
        monotonic_s: The other one, in seconds.
    """

    def __init__(self, *, on_mac: bool, wall_s: float, monotonic_s: float) -> None:
        self._on_mac = on_mac
        self._ahead_s = wall_s - monotonic_s
        self._advised = False

    def slept(self, wall_s: float, monotonic_s: float) -> str | None:
        """That the computer slept since the last call, in words; None where it did not."""
        before, self._ahead_s = self._ahead_s, wall_s - monotonic_s
        gap = self._ahead_s - before
        if gap <= SLEEP_GAP_S:
            return None
        tip = f"; {STAY_AWAKE}" if self._on_mac else ""
        return f"the computer slept {duration(gap)}; training went on after it{tip}"

    def advice(self, left_s: float | None) -> str | None:
        """Once, on a Mac, for a run with much time left: how to keep it awake."""
        if self._advised or not self._on_mac or left_s is None or left_s < LONG_S:
            return None
        self._advised = True
        return f"about {duration(left_s)} left: {STAY_AWAKE}"
