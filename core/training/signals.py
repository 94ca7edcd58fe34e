"""Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once.

Python runs a handler between two of its own instructions, which can be a long time after the signal:
a step on a GPU is one call. The answer must come at once, so it is given by a thread, which the
signal itself wakes through a socket.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
ANSWER_S = 1.0


class StopSignals:
    """While active, the first signal is remembered and a second Ctrl-C raises KeyboardInterrupt.

    The handler prints nothing: it runs in the middle of anything, of another print too.

    Args:
        answer: Called once, in a thread, at once with the first signal's number and `step`.
    """

    def __init__(self, answer: Callable[[int, int], None] | None = None) -> None:
        self._previous: dict[int, Any] = {}
        self._answer = answer
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._old_wakeup = -1
        self.received: int | None = None
        # The step after which a signal would stop the run now; the loop keeps it up to date.
        self.step = 0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._listen()
            for number in STOPPING:
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
        if self._ends is not None and self._thread is not None:
            signal.set_wakeup_fd(self._old_wakeup)
            receiver, sender = self._ends
            sender.close()  # which ends the thread
            self._thread.join()
            receiver.close()

    def wait_for_answer(self) -> None:
        """Let the answer to a signal be printed before anything else is said of it."""
        if self._thread is not None and self.received is not None:
            self._answered.wait(ANSWER_S)

    def _listen(self) -> None:
        if self._answer is None:
            return
        self._ends = socket.socketpair()
        sender = self._ends[1]
        sender.setblocking(False)  # a signal must never wait
        self._thread = threading.Thread(target=self._run, name="pippin-signals", daemon=True)
        self._thread.start()
        self._old_wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

    def _run(self) -> None:
        if self._ends is None or self._answer is None:
            return
        while numbers := self._ends[0].recv(64):
            number = next((n for n in numbers if n in STOPPING), None)
            if number is None or self._answered.is_set():
                continue
            # Whatever is wrong with the output is told where the run itself prints.
            with contextlib.suppress(OSError, ValueError):
                self._answer(number, self.step)
            self._answered.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
