"""What readable text lies near a path that has none, for error messages."""

import difflib
import os
from pathlib import Path

FILE_KINDS = (".txt", ".md", ".jsonl", ".ndjson")
JSON_LINES = (".jsonl", ".ndjson")

_MAX_LOOKED_AT = 2_000


def nearby_text(path: Path, count: int = 5) -> tuple[str, ...]:
    """Text files near a path, those with the most similar name first.

    Looks into the nearest folder that exists and two levels below it; never for long.
    """
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():
        folder = folder.parent
    candidates = _text_below(folder)
    if not candidates and folder != folder.parent:
        candidates = _text_below(folder.parent)
    similarity = {
        c: difflib.SequenceMatcher(None, c.name.lower(), path.name.lower()).ratio()
        for c in candidates
    }
    best = sorted(candidates, key=lambda c: (-similarity[c], c.as_posix()))
    return tuple(c.as_posix() for c in best[:count])


def _text_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    looked_at = 0
    depth = len(folder.parts)
    for where, names, files in os.walk(folder):
        deep = len(Path(where).parts) - depth >= 2
        names[:] = [] if deep else sorted(n for n in names if not n.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(FILE_KINDS):
                found.append(Path(where) / name)
        looked_at += len(files) + len(names)
        if looked_at > _MAX_LOOKED_AT:
            break
    return found
