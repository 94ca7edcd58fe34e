"""Word lists and facts of the story corpus, read once from ``words/*.txt``.

The files are plain text: ``[section]`` headers, then words separated by spaces or rows of
fields separated by ``|``. Relations (which animal eats what, which tool fits which
obstacle) are the same in every story: that is what a larger model can know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

__all__ = ["Lexicon", "Thing", "article", "load_lexicon"]

WORDS_DIR = Path(__file__).parent / "words"

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

MATERIALS = frozenset(
    "glass paper wooden brass tin woolen velvet cotton felt leather silk clay china iron "
    "linen straw stone copper steel".split()
)
"""Attributes that stand after the colour ("a red tin drum"), not before it."""

COLOURS_PER_THING = 8


@dataclass(frozen=True)
class Thing:
    """A kind of thing."""

    noun: str
    """Singular noun, one word."""
    tags: frozenset[str]
    """What plots may do with it: lose, play, make, brk, trade, sell, carry, light ..."""
    colours: tuple[str, ...]
    """Its typical colours."""
    attributes: tuple[str, ...]
    """Its typical sizes, states and materials."""


@dataclass(frozen=True)
class Lexicon:
    """All words and facts."""

    girls: tuple[str, ...]
    """Girls' names."""
    boys: tuple[str, ...]
    """Boys' names, as many as girls'."""
    things: tuple[Thing, ...]
    """Every kind of thing, commonest first."""
    rows: Mapping[str, tuple[tuple[str, ...], ...]]
    """Facts by section, commonest first: tuples of fields (one field for plain lists)."""

    def things_tagged(self, tag: str) -> tuple[Thing, ...]:
        """List the things with a tag, in file order.

        Args:
            tag: a tag of ``words/things.txt``.

        Returns:
            The matching things.
        """
        return tuple(thing for thing in self.things if tag in thing.tags)


def article(word: str) -> str:
    """Put the right indefinite article before a word.

    Args:
        word: a lower-case word or phrase; the lists hold no silent h and no "u" said "you".

    Returns:
        "a word" or "an word".
    """
    return ("an " if word[0] in "aeiou" else "a ") + word


def _sections(path: Path) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("["):
            lines = result.setdefault(line.strip("[]"), [])
        elif line.strip():
            lines.append(line)
    return result


def _parse_things(path: Path) -> tuple[Thing, ...]:
    palettes: dict[str, list[str]] = {}
    things: list[tuple[int, Thing]] = []
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("="):
            name, *colours = line[1:].split()
            palettes[name] = colours
            continue
        tags, palette, attributes, nouns = (field.split() for field in line.split("|"))
        colours = palettes[palette[0]]
        for rank, noun in enumerate(nouns):
            start = sum(ord(c) * (i + 1) for i, c in enumerate(noun))
            stride = 1 if len(colours) % 5 == 0 else 5
            count = min(COLOURS_PER_THING, len(colours))
            chosen = tuple(colours[(start + i * stride) % len(colours)] for i in range(count))
            things.append((rank, Thing(noun, frozenset(tags), chosen, tuple(attributes))))
    # The first of every line are the common ones.
    return tuple(thing for _, thing in sorted(things, key=lambda pair: pair[0]))


@lru_cache(maxsize=1)
def load_lexicon() -> Lexicon:
    """Read the word lists (once per process).

    Returns:
        The lexicon.
    """
    rows: dict[str, tuple[tuple[str, ...], ...]] = {}
    for name in ("living.txt", "facts.txt", "small.txt"):
        for section, lines in _sections(WORDS_DIR / name).items():
            if section == "time":
                fields = [(f,) for line in lines for f in line.split("|")]
            elif "|" in lines[0]:
                fields = [tuple(line.split("|")) for line in lines]  # type: ignore[misc]
            else:
                fields = [(word,) for line in lines for word in line.split()]
            rows[section] = tuple(fields)
    names = _sections(WORDS_DIR / "names.txt")
    girls, boys = (" ".join(names[kind]).split() for kind in ("girls", "boys"))
    size = min(len(girls), len(boys), 120)
    return Lexicon(
        tuple(girls[:size]), tuple(boys[:size]), _parse_things(WORDS_DIR / "things.txt"), rows
    )
