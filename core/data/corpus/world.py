"""The world of one story: a mapping from slots to words, drawn on first use.

A slot is drawn when a sentence first asks for it and kept for the rest of the story, so a
choice costs entropy only if it reaches the text. Heroes A and B are a girl and a boy (in
either order), hence "he" and "she" are never ambiguous between them.

Held-out combinations: for each hero's name and plot, every 32nd kind of thing of the plot's
list, from a place that is a hash of name and plot, makes a triple that never occurs outside
the held-out split, and always inside it. When the drawn thing is on the wrong side, the next
thing of the list on the right side takes its place; the entropy counts the exact
probability of the thing that results.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache

from core.data.corpus.lexicon import MATERIALS, NUMBER_WORDS, Thing, article, load_lexicon
from core.data.corpus.rng import MICRO_BITS, WIDTH, mix64, rank_weights
from core.data.corpus.templates import Script, load_scripts

__all__ = ["PREFIXES", "World", "is_held_out"]

_MASK = (1 << WIDTH) - 1

HELD_OUT_PERIOD = 32

SCENERY = (
    "bird birdadj birdverb tree treeadj treeverb cloudadj cloudverb land windadj scent flower flowerverb "
    "belladj bell bellverb sunverb"
).split()
"""Sections of the words that paint a scene; the slots have their names."""

PREFIXES: Mapping[str, str] = {
    "an": "animal",
    "ana": "animaladj",
    "sw": "role",
    "sh": "hide",
    "sk": "countable",
    "strip": "trip",
    "dn": "pattern",
    "dc": "patterncolour",
    "n": "animal",
    "m": "animal",
    "o": "animal",
    "w": "role",
    "p": "place",
    "pp": "place",
    "h": "hide",
    "i": "hide",
    "j": "hide",
    "k": "countable",
    "f": "food",
    "g": "food",
    "ob": "obstacle",
    "we": "weather",
    "no": "noise",
    "ri": "riddle",
    "mi": "mishear",
    "si": "sick",
    "ca": "cake",
    "pl": "plant",
    "pe": "pest",
    "cr": "crossing",
    "la": "landmark",
    "lb": "landmark",
    "lc": "landmark",
    "trip": "trip",
    "kin": "kin",
    "gp": "gp",
    "sad": "sad",
    "glad": "glad",
    "scared": "scared",
    "trait": "trait",
    "btrait": "trait",
    "na": "animaladj",
    "scentb": "scent",
    "flowerb": "flower",
    "birdb": "bird",
    **{section: section for section in SCENERY},
}
"""Slot prefix to fact section; ``{n}`` is field 0 of the row, ``{n2}`` field 2."""

_EVEN = frozenset({"pattern", "patterncolour", "trait", "kin", "adv", "time", "tone", *SCENERY})
"""Sections drawn evenly: their words hardly come again, so they add entropy and ask for no memory."""

_FRESH = {"adv": "adv", "Time": "time"}
_THING_PARTS = frozenset(letter + part for letter in "tuves" for part in "cs")
_ADJECTIVES = {
    "place": "placeadj",
    "hide": "hideadj",
    "role": "roleadj",
    "food": "foodadj",
}
_GENDER_WORDS = {
    "he": ("she", "he"),
    "him": ("her", "him"),
    "his": ("her", "his"),
    "self": ("herself", "himself"),
    "He": ("She", "He"),
    "His": ("Her", "His"),
    "boy": ("girl", "boy"),
}


@lru_cache(maxsize=16384)
def _offset(name: str, plot: int) -> int:
    code = plot
    for char in name:
        code = code * 131 + ord(char)
    return mix64(code) >> 32


def is_held_out(name: str, position: int, plot: int, size: int) -> bool:
    """Say whether a (hero, thing, plot) triple belongs to the held-out split.

    Args:
        name: the hero's name.
        position: place of the hero's thing in the plot's list of things.
        plot: the plot's number.
        size: length of that list, > 1.

    Returns:
        True for one thing in 32 (or one of the list, if it is shorter): every hero has both
        kinds in every plot.
    """
    return (position + _offset(name, plot)) % min(HELD_OUT_PERIOD, size) == 0


@lru_cache(maxsize=64)
def _pool(tag: str) -> tuple[Thing, ...]:
    return load_lexicon().things_tagged(tag)


@lru_cache(maxsize=64)
def _places(tag: str) -> Mapping[str, int]:
    return {thing.noun: place for place, thing in enumerate(_pool(tag))}


def _skip(index: int, taken: list[int]) -> int:
    """The place of entry `index` of a list without the places taken."""
    for other in sorted(taken):
        index += index >= other
    return index


class World(dict[str, str]):
    """Slots of one story; a missing slot is drawn from the story's stream."""

    __slots__ = ("fraction", "held_out", "micro_bits", "plot", "pools", "things", "used")

    def __init__(self, fraction: int, *, held_out: bool = False) -> None:
        """Start an empty world.

        Args:
            fraction: the story's stream integer.
            held_out: whether the hero's thing must complete a held-out triple.
        """
        super().__init__()
        self.fraction = fraction
        self.micro_bits = 0
        self.held_out = held_out
        self.plot: Script | None = None
        self.things: dict[str, Thing] = {}
        self.used: dict[str, list[int]] = {}
        self.pools = load_scripts().pools

    def draw(self, count: int) -> int:
        """Draw a uniform integer.

        Args:
            count: number of choices, 1 to 4096.

        Returns:
            An integer in [0, count).
        """
        scaled = self.fraction * count
        self.fraction = scaled & _MASK
        self.micro_bits += MICRO_BITS[count]
        return scaled >> WIDTH

    def chance(self, weight: int, total: int) -> bool:
        """Draw a yes or no.

        Args:
            weight: number of cases that say yes.
            total: number of cases.

        Returns:
            True with probability weight / total.
        """
        yes = self.draw(total) < weight
        self.micro_bits -= MICRO_BITS[weight if yes else total - weight]
        return yes

    def draw_ranked(self, count: int) -> int:
        """Draw an index with weight 1 / rank.

        Args:
            count: number of choices.

        Returns:
            An index in [0, count).
        """
        weights, sums = rank_weights(count)
        index = bisect_right(sums, self.draw(sums[-1])) - 1
        self.micro_bits -= MICRO_BITS[weights[index]]
        return index

    def draw_distinct(self, section: str, count: int, *, ranked: bool = True) -> int:
        """Draw an index not drawn before from a section.

        Args:
            section: name that groups the draws.
            count: size of the section.
            ranked: weigh by 1 / rank instead of evenly.

        Returns:
            An index in [0, count).
        """
        used = self.used.get(section)
        if used is None:
            index = self.draw_ranked(count) if ranked else self.draw(count)
            self.used[section] = [index]
            return index
        if not ranked:
            index = _skip(self.draw(count - len(used)), used)
        else:
            weights, sums = rank_weights(count)
            value = self.draw(sums[-1] - sum(weights[index] for index in used))
            for other in sorted(used):
                if value >= sums[other]:
                    value += weights[other]
            index = bisect_right(sums, value) - 1
            self.micro_bits -= MICRO_BITS[weights[index]]
        used.append(index)
        return index

    def __missing__(self, key: str) -> str:
        """Draw a slot; fresh choices (adverbs, synonyms) are not kept."""
        pool = self.pools.get(key)
        if pool is not None:
            scaled = self.fraction * len(pool)  # draw(), without the call
            self.fraction = scaled & _MASK
            word, cost = pool[scaled >> WIDTH]
            self.micro_bits += cost
            return word
        kind, argument = _resolve(key)
        if kind == "row":
            first = self._draw_row(argument)
            return first if key == argument else self[key]
        elif kind == "article":
            phrase = self[argument]
            if argument in _THING_PARTS:
                phrase = f"{phrase} {self[argument[0]]}"
            phrase = article(phrase)
            self[key] = phrase.capitalize() if key[0] == "A" else phrase
        elif kind == "fresh":
            return self._fresh(argument)
        elif kind == "how":
            return f" {self._fresh('tone')}" if self.chance(2, 3) else ""
        elif kind == "address":
            return f", {self[argument]}" if self.chance(1, 2) else ""
        elif kind == "capital":
            self[key] = self[argument].capitalize()
        elif kind == "person":
            self._draw_person(argument)
        elif kind == "number":
            self._draw_number(key)
        elif kind == "colour":
            self._draw_colour(argument)
        elif kind == "attribute":
            attributes = self._thing(argument).attributes
            self[key] = attributes[self.draw(len(attributes))]
        elif kind == "phrase":
            colour, attribute, noun = self[argument + "c"], self[argument + "s"], self[argument]
            order = (colour, attribute) if attribute in MATERIALS else (attribute, colour)
            self[key] = " ".join((*order, noun))
        else:
            self._draw_thing(argument)
        return self[key]

    def _fresh(self, section: str) -> str:
        rows = load_lexicon().rows[section]
        index = self.draw(len(rows)) if section in _EVEN else self.draw_ranked(len(rows))
        return rows[index][0]

    def _draw_row(self, prefix: str) -> str:
        """Draw a row of facts; returns how its first word is first named, "the old baker"."""
        section = PREFIXES[prefix]
        rows = load_lexicon().rows[section]
        row = rows[self.draw_distinct(section, len(rows), ranked=section not in _EVEN)]
        self[prefix] = row[0]
        for number in range(1, len(row)):
            self[f"{prefix}{number}"] = row[number]
        adjectives = _ADJECTIVES.get(section)
        return f"{self._fresh(adjectives)} {row[0]}" if adjectives else row[0]

    def _draw_person(self, letter: str) -> None:
        lexicon = load_lexicon()
        boy = self["boy"] == "girl" if letter in "BCG" else self.draw(2) == 1
        names = lexicon.boys if boy else lexicon.girls
        self[letter] = names[self.draw_distinct("boys" if boy else "girls", len(names))]
        prefix = "" if letter == "A" else letter.lower()
        for word, forms in _GENDER_WORDS.items():
            name = prefix + word if word[0] > "Z" or not prefix else letter + word.lower()
            self[name] = forms[boy]

    def _draw_number(self, key: str) -> None:
        if key in ("z", "qmx"):
            first, second = ("qmx", "y") if key == "z" else ("q", "x")
            a, b = (NUMBER_WORDS.index(self[k]) for k in (first, second))
            self[key] = NUMBER_WORDS[a + b if key == "z" else a - b]
            return
        if key == "x":
            self[key] = NUMBER_WORDS[2 + self.draw(NUMBER_WORDS.index(self["q"]) - 3)]
            return
        low, count = (5, 8) if key == "q" else (2, 5)
        self[key] = NUMBER_WORDS[low + self.draw(count)]

    def _thing(self, letter: str) -> Thing:
        if letter not in self.things:
            self._draw_thing(letter)
        return self.things[letter]

    def _draw_thing(self, letter: str) -> None:
        options = self.plot.options if self.plot else {}
        fixed = {"e": "don", "s": "lose", "t": options.get("T", "lose")}
        pool = _pool(fixed.get(letter) or options.get("U", "lose"))
        if letter == "t":
            thing = self._draw_hero_thing(pool)
        else:
            places = _places(fixed.get(letter) or options.get("U", "lose"))
            taken = [places[t.noun] for t in self.things.values() if t.noun in places]
            thing = pool[_skip(self.draw_ranked(len(pool) - len(taken)), taken)]
        self.things[letter] = thing
        self[letter] = thing.noun

    def _draw_hero_thing(self, pool: tuple[Thing, ...]) -> Thing:
        name = self["A"]
        number = self.plot.number if self.plot else 0
        size = len(pool)
        index = drawn = self.draw_ranked(size)
        while is_held_out(name, index, number, size) != self.held_out:
            index = (index + 1) % size
        # The things whose place this one took add to its probability.
        weights, _ = rank_weights(size)
        weight, before = weights[drawn], (index - 1) % size
        total = weights[index]
        while is_held_out(name, before, number, size) != self.held_out:
            total += weights[before]
            before = (before - 1) % size
        self.micro_bits += MICRO_BITS[weight] - MICRO_BITS[total]
        return pool[index]

    def _draw_colour(self, letter: str) -> None:
        taken = [self[x + "c"] for x in self.things if x != letter and x + "c" in self]
        colours = [c for c in self._thing(letter).colours if c not in taken]
        self[letter + "c"] = colours[self.draw(len(colours))]


@lru_cache(maxsize=1024)
def _resolve(key: str) -> tuple[str, str]:
    if key.startswith(("a_", "A_")):
        return "article", key[2:]
    if key in _FRESH:
        return "fresh", _FRESH[key]
    if key == "how":
        return "how", ""
    if key in ("toA", "toB"):
        return "address", key[2:]
    if key.lower() in SCENERY and key[0].isupper():
        return "capital", key.lower()
    if key in ("A", "B", "C", "D", "G"):
        return "person", key
    if key in ("q", "x", "y", "z", "qmx"):
        return "number", key
    prefix = key.rstrip("0123456789")
    if prefix in PREFIXES:
        return "row", prefix
    if key[0] in "tuves" and len(key) <= 3:
        return {"": "thing", "c": "colour", "s": "attribute", "cs": "phrase"}[key[1:]], key[0]
    for letter in "BCDG":
        if key[0].upper() == letter and key[1:].lower() in _GENDER_WORDS:
            return "person", letter
    if key in _GENDER_WORDS:
        return "person", "A"
    raise KeyError(f"no such slot: {key!r}")
