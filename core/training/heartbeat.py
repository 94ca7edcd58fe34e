"""What goes on at the moment, and when it is time to say so. Time is handed in, never read here."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

# Nothing is silent for longer. In the history each further pause in the same kind of work is twice as
# long, so that a log of slow steps stays short.
FIRST_SILENCE_S = 5.0
LONGEST_SILENCE_S = 60.0
TICK_S = 0.25


@dataclass(frozen=True)
class Activity:
    """One piece of work.

    Attributes:
        kind: What sort of work; the pauses begin anew with another.
        words: What is being done: "computing step 413".
        since: When it began, in seconds of the console's clock.
        label: Of a phase before or after the history, the word at the left of its line.
    """

    kind: str
    words: str
    since: float
    label: str = ""

    def line(self, now: float) -> str:
        """The line that says that it still goes on."""
        label = f"{self.label:<10} " if self.label else ""
        return f" {label}still {self.words}: {now - self.since:.0f} s"


class Silence:
    """How long it may be silent: 5 s in a phase; in the history also 10, 20, 40, at most 60."""

    def __init__(self) -> None:
        self._kind = ""
        self._pause_s = FIRST_SILENCE_S

    def ends(self, activity: Activity, silent_s: float) -> bool:
        """Whether a line is due.

        Args:
            activity: What goes on.
            silent_s: Seconds since anything was printed.
        """
        if activity.kind != self._kind:
            self._kind, self._pause_s = activity.kind, FIRST_SILENCE_S
        if silent_s < self._pause_s:
            return False
        if not activity.label:
            self._pause_s = min(2 * self._pause_s, LONGEST_SILENCE_S)
        return True


class Ticking:
    """Calls a function four times a second in a thread, as long as it is entered."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pippin-heartbeat", daemon=True)

    def __enter__(self) -> "Ticking":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(TICK_S):
            self._tick()
