"""A terminal that goes away takes nothing with it.

Run: python -m pytest tests/unit/test_stream.py
"""

import ctypes
import io
import os
import signal
import threading

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


def test_a_signal_is_answered_while_one_call_goes_on_and_on():
    """The main thread is in a call of C, as in a step on a GPU: its handler cannot run meanwhile."""
    reading, writing = os.pipe()
    told = []

    def answer(number, step):
        told.append((number, step, signals.received))
        os.write(writing, b"x")

    def send():
        go.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    go = threading.Event()
    sender = threading.Thread(target=send, daemon=True)
    watchdog = threading.Timer(20, os.write, (writing, b"?"))
    with StopSignals(answer) as signals:
        signals.step = 413
        sender.start()
        watchdog.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            go.set()
            buffer = ctypes.create_string_buffer(1)
            ctypes.CDLL(None).read(reading, buffer, 1)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        sender.join()
        watchdog.cancel()
        signals.wait_for_answer()
        assert buffer.raw == b"x" and signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert told == [(signal.SIGINT, 413, None)]
    os.close(reading)
    os.close(writing)


def test_only_the_first_signal_is_answered_and_everything_is_put_back():
    told = []
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with StopSignals(lambda number, step: told.append((number, step))) as signals:
        signals.step = 2
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signals.wait_for_answer()
    assert told == [(signal.SIGTERM, 2)] and threading.active_count() == threads
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.set_wakeup_fd(-1) == -1
