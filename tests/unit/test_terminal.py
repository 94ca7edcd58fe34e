"""The terminal: numbers, bars, plain output, what is shown when.

Run: python -m pytest tests/unit/test_terminal.py
"""

import io
import itertools
import math

import pytest

from core.config.draft import Draft, Source
from core.training import format as fmt
from core.training.average import Ema
from core.training.cadence import sample_steps, shown_steps
from core.training.console import Console, Row
from core.training.plots import loss_plot


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.62499, "7.625"),
        (0.00123456, "0.001235"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (12345678.0, "1.23e+07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_have_four_significant_digits(value, text):
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (140, "2 m"), (4000, "1 h 7 m"), (200_000, "2 d 7 h")],
)
def test_durations_are_rounded(seconds, text):
    assert fmt.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999.4, "999"),
        (999.7, "1.0k"),
        (99_960, "100k"),
        (999_499, "999k"),
        (999_999, "1.0M"),
        (-999_999, "-1.0M"),
        (999_960_000, "1.0G"),
        (2.5e12, "2500G"),
        (math.inf, "inf"),
    ],
)
def test_a_unit_is_that_of_the_rounded_number(value, text):
    assert fmt.si(value) == text


def test_other_units():
    assert fmt.si(12_430) == "12.4k" and fmt.si(950) == "950" and fmt.si(2.5e6) == "2.5M"
    assert fmt.gigabytes(9e8) == "0.9 GB" and fmt.gigabytes(5.2e6) == "5.2 MB"
    assert fmt.exact_duration(221) == "3 m 41 s"


@pytest.mark.parametrize("total", [1, 7, 100, 300, 5000, 300_000])
def test_a_run_is_about_45_rows_whatever_its_length(total):
    shown = shown_steps(total, 10, eval_interval=max(1, total // 1000))
    assert total in shown and min(shown) == 1 and max(shown) == total
    assert len(shown) <= 50


def test_few_validations_have_rows_of_their_own():
    with_all = shown_steps(1000, 10, eval_interval=104)
    assert set(range(104, 1001, 104)) <= with_all and len(with_all) <= 60
    assert shown_steps(1000, 10, eval_interval=10) == shown_steps(1000, 10, eval_interval=1)


def test_samples_are_log_spaced_and_include_the_end():
    steps = sorted(sample_steps(1000, 8))
    assert len(steps) == 8 and steps[0] == 20 and steps[-1] == 1000
    ratios = [b / a for a, b in itertools.pairwise(steps)]
    assert max(ratios) / min(ratios) < 1.1
    assert sample_steps(1000, 0) == set() and sample_steps(5, 1) == {5}


def test_bars_mark_chance_and_survive_ascii():
    assert fmt.skill_bar(1.0, 0.25, 8) == "██│█████"
    assert fmt.skill_bar(0.5, 0.25, 8, unicode=False) == "##|#...."
    assert len(fmt.bar(0.37, 20)) == 20 and fmt.bar(1.0, 10) == "━" * 10
    assert fmt.sparkline([5, 4, 3, 2, 1])[0] == "▇" and fmt.sparkline([1]) == ""


def test_the_average_is_unbiased_from_its_first_value():
    ema = Ema(0.9)
    assert ema.update(1, 4.0) == pytest.approx(4.0)
    assert ema.update(2, 2.0) == pytest.approx((0.9 * 0.1 * 4 + 0.1 * 2) / (0.9 * 0.1 + 0.1))


def test_a_trend_needs_more_than_noise():
    falling, flat = Ema(), Ema()
    for i in range(50):
        falling.update(i, 5 - 0.1 * i)
        flat.update(i, 3 + 0.5 * (-1) ** i)
    assert falling.trend(50) == "↘" and flat.trend(50) == "→"


def row(**kwargs):
    base = {"step": 10, "loss": 4.2, "val": 4.1, "val_is_best": True, "lr": 2e-3, "grad": 0.5}
    return Row(**{**base, "tokens_per_s": 12_400.0, "memory_bytes": 900_000_000, **kwargs})


def test_without_a_terminal_lines_are_plain_and_fit():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.header(with_mfu=False)
    console.row(row())
    console.sample("Once", " \x1b[31mred\x07 and more words " * 30)
    text = stream.getvalue()
    assert "\x1b" not in text and "\x07" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "4.200" in text and "4.100*" in text and "12.4k" in text and "2e-3" in text
    assert sum("red" in line for line in text.splitlines()) <= 3


def test_quiet_prints_warnings_and_the_summary_only():
    stream = io.StringIO()
    console = Console(stream=stream, quiet=True)
    console.banner("1")
    console.row(row())
    console.warn("careful")
    console.block("done", ["all"])
    assert stream.getvalue() == " ! careful\n done     all\n"


def test_an_ascii_stream_gets_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(stream=stream)
    console.sample("Once", " caf\u00e9")
    console.row(row(trend="↘"))
    stream.flush()
    assert raw.getvalue().decode("ascii")


def test_the_plot_is_drawn_from_rows_and_needs_two(tmp_path):
    rows = [{"step": s, "loss": 5 / s, "val_loss": 5 / s + 0.1} for s in range(1, 20)]
    path = loss_plot(rows, tmp_path / "p" / "loss.png", title="x", floor=0.2)
    assert path is not None and path.read_bytes()[:4] == b"\x89PNG"
    assert loss_plot(rows[:1], tmp_path / "q.png", title="x") is None


def test_a_trend_costs_the_same_late_in_a_long_run():
    """Each average is looked at once: the last tenth of the run is all that is kept."""
    ema = Ema()
    for step in range(1, 20_001):
        ema.update(step, 5 - step / 5000)
        assert ema.trend(20_000) in ("", "→", "↘")
    assert len(ema._history) <= 2002


def test_a_reason_that_is_too_long_goes_on_below_itself():
    out = io.StringIO()
    draft = Draft()
    why = "fits: forecast 0.4 of 20.2 GB; about 3,072 tokens a step"
    draft.set("train.micro_batch_size", 12, Source("auto", reason=why))
    Console(stream=out).decided(draft)
    lines = out.getvalue().splitlines()
    at = next(i for i, line in enumerate(lines) if "micro_batch_size" in line)
    assert all(len(line) <= 80 for line in lines[: at + 2])
    column = lines[at].index("fits:")
    assert lines[at + 1][:column].isspace()
    assert f"{lines[at][column:]} {lines[at + 1].strip()}" == why


def test_hanging_text_cuts_no_word():
    assert fmt.hanging("ab  ", "one", 80) == ["ab  one"]
    path = "checkpoints/" + "x" * 40
    assert fmt.hanging(" " * 10, f"see {path} there", 40) == [
        " " * 10 + "see",
        " " * 10 + path,
        " " * 10 + "there",
    ]
