"""Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While active, the first signal is remembered and a second Ctrl-C raises KeyboardInterrupt.

    Nothing is printed here: a handler runs in the middle of anything, of another print too.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
