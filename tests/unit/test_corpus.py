"""The story corpus: deterministic, correct English, honest entropy, a fair exam.

Run: python -m pytest tests/unit/test_corpus.py
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from functools import lru_cache

import pytest

from core.data import corpus
from core.data.corpus.lexicon import article, load_lexicon
from core.data.corpus.rng import MICRO_BITS, WIDTH, mix64, stream_integer
from core.data.corpus.story import story_with_marks
from core.data.corpus.templates import load_scripts
from core.data.corpus.world import World

NUM_STORIES = 3000
GOLDEN = "eb5e3ac7fa0e05eca05195e94695bd196d292422a0444d2202bad9dd49900ceb"
SENTENCE_END = re.compile(r'(?<=[.!?]) +(?=["A-Z])|(?<=[.!?]") +(?=["A-Z])')
LINTS = {
    "a before a vowel": re.compile(r"\b[Aa] [aeiou]"),
    "an before a consonant": re.compile(r"\b[Aa]n [^aeiou]"),
    "double space": re.compile("  "),
    "unresolved template": re.compile(r"[{}\[\]|*~_]"),
    "repeated word": re.compile(r"\b(\w+) \1\b"),
    "lower-case sentence start": re.compile(r"[.!?] [a-z]"),
    "lower-case speech start": re.compile(r'(^|[.!?,]"? )"[a-z]'),
    "double punctuation": re.compile(r"[.,!?]{2}"),
    "space before punctuation": re.compile(r" [.,!?]"),
}


@lru_cache(maxsize=1)
def sample() -> tuple[corpus.Story, ...]:
    return tuple(corpus.story(i, 1) for i in range(NUM_STORIES))


def sentences(text: str) -> list[str]:
    return SENTENCE_END.split(text)


def test_golden_hash() -> None:
    """Stories are the same bytes on every platform and Python version."""
    digest = hashlib.sha256("\n".join(s.text for s in sample()[:500]).encode("ascii"))
    assert digest.hexdigest() == GOLDEN


def test_reference_of_splitmix64() -> None:
    """The first outputs for seed 0 are those of Vigna's splitmix64.c."""
    gamma = 0x9E3779B97F4A7C15
    assert [mix64(gamma), mix64(2 * gamma)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_fewer_bytes_are_a_prefix() -> None:
    """Any byte count is a prefix of a longer corpus, in every split."""
    for split in (None, *corpus.SPLITS):
        short = list(corpus.stories(10_000, 3, split=split))
        long = list(corpus.stories(20_000, 3, split=split))
        assert long[: len(short)] == short
        assert sum(len(s.text) for s in short) >= 10_000


def test_seeds_and_indices_differ() -> None:
    """Two seeds, or two indices, do not share stories."""
    assert len({corpus.story(i, seed).text for i in range(200) for seed in (1, 2)}) == 400


@pytest.mark.parametrize("name", LINTS)
def test_lints(name: str) -> None:
    """No story breaks a rule of spelling or grammar that code can check."""
    bad = [m.group() for s in sample() if (m := LINTS[name].search(s.text))]
    assert not bad, bad[:5]


def test_shape_of_stories() -> None:
    """Sentences and stories have the specified lengths and share of speech."""
    parts = [sentences(s.text) for s in sample()]
    flat = [one for part in parts for one in part]
    words = [len(one.split()) for one in flat]
    assert max(words) <= 18
    assert 8 <= sum(words) / len(words) <= 9
    assert 0.25 <= sum('"' in one for one in flat) / len(flat) <= 0.35
    assert min(map(len, parts)) >= 7
    assert sum(len(part) > 16 for part in parts) / len(parts) < 0.08
    assert 580 <= sum(len(s.text) for s in sample()) / NUM_STORIES <= 660
    assert all(s.text.isascii() and s.text.rstrip('"')[-1] in ".!?" for s in sample())
    assert all(s.text[0].isupper() or s.text[0] == '"' for s in sample())
    assert all(s.text.count('"') % 2 == 0 for s in sample())


def test_variety() -> None:
    """No opening, sentence or phrase is worn out, and the vocabulary has its size."""
    counts = Counter(one for s in sample() for one in set(sentences(s.text)))
    assert counts.most_common(1)[0][1] <= NUM_STORIES // 100
    once = sum(s.text.startswith("Once upon a time") for s in sample())
    assert once <= NUM_STORIES // 20
    grams: set[tuple[str, ...]] = set()
    total = 0
    for s in sample():
        words = s.text.lower().split()
        total += len(words) - 3
        grams.update(zip(words, words[1:], words[2:], words[3:], strict=False))
    assert len(grams) / total >= 0.6
    # Rare words are rare: 3,000 stories have not said them all.
    more = (corpus.story(i, 1).text.lower() for i in range(8_000))
    assert 2350 <= len({w for text in more for w in re.findall("[a-z]+", text)}) <= 2800
    assert len({s.plot for s in sample() if not s.plot.startswith("talk")}) == 24


def test_entropy() -> None:
    """The drawn bits of stories lie where the recipe expects them."""
    figures = corpus.summary(sample())
    assert 150 <= figures.entropy_bits / NUM_STORIES <= 180
    assert 0.25 <= figures.entropy_bits_per_byte <= 0.28
    assert figures.num_bytes == sum(len(s.text) for s in sample())
    assert corpus.summary([]).entropy_bits_per_byte == 0.0


def test_draws_are_counted_exactly() -> None:
    """A draw costs log2 of its cases; a distinct draw only counts what is left."""
    world = World((1 << WIDTH) // 3)
    assert world.draw(6) == 1
    assert world.micro_bits == MICRO_BITS[6]
    world = World((1 << WIDTH) - 1)
    assert world.chance(3, 10) is False
    assert world.micro_bits == MICRO_BITS[10] - MICRO_BITS[7]
    drawn = [World((1 << WIDTH) // 7 * k) for k in range(7)]
    assert sorted(w.draw_distinct("x", 7, ranked=False) for w in drawn) == [0, 0, 1, 2, 3, 4, 5]
    world = World(0)
    assert [world.draw_distinct("x", 3, ranked=False) for _ in range(3)] == [0, 1, 2]
    assert world.micro_bits == MICRO_BITS[3] + MICRO_BITS[2]


def test_ranked_draws_follow_their_weights_and_are_counted() -> None:
    """Entry k of a list is drawn with weight 240 // k, and costs its own -log2 p."""
    weights = [240, 120, 80, 60, 48]
    counts: Counter[int] = Counter()
    for k in range(20_000):
        world = World((1 << WIDTH) * k // 20_000)
        index = world.draw_ranked(5)
        counts[index] += 1
        assert world.micro_bits == MICRO_BITS[548] - MICRO_BITS[weights[index]]
    assert all(abs(counts[i] - 20_000 * w / 548) <= 1 for i, w in enumerate(weights))
    pairs: Counter[tuple[int, int]] = Counter()
    for k in range(20_000):
        world = World(stream_integer(9, k))
        first, second = world.draw_distinct("x", 5), world.draw_distinct("x", 5)
        pairs[first, second] += 1
        left = 548 - weights[first]
        bits = math.log2(548 / weights[first]) + math.log2(left / weights[second])
        assert abs(world.micro_bits / 1e6 - bits) < 1e-5
    for (i, j), count in pairs.items():
        p = weights[i] / 548 * weights[j] / (548 - weights[i])
        assert i != j and abs(count / 20_000 - p) < 4 * math.sqrt(p / 20_000)


def test_every_template_renders() -> None:
    """Every slot named in the templates exists."""
    scripts = load_scripts()
    world = World((1 << WIDTH) // 5)
    beats = [b for s in (*scripts.plots, *scripts.talks, *scripts.subs) for b in s.beats]
    templates = [t for b in (*beats, *scripts.shared.values()) for t in b.templates]
    assert len({t.fast for t in templates}) >= 700
    for template in templates:
        world.fraction = (1 << WIDTH) // 5
        assert template.fast.format_map(world)


def test_who_is_spoken_to_is_not_the_speaker() -> None:
    """Behind `"..., Mia"` comes the tag of the other person, who must be known by then."""
    scripts = load_scripts()
    beats = [beat for s in (*scripts.plots, *scripts.talks, *scripts.subs) for beat in s.beats]
    found = 0
    for template in {t for beat in beats for t in beat.templates}:
        keys = [(key, skill) for _, key, skill in template.pieces]
        for place, (key, _) in enumerate(keys):
            if key in ("toA", "toB"):
                speaker = next(k for k, _ in keys[place + 1 :] if k in ("A", "B"))
                assert speaker == {"toA": "B", "toB": "A"}[key], template.fast
                found += 1
    assert found > 150


def test_renderings_of_a_beat_differ() -> None:
    """No beat lists a rendering twice: that would make the entropy too high."""
    scripts = load_scripts()
    for script in (*scripts.plots, *scripts.talks, *scripts.subs):
        for beat in script.beats:
            texts = [t.fast for t in beat.templates]
            assert len(texts) == len(set(texts)), (script.name, beat.name)


def test_lexicon() -> None:
    """Names are single short words, articles agree, things have six to eight colours."""
    lexicon = load_lexicon()
    names = lexicon.girls + lexicon.boys
    assert len(set(names)) == len(names) == 120
    assert all(len(name) <= 7 for name in names)
    assert article("umbrella") == "an umbrella"
    assert article("kite") == "a kite"
    nouns = [thing.noun for thing in lexicon.things]
    assert len(nouns) == len(set(nouns))
    assert all(6 <= len(set(thing.colours)) <= 8 for thing in lexicon.things)


def test_splits_are_disjoint() -> None:
    """Two per cent of indices are validation; held-out triples never occur elsewhere."""
    assert sum(corpus.split_of(i) == "val" for i in range(1000)) == 20
    train = {s.index for s in corpus.stories(60_000, 1, split="train")}
    val = {s.index for s in corpus.stories(60_000, 1, split="val")}
    assert not train & val

    def triples(split: str) -> set[tuple[str, str, str]]:
        result = set()
        held_out = split == "held_out"
        for turn in range(1500):
            index = turn if split == "train" else 50 * turn + 49
            made, _, world = story_with_marks(index, 1, held_out=held_out)
            if "t" in world.things:
                result.add((world["A"], world["t"], made.plot))
        return result

    assert not triples("train") & triples("held_out")


def test_unknown_names_are_refused() -> None:
    """A misspelled split or skill says what is allowed."""
    with pytest.raises(ValueError, match="held_out"):
        next(corpus.stories(1, 1, split="test"))
    with pytest.raises(ValueError, match="pronoun"):
        corpus.chance("names")


def test_marks_point_at_their_words() -> None:
    """Rendering with marks gives the same story, and marks sit on their words."""
    for index in range(300):
        made, marks, _ = story_with_marks(index, 1)
        assert made == corpus.story(index, 1)
        for mark in marks:
            assert made.text.startswith(mark.answer, mark.offset)
            assert mark.skill in corpus.SKILLS


def test_probes() -> None:
    """The exam is reproducible, even over skills, and asked about unseen stories."""
    exam = corpus.probes(80, 1)
    assert exam == corpus.probes(80, 1)
    assert Counter(p.skill for p in exam) == dict.fromkeys(corpus.SKILLS, 10)
    texts = [corpus.story(50 * i + 49, 1).text for i in range(300)]
    texts += [corpus.story(50 * i + 49, 1, held_out=True).text for i in range(300)]
    for probe in exam:
        assert probe.answer not in probe.distractors
        assert len(set(probe.distractors)) == len(probe.distractors)
        assert all(re.fullmatch(" [A-Za-z]+", w) for w in (probe.answer, *probe.distractors))
        assert corpus.chance(probe.skill) == 1 / (1 + len(probe.distractors))
        follows = re.compile(re.escape(probe.context + probe.answer) + r"\b")
        assert any(follows.match(text) for text in texts)
        if probe.skill not in ("count", "pronoun"):
            assert probe.answer.strip() in probe.context


def test_prompts_open_like_stories() -> None:
    """The live prompts use only words that the corpus uses."""
    words = {w for s in sample() for w in re.findall("[A-Za-z]+", s.text)}
    for prompt in corpus.PROMPTS:
        assert set(re.findall("[A-Za-z]+", prompt)) <= words
