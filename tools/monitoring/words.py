"""Sizes and times as the monitor writes them."""

GB = 1e9


def gigabytes(value: float) -> str:
    """Bytes as GB of 10^9, three digits."""
    gb = value / GB
    return f"{gb:.0f} GB" if gb >= 100 else f"{gb:.1f} GB" if gb >= 10 else f"{gb:.2f} GB"


def duration(seconds: float) -> str:
    """A rounded duration."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
