"""A text stream that nobody may be reading any more, which is no reason to end a run."""

import contextlib
import os
from collections.abc import Callable
from typing import IO


class LastingStream:
    """Writes to a stream until it fails (`| head`, a closed terminal), and then to nothing."""

    def __init__(self, stream: IO[str], lost: Callable[[], None] = lambda: None) -> None:
        """Wrap `stream`; `lost` is called once, when it has failed."""
        self._stream = stream
        self._lost = lost
        self._open = True
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        if self._open:
            try:
                self._stream.write(text)
            except OSError:
                self._close()
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        if self._open:
            try:
                self._stream.flush()
            except OSError:
                self._close()

    def isatty(self) -> bool:
        """Whether a terminal is behind it."""
        return self._open and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's own descriptor."""
        return self._stream.fileno()

    def _close(self) -> None:
        self._open = False
        # What is left in the stream's buffer is written when Python ends; it must not fail again.
        with contextlib.suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)
        self._lost()
