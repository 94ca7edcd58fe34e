"""Nothing is silent for long: heartbeats by a clock that is turned by hand, the pace, the live lines.

Run: python -m pytest tests/unit/test_heartbeat.py
"""

import io
import itertools
import re
import signal

import pytest

from core.config.draft import Draft, Source
from core.config.schema import key_names
from core.training import format as fmt
from core.training.average import Ema
from core.training.awake import Awake
from core.training.console import PLAIN_EVERY_S, Console, Progress, Row
from core.training.heartbeat import LONGEST_SILENCE_S
from core.training.pace import Pace


class Clock:
    """A clock that stands still until it is turned."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


class Watched:
    """A console whose ticks come from the test, and the moment of each of its lines."""

    def __init__(self, monkeypatch, stream=None, **kwargs):
        monkeypatch.setattr("core.training.heartbeat.TICK_S", 3600.0)  # the thread does nothing
        self.clock, self.stream = Clock(), stream or io.StringIO()
        self.console = Console(stream=self.stream, now=self.clock, **kwargs)
        self.lines = []

    def wait(self, seconds, step=0.25):
        """Let so much time pass, with a tick at each step of it."""
        for _ in range(round(seconds / step)):
            self.clock.seconds += step
            before = len(self.stream.getvalue())
            self.console.tick()
            for line in self.stream.getvalue()[before:].splitlines():
                self.lines.append((self.clock.seconds - 1000.0, line))


def test_a_silent_phase_says_what_it_does_every_five_seconds(monkeypatch):
    watched = Watched(monkeypatch)
    with watched.console.phase("data", "counting sheep"):
        watched.wait(16)
    assert watched.lines == [
        (5.0, " data       still counting sheep: 5 s"),
        (10.0, " data       still counting sheep: 10 s"),
        (15.0, " data       still counting sheep: 15 s"),
    ]


def test_short_phases_in_a_row_are_not_silent_together(monkeypatch):
    """Three of 3 s each were silent for 9 s where each was timed for itself."""
    watched = Watched(monkeypatch)
    for name in ("one", "two", "three"):
        with watched.console.phase("checks", name):
            watched.wait(3)
    assert [t for t, _ in watched.lines] == [5.0] and "still two: 2 s" in watched.lines[0][1]


def test_a_phase_within_another_is_named_and_then_the_other_again(monkeypatch):
    watched = Watched(monkeypatch)
    with watched.console.phase("summary", "drawing"):
        with watched.console.phase("skills", "asking"):
            watched.wait(6)
        watched.wait(5)
    watched.wait(60)
    words = [re.search(r"still (\w+)", line)[1] for _, line in watched.lines]
    assert words == ["asking", "drawing"]


def test_slow_steps_validation_and_saving_are_told_and_the_log_stays_short(monkeypatch):
    """Silence ends after 5 s, then ever later, and never lasts longer than a minute."""
    watched = Watched(monkeypatch)
    console = watched.console
    with console.live():
        console.doing("steps", "computing step 7")
        watched.wait(600)
        console.doing("saving", "saving step 7")
        watched.wait(6)
    assert watched.lines[0] == (5.0, " still computing step 7: 5 s")
    assert watched.lines[1] == (15.0, " still computing step 7: 15 s")
    times = [t for t, _ in watched.lines]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert max(pauses) <= LONGEST_SILENCE_S == 60 and len(times) < 16
    assert watched.lines[-1][1] == " still saving step 7: 2 s"  # the pause began anew
    before = len(watched.lines)
    watched.wait(100)  # nothing goes on any more
    assert len(watched.lines) == before


def test_a_row_ends_a_silence_and_quiet_stays_quiet(monkeypatch):
    watched = Watched(monkeypatch)
    quiet = Watched(monkeypatch, quiet=True)
    for w in (watched, quiet):
        with w.console.live():
            for step in range(1, 11):
                w.console.doing("steps", f"computing step {step}")
                w.wait(4)
                w.console.row(Row(step=step, loss=1.0))
    assert watched.lines == [] and quiet.stream.getvalue() == ""


@pytest.mark.parametrize("step_s", [0.1, 7.0, 20.4, 45.0])
def test_plain_output_has_a_row_at_least_once_a_minute(monkeypatch, step_s):
    watched = Watched(monkeypatch)
    console, clock = watched.console, watched.clock
    console.header(with_mfu=False)
    last, worst, num_rows = clock(), 0.0, 0
    for step in range(1, int(600 / step_s)):
        clock.seconds += step_s
        if console.wants_plain_row(step_s):
            worst, last, num_rows = max(worst, clock() - last), clock(), num_rows + 1
            console.row(Row(step=step, loss=1.0))
    assert 0 < worst <= PLAIN_EVERY_S == 60
    assert num_rows < 600 / 30 + 1
    assert not Watched(monkeypatch, Terminal()).console.wants_plain_row(1000.0)


def shown_by(stream):
    """The text of the last drawing, without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue().split("\x1b[2K")[-1])


