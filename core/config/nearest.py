"""The name that somebody meant: the keys with the fewest typing errors between."""

import difflib
from collections.abc import Iterable, Sequence

MAX_LENGTH = 80


def typing_errors(a: str, b: str, *, limit: int = 10**9) -> int:
    """Letters left out, added, changed or swapped with their neighbour between two names.

    Optimal string alignment distance (Damerau, 1964, without a letter being touched twice).

    Args:
        a: One name.
        b: The other.
        limit: Where there are more, some number above it is returned, sooner.
    """
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            cost = min(row[j] + 1, new[j - 1] + 1, row[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            new.append(cost)
        before, row = row, new
        if min(row) > limit and min(before) > limit:
            return limit + 1
    return row[-1]


def nearest_names(
    name: str, names: Iterable[str], *, limit: int = 3, share: float = 0.5
) -> list[str]:
    """The names with the fewest typing errors from `name`, all that have as few; may be empty.

    Where a third of the letters or more differ, the one that shares most with it, if any does.

    Args:
        name: What was typed.
        names: What is known.
        limit: Names at most.
        share: The least share of letters in common, of a name that differs in a third of them; 1 is
            none of those.
    """
    known = list(names)
    if len(name) > MAX_LENGTH:
        return []
    least = (len(name) - 1) // 3
    nearest: list[str] = []
    for k in sorted(known, key=lambda k: abs(len(k) - len(name))):
        errors = typing_errors(name, k, limit=least)
        if errors < least:
            least, nearest = errors, []
        if errors == least:
            nearest.append(k)
    if nearest:
        return [k for k in known if k in nearest][:limit]
    return difflib.get_close_matches(name, known, n=1, cutoff=share)


def did_you_mean(names: Sequence[str]) -> str:
    """`; did you mean a or b?`, or nothing but a full stop."""
    return f"; did you mean {' or '.join(names)}?" if names else "."
