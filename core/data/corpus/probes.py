"""The exam: questions whose answer the story so far fully determines.

A probe is a story's beginning up to a word that must be one already told (a name, a colour,
an owner, a cause, a tool), follow from arithmetic (a count) or from a gender (a pronoun).
A model passes it when it finds the answer likelier than every distractor. Stories come from
the validation and held-out splits only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from core.data.corpus.lexicon import NUMBER_WORDS, load_lexicon
from core.data.corpus.rng import mix64
from core.data.corpus.story import VALIDATION_PERIOD, Mark, story_with_marks
from core.data.corpus.world import PREFIXES, World

__all__ = ["SKILLS", "Probe", "chance", "probes"]

SKILLS = ("name", "colour", "owner", "count", "cause", "pronoun", "tool", "speaker")
"""Skills the exam asks for, in report order."""

_WORD = re.compile("[A-Za-z]+")
_NUM_DISTRACTORS = {"pronoun": 1, "speaker": 1}
_DEFAULT_DISTRACTORS = 3

_OTHER_PRONOUN = {
    "he": "she",
    "she": "he",
    "him": "her",
    "his": "her",
    "himself": "herself",
    "herself": "himself",
}
_PEOPLE = ("A", "B", "C", "D", "G")


@dataclass(frozen=True)
class Probe:
    """One question."""

    context: str
    """A story's beginning, up to the space before the answer."""
    answer: str
    """The word that continues it, with its leading space."""
    distractors: tuple[str, ...]
    """Wrong continuations of the same kind, each with a leading space."""
    skill: str
    """One of SKILLS."""


def chance(skill: str) -> float:
    """Give the score of blind guessing.

    Args:
        skill: one of SKILLS.

    Returns:
        1 / (1 + number of distractors).

    Raises:
        ValueError: for an unknown skill.
    """
    if skill not in SKILLS:
        raise ValueError(f"skill={skill!r} is not one of {', '.join(SKILLS)}.")
    return 1 / (1 + _NUM_DISTRACTORS.get(skill, _DEFAULT_DISTRACTORS))


def _pick(candidates: Sequence[str], answer: str, wanted: int) -> tuple[str, ...]:
    chosen: list[str] = []
    for word in candidates:
        if word and word != answer and " " not in word and word not in chosen:
            chosen.append(word)
            if len(chosen) == wanted:
                break
    return tuple(chosen)


def _shuffled(words: Sequence[str], code: int) -> list[str]:
    keyed = [(mix64(code + i), word) for i, word in enumerate(words)]
    return [word for _, word in sorted(keyed)]


def _names(world: World, told: str, code: int) -> list[str]:
    lexicon = load_lexicon()
    people = [world[p] for p in _PEOPLE if p in world and world[p] in told]
    return people + _shuffled(lexicon.girls + lexicon.boys, code)


def _candidates(mark: Mark, world: World, told: str, code: int) -> list[str]:
    """List wrong words of the answer's kind, those of the same story first."""
    key = mark.key
    if mark.skill == "pronoun":
        if key.endswith(("his", "His")):
            return ["her" if mark.answer == "his" else "his"]
        if key.endswith(("him", "Him")):
            return ["her" if mark.answer == "him" else "him"]
        other = _OTHER_PRONOUN[mark.answer.lower()]
        return [other if mark.answer.islower() else other.capitalize()]
    if key in _PEOPLE:
        return _names(world, told, code)
    if mark.skill == "count":
        near = [world[k] for k in ("q", "x", "qmx", "y", "z") if k in world]
        value = NUMBER_WORDS.index(mark.answer)
        return near + [NUMBER_WORDS[n] for n in (value + 1, value - 1, value + 2, value - 2) if n]
    if mark.skill == "colour":
        own = [world[k] for k in ("tc", "uc", "vc", "ec", "dc", "sc") if k in world]
        thing = world.things.get(key[0])
        kinds = thing.colours if thing else ("red", "blue", "green", "yellow", "white")
        return [c for c in own if c in told] + _shuffled(kinds, code)
    if key in world.things:
        own = [thing.noun for thing in world.things.values() if thing.noun in told]
        return own + _shuffled([thing.noun for thing in load_lexicon().things], code)
    prefix = key.rstrip("0123456789")
    field = int(key[len(prefix) :] or 0)
    rows = load_lexicon().rows[PREFIXES[prefix]]
    return _shuffled([row[field] for row in rows], code)


def _probe(text: str, mark: Mark, world: World, code: int) -> Probe | None:
    told = text[: mark.offset]
    if not told.endswith(" ") or " " in mark.answer:
        return None
    words = set(_WORD.findall(told))
    if mark.skill not in ("count", "pronoun") and mark.answer not in words:
        return None
    if mark.skill == "count" and "q" not in world:
        return None
    wanted = _NUM_DISTRACTORS.get(mark.skill, _DEFAULT_DISTRACTORS)
    chosen = _pick(_candidates(mark, world, told, code), mark.answer, wanted)
    if len(chosen) < wanted:
        return None
    others = tuple(" " + word for word in chosen)
    return Probe(told[:-1], " " + mark.answer, others, mark.skill)


def probes(n: int, seed: int) -> list[Probe]:
    """Make an exam.

    Args:
        n: number of questions, >= 0, spread over the skills as evenly as possible.
        seed: corpus seed; stories of its validation and held-out splits are asked about.

    Returns:
        The questions, at most one of a skill per story, in a fixed order.
    """
    quota = {skill: n // len(SKILLS) + (i < n % len(SKILLS)) for i, skill in enumerate(SKILLS)}
    found: list[Probe] = []
    turn = 0
    while any(quota.values()):
        index = turn // 2 * VALIDATION_PERIOD + VALIDATION_PERIOD - 1
        made, marks, world = story_with_marks(index, seed, held_out=turn % 2 == 1)
        turn += 1
        asked: set[str] = set()
        order = sorted(marks, key=lambda mark: mix64(seed * 1_000_003 + index + mark.offset))
        for mark in order:
            if quota[mark.skill] and mark.skill not in asked:
                probe = _probe(made.text, mark, world, mix64(index) + mark.offset)
                if probe is not None:
                    asked.add(mark.skill)
                    quota[mark.skill] -= 1
                    found.append(probe)
    return found