def test_the_live_lines_say_what_is_done_and_how_old_the_checkpoint_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    watched = Watched(monkeypatch, Terminal())
    console, clock = watched.console, watched.clock
    assert console.interactive
    with console.live():
        console.doing("steps", "computing step 1")
        watched.wait(4)
        assert "computing step 1: 4 s" in shown_by(watched.stream)
        saved = clock()
        watched.wait(2)
        clock.seconds += 0.25  # the lines are drawn at most four times a second
        console.doing("steps", "computing step 413")
        console.progress(Progress(412, 1400, "9 m", [3.0, 2.0], 0.37, "21.3k tok/s", saved))
        text = shown_by(watched.stream)
        assert "saved 2 s ago" in text and "computing" not in text and "412/1,400" in text
        watched.wait(10)  # no step ends, and the lines are drawn all the same
        text = shown_by(watched.stream)
        assert "saved 12 s ago" in text and "computing step 413: 10 s" in text
        assert "still" not in watched.stream.getvalue()
        assert all(len(line) <= 100 for line in text.splitlines())


def test_a_signal_is_answered_in_its_own_words():
    for number, words in (
        (signal.SIGINT, "stopping after step 1,412 (Ctrl-C again to abort without saving)"),
        (signal.SIGTERM, "SIGTERM: stopping after step 1,412, which is saved"),
    ):
        stream = io.StringIO()
        console = Console(stream=stream, quiet=True)
        console.stopping(number, 1412)
        assert stream.getvalue() == f" ! {words}\n" and console.warnings == []


# The pace


def test_the_time_left_counts_validation_and_leaves_out_the_first_step():
    pace = Pace({})
    assert pace.left_in_words(1, 100) == "..."
    pace.add_step(60.0, 1000, typical=False)
    assert pace.speed() is None and pace.seconds_left(10) is None
    for _ in range(4):
        pace.add_step(5.0, 1000, typical=True)
    pace.add("validation", 20.0)
    # 80 s of steps and 20 s besides: each second of a step costs 1.25
    assert pace.speed() == pytest.approx(200.0)
    assert pace.seconds_left(10) == pytest.approx(10 * 5 * 1.25)
    assert pace.logged() == pytest.approx(200.0) and pace.speed() is None
    assert (pace.last_speed, pace.seconds_a_step) == (200.0, 5.0)
    assert pace.seconds_left(10) == pytest.approx(62.5) and pace.logged() is None
    assert pace.left_in_words(90, 100) == "62 s" and pace.left_in_words(4, 100) == "8 m-13 m"


# Tables and facts


def test_the_columns_of_the_decisions_never_run_together():
    draft, out = Draft(), io.StringIO()
    for name in key_names():
        draft.set(name, True, Source("file", "x.yaml"))
    Console(stream=out).decided(draft)
    lines = out.getvalue().splitlines()
    for name in key_names():
        line = next(x for x in lines if x.startswith(f" {name} "))
        assert re.match(rf" {re.escape(name)}  +yes ", line), line
    header = next(x for x in lines if x.startswith(" what"))
    assert all(x.index("yes") == header.index("value") for x in lines if " yes " in x)


def test_facts_break_at_their_separators():
    text = "1.3M parameters · 4.6M tokens · about 4 m · memory 0.9 of 8.6 GB · disk 0.8 MB"
    lines = fmt.hanging(" will take  ", text, 80)
    assert lines[1].strip() == "disk 0.8 MB" and lines[0].endswith("memory 0.9 of 8.6 GB ·")
    assert all(len(line) <= 80 for line in lines)
    assert " ".join(line.strip() for line in lines) == f"will take  {text}"
    long = "a · " + "word " * 30
    assert " ".join(fmt.hanging("", long, 40)) == long.strip()


def test_the_average_with_a_value_is_that_of_adding_it():
    one, other = Ema(), Ema()
    for step, value in enumerate((4.0, 3.0, float("nan"), 2.5)):
        expected = other.update(step, value)
        assert one.with_value(value) == pytest.approx(expected) or step == 2
        one.update(step, value)
    assert one.with_value(float("nan")) == one.value


# Sleep


def test_sleep_is_the_wall_clock_running_ahead_and_a_mac_is_told_how_to_stay_awake():
    awake = Awake(on_mac=True, wall_s=5000.0, monotonic_s=100.0)
    assert awake.slept(5600.0, 700.0) is None  # ten minutes of work
    words = awake.slept(8060.0 + 7.0, 707.0)  # 7 s of work and 41 minutes of sleep
    assert words.startswith("the computer slept 41 m;") and "caffeinate -i python train" in words
    assert awake.slept(8068.0, 708.0) is None  # told once
    assert awake.advice(None) is None and awake.advice(600.0) is None
    assert awake.advice(7200.0).startswith("about 2 h 0 m left: caffeinate -i ")
    assert awake.advice(7200.0) is None
    other = Awake(on_mac=False, wall_s=0.0, monotonic_s=0.0)
    assert other.slept(100.0, 10.0) == "the computer slept 90 s; training went on after it"
    assert other.advice(7200.0) is None
