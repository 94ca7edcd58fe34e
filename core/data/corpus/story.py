"""Stories: plain text rendered from a world, one independent document per index.

Story ``index`` of ``seed`` depends on nothing else, so any number of bytes is a prefix of a
longer corpus. Two per cent of the indices are validation documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from core.data.corpus.lexicon import load_lexicon
from core.data.corpus.rng import stream_integer
from core.data.corpus.templates import Beat, Script, Template, load_scripts
from core.data.corpus.world import World

__all__ = [
    "SPLITS",
    "VERSION",
    "Mark",
    "Story",
    "Summary",
    "split_of",
    "stories",
    "story",
    "story_with_marks",
    "summary",
]

VERSION = "8"
"""Changes whenever any story changes; part of cache keys."""

SPLITS = ("train", "val", "held_out")
"""Names of the splits."""

VALIDATION_PERIOD = 50
_HELD_OUT_SALT = 1


@dataclass(frozen=True)
class Story:
    """One document."""

    text: str
    """The story, one paragraph, ASCII, no newline."""
    plot: str
    """Name of the plot."""
    entropy_bits: float
    """Bits drawn to make it, -log2 of the probability of its draws."""
    index: int
    """Story index within the seed."""
    seed: int
    """Corpus seed."""
    split: str
    """train, val or held_out."""


@dataclass(frozen=True)
class Mark:
    """A place whose word the story so far determines."""

    offset: int
    """Character offset of the word in the text."""
    skill: str
    """Which skill predicts it."""
    key: str
    """The slot it renders."""
    answer: str
    """The word."""


@dataclass(frozen=True)
class Summary:
    """Figures over some stories."""

    num_stories: int
    """How many stories."""
    num_bytes: int
    """Their bytes together."""
    entropy_bits: float
    """Their drawn bits together."""
    entropy_bits_per_byte: float
    """Drawn bits per byte: the floor of any model's loss."""


LEAD_INS = (
    "Once ",
    "Long ago ",
    "One day ",
    "Years ago ",
    "Last spring ",
    "Last summer ",
    "Last autumn ",
    "Last winter ",
)
"""Beginnings for a story whose first sentence would start with a name."""


MAX_WORDS = 18
"""Words of the longest sentence: an opening that is nearly as long stays as it is."""


def split_of(index: int) -> str:
    """Name the split of a story index.

    Args:
        index: story index, >= 0.

    Returns:
        "val" for one index in 50, otherwise "train".
    """
    return "val" if index % VALIDATION_PERIOD == VALIDATION_PERIOD - 1 else "train"


def _choose_templates(world: World) -> Iterator[Template]:
    """Draw the story's plan and yield its renderings one by one.

    The caller renders each template before asking for the next, so slots and renderings are
    drawn in text order.
    """
    scripts = load_scripts()
    talk = world.chance(1, 10)
    pool = scripts.talks if talk else scripts.plots
    script = pool[world.draw(len(pool))]
    world.plot = script
    kind = 2 if talk else _kind(world)
    if kind == 0:
        yield _pick(world, scripts.shared["frame_open"])
    long = script.options.get("long") == "yes"
    sub: Script | None = None
    paid = False
    for number, beat in enumerate(script.beats):
        if number == 1 and kind == 2 and not (talk or long):
            yield _pick(world, scripts.shared["sky"])
        if beat.name == "nest":
            if kind == 1:
                paid = world.chance(1, 2)
                sub = scripts.subs[world.draw(len(scripts.subs))]
                yield _pick(world, sub.beats[0])
            if not paid and not (long and kind == 0):
                yield _pick(world, scripts.shared["wood"])
        elif beat.name == "pay":
            if sub is not None and paid:
                yield _pick(world, sub.beats[1])
        elif not beat.plain_only or (kind == 2 and world.chance(1, 3)):
            yield _pick(world, beat)
    if kind == 0:
        yield _pick(world, scripts.shared["frame_close"])


def _kind(world: World) -> int:
    """Draw 0 (told by a grandparent, 3 of 18), 1 (nested plot, 7 of 18) or 2 (plain)."""
    if world.chance(3, 18):
        return 0
    return 1 if world.chance(7, 15) else 2


