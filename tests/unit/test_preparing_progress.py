"""The bar of a preparation: its share is that of the bytes read, and it fits 80 columns.

Run: pytest tests/unit/test_preparing_progress.py
"""

import io
import re
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from core.data.preparing.building import Amount
from tools.preparing import progress
from tools.preparing.progress import Bar


@dataclass
class Read:
    """A source of which only the meter is looked at."""

    num_bytes: int
    bytes_read: int = 0


def drawn(console_file: io.StringIO) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console_file.getvalue())
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize(
    ("num_bytes", "limit", "shares"),
    [
        (1_000, None, [0.25, 0.5, 1.0]),  # packed: more text than bytes
        (0, None, [None, None, None]),  # a stream of unknown length
        (0, 4_000, [0.25, 0.5, 1.0]),
        (1_000, 8_000, [0.25, 0.5, 1.0]),  # the text ends before the limit
        (1_000, 2_000, [0.5, 1.0, 2.0]),  # the limit comes first
    ],
)
def test_the_share_is_of_what_comes_first(
    num_bytes: int, limit: int | None, shares: list[float | None]
) -> None:
    source: Any = Read(num_bytes)
    bar = Bar(Console(file=io.StringIO(), quiet=True), source, limit)
    for step, wanted in zip((1, 2, 4), shares):
        source.bytes_read = step * num_bytes // 4
        done, total = bar._share(Amount(step * 5_000, step * 1_000, step))
        assert (total and done / total) == wanted


def test_a_text_that_was_counted_is_the_measure() -> None:
    """Large parts are read long before they are encoded."""
    source: Any = Read(1_000, 1_000)
    bar = Bar(Console(file=io.StringIO(), quiet=True), source, None)
    bar.expect(40_000)
    assert bar._share(Amount(10_000, 2_500, 1)) == (10_000, 40_000)


def test_it_fits_a_terminal_of_80_columns() -> None:
    source: Any = Read(10_000_000_000)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, markup=False, soft_wrap=True)
    with Bar(console, source, None) as bar:
        source.bytes_read = 3_000_000_000
        bar._progress.refresh()
        assert " read " in drawn(out)[-1] and "3,000 of 10,000 MB" in drawn(out)[-1]
        for step in range(1, 5):
            source.bytes_read = 2_000_000_000 * step
            bar.update(Amount(9_000_000_000 * step, 2_000_000_000 * step, step))
            bar._progress.refresh()
    lines = drawn(out)
    assert lines and all(len(line) <= 80 for line in lines)
    assert any("MB/s" in line and "tok/s" in line for line in lines)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    source: Any = Read(1_000)
    out = io.StringIO()
    with Bar(Console(file=out, markup=False), source, None) as bar:
        for step in (1, 2, 4):
            source.bytes_read = 250 * step
            bar.update(Amount(6_000_000 * step, 2_000_000 * step, step))
    lines = drawn(out)
    # 6 seconds lie between two updates; the first one has no speed yet.
    assert lines[0].split() == "encode 25 % 6 MB 2.0M tokens".split()
    assert lines[1].split() == "encode 50 % 12 MB 4.0M tokens 1.0 MB/s 0.33M tok/s".split()
    assert lines[2].startswith(" encode     100 %") and "1.5 MB/s" in lines[2]
