"""Templates of the story corpus, read once from ``plots/*.txt``.

File format: ``@@ name T=tag U=tag`` starts a script (``long=yes``: no room for scenery);
``-- beat`` starts a beat (``-- beat plain``: left out of nested and framed stories, and two
times in three of the others); ``-- +beat`` inserts a shared beat; ``-- nest`` and ``-- pay``
say where a nested second plot and its consequence go. Each line below a beat is one
rendering. Inside a rendering ``{key}`` is a slot of the world or a list of
``words/choices.txt`` (``{toA}``, ``{toB}``: ", Mia", who is spoken to, half of the time),
``[a|b|c]`` a free choice of words (equally likely; a repeated word is likelier), and
``{key*}`` or ``{key*x}`` a slot whose value the story so far determines: the exam may ask for
it (skill by key, or o owner, c cause, t tool, s speaker).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from core.data.corpus.rng import MICRO_BITS

__all__ = ["Beat", "Script", "Scripts", "Template", "load_scripts"]

PLOTS_DIR = Path(__file__).parent / "plots"
CHOICES_FILE = Path(__file__).parent / "words" / "choices.txt"

_TOKEN = re.compile(r"\{([^{}*]+)(\*[octs]?)?\}|\[([^\]]*)\]")
_SYNONYM = re.compile("{([A-Za-z_]+)}")
_SKILL_LETTERS = {"o": "owner", "c": "cause", "t": "tool", "s": "speaker"}
_PRONOUNS = frozenset(
    prefix + word
    for prefix in ("", "b", "c", "d", "g", "B", "C", "G")
    for word in ("he", "him", "his", "self", "He", "His")
)


@dataclass(frozen=True)
class Template:
    """One rendering of a beat."""

    fast: str
    """Text for ``str.format_map``."""
    pieces: tuple[tuple[str, str, str], ...]
    """(literal before, key, skill or ""), ending with (literal, "", "")."""


@dataclass(frozen=True)
class Beat:
    """One step of a plot."""

    name: str
    """Its name, for messages."""
    plain_only: bool
    """Left out of nested and framed stories, which are long enough."""
    templates: tuple[Template, ...]
    """Its renderings, equally likely; empty for the markers nest and pay."""


@dataclass(frozen=True)
class Script:
    """A plot."""

    name: str
    """Its name."""
    number: int
    """Its place in file order."""
    options: Mapping[str, str]
    """Thing tags: T, U (V follows U); long."""
    beats: tuple[Beat, ...]
    """Its beats in order."""


@dataclass(frozen=True)
class Scripts:
    """Everything the renderer needs."""

    plots: tuple[Script, ...]
    """The 24 plots."""
    talks: tuple[Script, ...]
    """Scenes of speech only."""
    subs: tuple[Script, ...]
    """Small plots nested in others: beats part and pay."""
    shared: Mapping[str, Beat]
    """Shared beats by name."""
    pools: Mapping[str, tuple[tuple[str, int], ...]]
    """Free word choices by key ("~3"): words, each with the micro-bits of drawing it."""


@dataclass
class _Parser:
    pools: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    pool_keys: dict[tuple[str, ...], str] = field(default_factory=dict)
    shared: dict[str, Beat] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)

    def _choice(self, found: re.Match[str]) -> str:
        words = self.choices.get(found.group(1))
        return f"[{words}]" if words else found.group()

    def template(self, line: str) -> Template:
        line = _SYNONYM.sub(self._choice, line)
        pieces: list[tuple[str, str, str]] = []
        end = 0
        for match in _TOKEN.finditer(line):
            key, star, words = match.groups()
            if words is not None:
                choices = tuple(words.split("|"))
                key = self.pool_keys.setdefault(choices, f"~{len(self.pool_keys)}")
                self.pools[key] = tuple(
                    (word, MICRO_BITS[len(choices)] - MICRO_BITS[choices.count(word)])
                    for word in choices
                )
            skill = _skill(key, star) if star else ""
            pieces.append((line[end : match.start()], key, skill))
            end = match.end()
        fast = "".join(f"{literal}{{{key}}}" for literal, key, _ in pieces) + line[end:]
        return Template(fast, (*pieces, (line[end:], "", "")))

    def script(self, block: str, number: int) -> Script:
        header, *parts = block.split("\n-- ")
        name, *words = header.split()
        options = dict(word.split("=") for word in words)
        beats: list[Beat] = []
        for part in parts:
            head, *lines = part.strip().split("\n")
            beat_name, *rest = head.split()
            plain_only = bool(rest)
            if beat_name.startswith("+"):
                shared = self.shared[beat_name[1:]]
                beats.append(Beat(shared.name, plain_only, shared.templates))
            else:
                templates = tuple(self.template(line) for line in lines)
                beats.append(Beat(beat_name, plain_only, templates))
        return Script(name, number, options, tuple(beats))


def _skill(key: str, star: str) -> str:
    if len(star) == 2:
        return _SKILL_LETTERS[star[1]]
    if key in ("A", "B", "C", "D", "G"):
        return "name"
    if key in _PRONOUNS:
        return "pronoun"
    if key in ("q", "x", "y", "z", "qmx"):
        return "count"
    return "colour"


@lru_cache(maxsize=1)
def load_scripts() -> Scripts:
    """Read and compile the templates (once per process).

    Returns:
        The compiled scripts.
    """
    lines = CHOICES_FILE.read_text(encoding="ascii").splitlines()
    parser = _Parser(choices=dict(line.split(" ", 1) for line in lines))
    plots: list[Script] = []
    talks: list[Script] = []
    subs: list[Script] = []
    for name in ("shared.txt", "first.txt", "second.txt", "third.txt", "talks.txt"):
        text = (PLOTS_DIR / name).read_text(encoding="ascii")
        for block in text.split("@@ ")[1:]:
            script = parser.script(block.strip(), len(plots) + len(talks))
            if script.name == "shared":
                parser.shared.update({beat.name: beat for beat in script.beats})
            elif script.name.startswith("sub_"):
                subs.append(script)
            else:
                (talks if name == "talks.txt" else plots).append(script)
    return Scripts(tuple(plots), tuple(talks), tuple(subs), parser.shared, parser.pools)
