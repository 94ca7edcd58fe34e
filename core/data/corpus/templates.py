"""Templates of the story corpus, read once from ``plots/*.txt``.

File format: ``@@ name T=tag U=tag`` starts a script (``long=yes``: no room for scenery); ``-- beat`` starts a beat (``-- beat plain``:
left out of nested and framed stories); ``-- +beat`` inserts a shared beat; ``-- nest`` and
``-- pay`` say where a nested second plot and its consequence go. Each line below a beat is
one rendering. Inside a rendering ``{key}`` is a slot of the world, ``[a|b|c]`` a free choice
of words, and ``{key*}`` or ``{key*x}`` a slot whose value the story so far determines: the
exam may ask for it (skill by key, or o owner, c cause, t tool, s speaker).
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

SYNONYMS: Mapping[str, str] = {
    "say": "said|said|said|called|cried|declared|whispered|replied|added|murmured|remarked"
    "|announced|explained|exclaimed|muttered|insisted|repeated|observed|responded|answered|sighed"
    "|stated|breathed|confided|commented|mumbled|argued",
    "ask": "asked|asked|asked|wondered|inquired|demanded",
    "run": "ran|hurried|raced|dashed|rushed|sped|darted|scurried|bustled|scampered|bolted|trotted",
    "went": "went|walked|hurried|headed|strolled|marched|wandered|trudged|skipped|ambled|strode|hiked",
    "began": "began|started",
    "was": "was|felt|looked|seemed|grew|became|appeared",
    "wanted": "wanted|hoped|wished|planned",
    "found": "found|discovered|spotted",
    "saw": "saw|noticed|spotted",
    "gave": "gave|handed",
    "met": "met|saw",
    "many": "many|several|seven|ten|twenty|countless|forty|fifty",
    "well": "well|soundly|deeply|late|peacefully|calmly|sweetly|long",
    "truly": "true|good|great|real|dear|fine|loyal|rare",
    "kindly": "kind|good|clever|helpful|sweet|brave|nice|gentle|smart|wise|lovely|noble",
    "smiled": "smiled|beamed|grinned|winked|laughed|nodded|blushed|chuckled|giggled|bowed",
    "sang": "laughed|danced|sang|cheered|giggled|hummed|skipped|whistled|chatted|joked",
    "looked": "looked|searched|peeked|checked|hunted|peered|rummaged|felt",
    "mended": "glued|fixed|joined|mended|repaired|patched",
    "near": "near|close to|not far from|next to|beside|behind|beyond|opposite",
    "daily": "every day|each day|every week|each morning|every Sunday|every Monday|each evening|every month|all summer|each spring",
    "Soon": "Soon|Before long|After a while|Later|Much later|A bit later|In the end|Little by little",
    "Then": "Then|Suddenly|At that moment|Just then|All at once|Right then|That minute|Now",
    "That_night": "That night|That evening|Later that day|The same evening|After dark|At bedtime|Late that night|Before bed",
    "From_then": "From then on|After that|Since then|From that day on|Ever after|Ever since",
    "On_way": "On the way|Along the way|On the road|Not far away|Halfway there|On the path|Nearby|Around the corner",
}
"""Words that may stand for each other, equally likely; a repeated word is likelier."""

_TOKEN = re.compile(r"\{([^{}*]+)(\*[octs]?)?\}|\[([^\]]*)\]")
_SYNONYM = re.compile("{(" + "|".join(SYNONYMS) + ")}")
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
    """Free word choices by key ("~3"): words and the micro-bits a repeated word gives back."""


@dataclass
class _Parser:
    pools: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    pool_keys: dict[tuple[str, ...], str] = field(default_factory=dict)
    shared: dict[str, Beat] = field(default_factory=dict)

    def template(self, line: str) -> Template:
        line = _SYNONYM.sub(lambda found: f"[{SYNONYMS[found.group(1)]}]", line)
        pieces: list[tuple[str, str, str]] = []
        end = 0
        for match in _TOKEN.finditer(line):
            key, star, words = match.groups()
            if words is not None:
                choices = tuple(words.split("|"))
                key = self.pool_keys.setdefault(choices, f"~{len(self.pool_keys)}")
                self.pools[key] = tuple((word, MICRO_BITS[choices.count(word)]) for word in choices)
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
    parser = _Parser()
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
