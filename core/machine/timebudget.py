"""`--time-budget`: "90s", "30m", "2h", "1h30m" as minutes, and as the length of a run."""

import math
import re

from core.config.draft import AUTO, Draft, Source
from core.errors import PippinError
from core.machine.depth import LENGTH, is_given, is_stated

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


def apply_time_budget(draft: Draft, text: str) -> tuple[str, ...]:
    """Let the time decide the length: what a file or preset states of it gives way.

    Args:
        draft: Changed in place: loaded with the minutes of `text` as a flag.
        text: The time, as it was typed.

    Returns:
        What of the file gives way, a line or none.

    Raises:
        PippinError: P012 where the command line gives another time or a number of steps besides.
    """
    flag = f"--time-budget {text}"
    minutes, steps = draft.sources["train.minutes"], draft.sources["train.total_steps"]
    if draft.values["train.minutes"] != parse_minutes(text):
        raise _two(flag, minutes.where, "are two times", f"{parse_minutes(text):g} minutes")
    if is_given(draft, "train.total_steps"):
        what = "both give the length of the run"
        raise _two(flag, steps.where, what, "as many steps as the time allows")
    draft.set("train.minutes", draft.values["train.minutes"], Source("flag", flag))
    given_way = {n: draft.values[n] for n in LENGTH if is_stated(draft, n)}
    for name in given_way:
        draft.set(name, AUTO, Source("default"))
    if not given_way:
        return ()
    stated = ", ".join(f"{name} = {value:,}" for name, value in given_way.items())
    return (f"{flag} decides the length, whatever the file says: {stated}",)


def _two(flag: str, other: str, what: str, means: str) -> PippinError:
    return PippinError(
        "P012",
        f"{flag} and {other} {what}.",
        found=f"{flag}: {means}\n{other}",
        remedy="leave out one of them",
        kept="nothing was started.",
    )
