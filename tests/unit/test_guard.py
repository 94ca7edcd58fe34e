"""The watch over a run's memory: what it warns of, when it makes a run smaller, and no false alarms.

The sequences are made by hand after what is known of Macs: swap grows in segments while the process
stays above its share; the level of pressure follows. None was recorded on one.

Run: python -m pytest tests/unit/test_guard.py
"""

import ctypes
import os
import time

import pytest

from core.machine.pressure import CRITICAL, NORMAL, WARNING, Reading, memory_pressure, read_memory
from core.training.guard import IN_A_ROW, SETTLE, Budget, Guard, MemoryWatch

GB = 10**9
MAC = 16 * 2**30
BUDGET = Budget(8 * GB, is_shared=True)


def reading(n, used, *, swap=0.0, pressure=None, device=None):
    return Reading(
        at_s=2.0 * n,
        process_bytes=round(used * GB),
        device_bytes=None if device is None else round(device * GB),
        swap_used_bytes=None if swap is None else round(swap * GB),
        available_bytes=4 * GB,
        total_bytes=MAC,
        pressure=pressure,
    )


def judge(steps, budget=BUDGET):
    """(check, kind) of every notice; a step is (GB used, GB of swap, pressure)."""
    guard = Guard(budget)
    found = []
    for n, (used, swap, pressure) in enumerate(steps):
        notice = guard.observe(reading(n, used, swap=swap, pressure=pressure))
        if notice is not None:
            found.append((n, notice.kind))
    return found


@pytest.mark.parametrize(
    "steps",
    [
        [(7.9, 0.0, NORMAL)] * 50,  # just below, for long
        [(7.0, 5.0, NORMAL)] * 50,  # old swap of other programs
        [(3.0, 0.1 * n, NORMAL) for n in range(50)],  # another program swaps; this run is small
        [(6.0, 0.01 * n, NORMAL) for n in range(50)],  # a few MB come and go
        [(3.0, 0.0, WARNING)] * 50,  # pressure of somebody else
        [(6.0, 0.0, WARNING if n % 3 == 0 else NORMAL) for n in range(50)],  # a moment's
        [(6.0, None, None)] * 50,  # swap hidden in a container
    ],
)
def test_no_false_alarm(steps):
    assert judge(steps) == []


def test_above_the_budget_it_warns_once_and_does_nothing_while_swap_is_still():
    assert judge([(7.0, 1.0, NORMAL)] * 3 + [(8.5, 1.0, NORMAL)] * 50) == [(3, "warn")]


def test_swap_that_grows_above_the_budget_makes_the_run_smaller():
    steps = [(8.5, 1.0 + 0.2 * n, NORMAL) for n in range(IN_A_ROW + 1)]
    assert judge(steps) == [(0, "warn"), (IN_A_ROW, "shrink")]
    # It must grow in each check: a pause begins the count anew.
    pause = [(8.5, s, NORMAL) for s in (1.0, 1.2, 1.4, 1.4, 1.6, 1.8, 2.0)]
    assert judge(pause) == [(0, "warn"), (6, "shrink")]


def test_critical_pressure_above_the_budget_makes_the_run_smaller_without_swap():
    steps = [(8.5, 0.0, WARNING)] * 2 + [(8.5, 0.0, CRITICAL)] * IN_A_ROW
    assert judge(steps) == [(0, "warn"), (1 + IN_A_ROW, "shrink")]
    assert (3, "shrink") not in judge([(7.0, 0.0, CRITICAL)] * 9)  # within its budget


def test_swap_and_pressure_are_worth_a_word_below_the_budget():
    grown = [(5.0, 1.0, NORMAL)] * 2 + [(5.0, 2.0, NORMAL)] * 9
    assert judge(grown) == [(2, "warn")]
    assert judge([(5.0, 0.0, WARNING)] * 9) == [(IN_A_ROW - 1, "warn")]


def test_the_words_hold_the_figures():
    guard = Guard(BUDGET)
    guard.observe(reading(0, 5.0, swap=1.0, pressure=NORMAL))
    text = guard.observe(reading(1, 8.5, swap=4.1, pressure=WARNING)).text
    for part in ("8.5 GB of its 8.0 GB", "swap grew by 3.1 GB", "pressure is warning", "4.0 GB"):
        assert part in text
    assert (guard.peak_bytes, guard.swap_grown_bytes) == (8_500_000_000, 3_100_000_000)


def test_after_a_reset_memory_may_come_down_first():
    guard = Guard(BUDGET)
    found = []
    for n in range(40):
        notice = guard.observe(reading(n, 8.5, swap=0.2 * n))
        if notice is not None and notice.kind == "shrink":
            found.append(n)
            guard.reset()
    assert found[0] == IN_A_ROW and found[1] == IN_A_ROW + SETTLE + IN_A_ROW + 1


def test_a_card_has_memory_of_its_own():
    card = Budget(8 * GB, is_shared=False)
    assert card.used(reading(0, 30.0, device=5.0)) == 5 * GB
    assert card.used(reading(0, 30.0)) == 0
    assert BUDGET.used(reading(0, 3.0, device=5.0)) == 5 * GB


def test_the_level_of_pressure_is_read_by_its_name():
    asked = []

    def sysctl(name, value, size, new, new_size):
        asked.append((name, new, new_size))
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = 4
        return 0

    assert memory_pressure(sysctl) == CRITICAL
    assert asked == [(b"kern.memorystatus_vm_pressure_level", None, 0)]
    assert memory_pressure(lambda *_: -1) is None


def test_a_reading_is_of_this_process_and_cheap():
    found = read_memory(7)
    assert found.device_bytes == 7 and 10**6 < found.process_bytes < found.total_bytes
    begin = time.process_time()
    for _ in range(50):
        read_memory()
    # Every 2 s in a thread: 0.1 % of a core would be 2 ms.
    assert (time.process_time() - begin) / 50 < 2e-3


def test_a_watch_keeps_what_must_be_told_until_it_is_asked():
    steps = iter(range(1000))

    def read(device_bytes):
        n = next(steps)
        return reading(n, 8.5, swap=0.2 * n, device=device_bytes)

    with MemoryWatch(BUDGET, read=read, interval_s=0.001) as watch:
        deadline = time.monotonic() + 5
        while next(steps) < 20 and time.monotonic() < deadline:
            time.sleep(0.002)
        notice = watch.poll()
    assert notice is not None and notice.kind == "shrink"  # not hidden by the warning before it
    assert watch.poll() is None or watch.poll() is None


def test_this_machine_gives_no_alarm():
    budget = Budget(int(0.8 * read_memory().total_bytes), is_shared=True)
    with MemoryWatch(budget, interval_s=0.01) as watch:
        time.sleep(0.2)
        assert watch.poll() is None
        assert watch.guard.peak_bytes > 10**6
    assert os.getpid() > 0