def _pick(world: World, beat: Beat) -> Template:
    return beat.templates[world.draw(len(beat.templates))]


def _new_world(index: int, seed: int, held_out: bool) -> World:
    salt = _HELD_OUT_SALT if held_out else 0
    return World(stream_integer(seed, index, salt), held_out=held_out)


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    lexicon = load_lexicon()
    return frozenset(lexicon.girls + lexicon.boys)


def _lead_in(world: World, opening: str) -> str:
    """A beginning for an opening that would start with a name.

    Tokenizers write a word at the very start of a text otherwise than after a space, so a name's first
    mention would share no token with the others.
    """
    words = opening.partition(".")[0].split()
    if words[0].strip(",") not in _names() or len(words) > MAX_WORDS - 2:
        return ""
    return LEAD_INS[world.draw(len(LEAD_INS))]


def _finish(world: World, text: str, index: int, seed: int) -> Story:
    return Story(
        text=text,
        plot=world.plot.name if world.plot else "",
        entropy_bits=world.micro_bits / 1_000_000,
        index=index,
        seed=seed,
        split="held_out" if world.held_out else split_of(index),
    )


def story(index: int, seed: int, *, held_out: bool = False) -> Story:
    """Make one story.

    Args:
        index: story index, >= 0.
        seed: corpus seed.
        held_out: make the held-out story of this index, whose (name, thing, plot) triple
            occurs in no train or val story.

    Returns:
        The story.
    """
    world = _new_world(index, seed, held_out)
    parts: list[str] = []
    for template in _choose_templates(world):
        part = template.fast.format_map(world)
        parts.append(part if parts else _lead_in(world, part) + part)
    return _finish(world, " ".join(parts), index, seed)


def story_with_marks(
    index: int, seed: int, *, held_out: bool = False
) -> tuple[Story, tuple[Mark, ...], World]:
    """Make one story and say where its words are determined.

    Args:
        index: story index, >= 0.
        seed: corpus seed.
        held_out: as in ``story``.

    Returns:
        The same story as ``story`` makes, its marks in text order, and its world.
    """
    world = _new_world(index, seed, held_out)
    parts: list[str] = []
    marks: list[Mark] = []
    offset = 0
    for number, template in enumerate(_choose_templates(world)):
        if number:
            parts.append(" ")
            offset += 1
        for literal, key, skill in template.pieces:
            parts.append(literal)
            offset += len(literal)
            if key:
                value = world[key]
                if skill:
                    marks.append(Mark(offset, skill, key, value))
                parts.append(value)
                offset += len(value)
        if number == 0 and (lead := _lead_in(world, "".join(parts))):
            parts.insert(0, lead)
            offset += len(lead)
            marks = [replace(mark, offset=mark.offset + len(lead)) for mark in marks]
    return _finish(world, "".join(parts), index, seed), tuple(marks), world


def stories(num_bytes: int, seed: int, *, split: str | None = None) -> Iterator[Story]:
    """Make stories until they hold a number of bytes.

    Args:
        num_bytes: bytes wanted, > 0; the last story passes it and is not cut.
        seed: corpus seed.
        split: "train", "val", "held_out" or None for train and val in index order.

    Yields:
        Stories in index order; fewer bytes give a prefix.

    Raises:
        ValueError: for an unknown split.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    index = VALIDATION_PERIOD - 1 if split in ("val", "held_out") else 0
    step = VALIDATION_PERIOD if split in ("val", "held_out") else 1
    done = 0
    while done < num_bytes:
        if split != "train" or split_of(index) == "train":
            made = story(index, seed, held_out=split == "held_out")
            done += len(made.text)
            yield made
        index += step


def summary(made: Iterable[Story]) -> Summary:
    """Add up stories.

    Args:
        made: stories, for example from ``stories``.

    Returns:
        Their figures; zeros for none.
    """
    num_stories = num_bytes = micro_bits = 0
    for one in made:
        num_stories += 1
        num_bytes += len(one.text)
        micro_bits += round(one.entropy_bits * 1_000_000)
    bits = micro_bits / 1_000_000
    return Summary(num_stories, num_bytes, bits, bits / num_bytes if num_bytes else 0.0)
