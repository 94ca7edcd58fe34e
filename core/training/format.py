"""How numbers, durations and bars are written in the terminal and in reports. Pure functions."""

import math
import textwrap
from collections.abc import Sequence

_ASCII = {
    "━": "=",
    "╸": "-",
    "·": "-",
    "↘": "v",
    "↗": "^",
    "→": ">",
    "┆": "|",
    "…": "...",
    "█": "#",
    "░": ".",
    "│": "|",
    "▁": "_",
    "▂": "_",
    "▃": ".",
    "▄": "-",
    "▅": "-",
    "▆": "=",
    "▇": "=",
}
SEPARATOR = " · "
_KEPT = "\x00"  # stands for a space at which a line must not be broken
_SPARKS = "▁▂▃▄▅▆▇"


def to_ascii(text: str) -> str:
    """The text with our own symbols replaced; other characters become '?'."""
    for symbol, plain in _ASCII.items():
        text = text.replace(symbol, plain)
    return text.encode("ascii", "replace").decode()


def number(value: float, digits: int = 4) -> str:
    """A number with up to `digits` significant digits and no exponent where it can be read."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 6 or magnitude < -4:
        return f"{value:.{max(digits - 2, 0)}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def si(value: float) -> str:
    """12400 -> 12.4k, to three digits from a hundred on."""
    if not math.isfinite(value):
        return f"{value:.0f}"
    # The unit is that of the rounded number: 999_999 is 1.0M, not 1000k.
    scales = ((1.0, ""), (1e3, "k"), (1e6, "M"))
    scale, unit = next((s for s in scales if abs(value) / s[0] < 999.5), (1e9, "G"))
    size = value / scale
    return f"{size:.{1 if unit and abs(size) < 99.95 else 0}f}{unit}"


def parameters(total: int, active: int) -> str:
    """Size of a model, and of what a token uses of it where that is less."""
    part = f" ({si(active)} active)" if active < total else ""
    return f"{si(total)} parameters{part}"


def gigabytes(num_bytes: float) -> str:
    """Bytes in GB (10^9), or MB below a tenth."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """A rounded duration: 12 s, 2 m, 1 h 20 m, 3 d 4 h."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} m"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} m" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def exact_duration(seconds: float) -> str:
    """A measured duration: 41.2 s, 3 m 41 s, 2 h 5 m."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} m"


def value(item: object) -> str:
    """A configuration value for the table."""
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, float):
        return f"{item:g}"
    if isinstance(item, int):
        return f"{item:,}"
    return str(item)


def one_line(text: str) -> str:
    """The text on one line, its gaps as single spaces."""
    return " ".join(text.split())


def cut(text: str, width: int) -> str:
    """The text, cut to a width with an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"


def cut_left(text: str, width: int) -> str:
    """The end of the text, with an ellipsis before it where it is too long."""
    return text if len(text) <= width else "…" + text[1 - width :]


def hanging(left: str, text: str, width: int) -> list[str]:
    """Left text and a longer one beside it, on as many lines as it takes; no word is cut.

    What stands between two separators stays together where it fits on a line.
    """
    room = max(width - len(left), 20)
    parts = text.split(SEPARATOR)
    for i, part in enumerate(parts):
        end = "" if i == len(parts) - 1 else SEPARATOR.rstrip()
        whole = part + end
        parts[i] = whole.replace(" ", _KEPT) if len(whole) <= room else whole
    lines = textwrap.wrap(" ".join(parts), room, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace(_KEPT, " ") for line in lines] or [""]
    return [(left + lines[0]).rstrip(), *(" " * len(left) + line for line in lines[1:])]


def two_sided(left: str, right: str, width: int) -> str:
    """Left text and right-aligned text on one line, where they fit."""
    space = width - len(left) - len(right)
    return left + " " * max(space, 2) + right if right else left


def bar(share: float, width: int) -> str:
    """A progress bar."""
    width = max(width, 4)
    full = int(min(max(share, 0.0), 1.0) * width)
    return "━" * full + ("╸" if full < width else "") + " " * (width - full - 1)


def skill_bar(share: float, chance: float, width: int, *, unicode: bool = True) -> str:
    """A bar of what was right, with a mark where guessing would be."""
    cells = ["█" if (i + 0.5) / width <= share else "░" for i in range(width)]
    cells[min(int(chance * width), width - 1)] = "│"
    text = "".join(cells)
    return text if unicode else to_ascii(text)


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """The course of a series in `width` characters."""
    series = [v for v in values if math.isfinite(v)]
    if len(series) < 2:
        return ""
    picked = [series[round(i * (len(series) - 1) / (width - 1))] for i in range(width)]
    low, high = min(picked), max(picked)
    span = high - low or 1.0
    return "".join(_SPARKS[int((v - low) / span * (len(_SPARKS) - 1))] for v in picked)
