"""`--time-budget`: "90s", "30m", "2h", "1h30m" as minutes."""

import math
import re

from core.errors import PippinError

_UNIT_MINUTES = {"d": 1440.0, "h": 60.0, "m": 1.0, "s": 1 / 60}
_PARTS = re.compile(
    r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?"
)
# Below this, starting and measuring take longer than training; above, the schema ends.
MIN_MINUTES, MAX_MINUTES = 0.25, 100_000.0


def parse_minutes(text: str) -> float:
    """Minutes of a time with its units, the largest first: "1h30m" is 90.

    Raises:
        PippinError: P012 for anything else, a bare number included, and for a time that is no budget.
    """
    short = text.strip().lower().replace(" ", "")
    found = _PARTS.fullmatch(short) if short and len(short) <= 40 else None
    if found is None:
        bare = re.fullmatch(r"\d+(\.\d+)?", short[:40])
        hint = (
            f"--time-budget {short}m is {short} minutes"
            if bare
            else "for example 90s, 30m, 2h, 1h30m"
        )
        raise PippinError(
            "P012",
            f"--time-budget {text[:40]!r} is no time.",
            found=f"a time is whole or decimal numbers with d, h, m or s, the largest first; {hint}",
            remedy="python train.py --time-budget 30m",
        )
    minutes = sum(float(n) * unit for n, unit in zip(found.groups(), _UNIT_MINUTES.values()) if n)
    if not (MIN_MINUTES <= minutes <= MAX_MINUTES and math.isfinite(minutes)):
        raise PippinError(
            "P012",
            f"--time-budget {text[:40]} is {minutes:,.4g} minutes; it must be 15s to "
            f"{MAX_MINUTES / 1440:.0f}d.",
            remedy="python train.py --time-budget 30m",
        )
    return round(minutes, 6)
