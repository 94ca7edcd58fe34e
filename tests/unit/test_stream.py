"""A terminal that goes away takes nothing with it.

Run: python -m pytest tests/unit/test_stream.py
"""

import io
import signal

import pytest

from core.training.console import Console
from core.training.signals import StopSignals
from core.training.stream import LastingStream


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


class Late(io.StringIO):
    """A stream that notices only when it is flushed."""

    def flush(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [Broken(), Late()])
def test_a_stream_that_fails_is_written_no_more_and_tells_once(stream):
    told = []
    lasting = LastingStream(stream, lambda: told.append(1))
    for _ in range(3):
        assert lasting.write("text") == 4
        lasting.flush()
    assert told == [1] and not lasting.isatty()


def test_the_console_goes_on_without_a_reader(capsys):
    console = Console(stream=Broken())
    console.print("one")
    console.warn("two")
    console.block("done", ["three"])
    assert console.warnings == ["two"]
    assert capsys.readouterr().err.count("goes on without it") == 1


def test_json_lines_go_on_without_a_reader(monkeypatch):
    monkeypatch.setattr("sys.stdout", Broken())
    console = Console(stream=io.StringIO(), as_json=True)
    console.emit("row", {"step": 1})
    console.emit("row", {"step": 2})


def test_a_signal_prints_nothing_where_it_interrupts(capsys):
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr() == ("", "")
