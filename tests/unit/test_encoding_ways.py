"""Every way to encode gives the ids of the library itself, whichever is the fastest today."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.tokenizers.byte_level_patterns import _KNOWN, ascii_words
from core.data.tokenizers.tokenizer import ByteBpeTokenizer, SentencePieceTokenizer, load_tokenizer
from core.data.tokenizers.unit_cache import END, Choice, UnitCache, encode_in_words
from tests.tokenizer_helpers import BPE, UNIGRAM
from tests.unit.test_byte_level import STYLES, make, reference

TEXT = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "\n", "\n\n", "\n   ", "\t", "\r\n", "\x00", "\x0b", "\x1c"]),
        st.sampled_from(["foo", "self.bar(x)", "I'll", "'S", "snake_case", "CamelCase", "</a>"]),
        st.sampled_from(
            ["1234567", "0x1f", "!\n", "...", "/\n/", "\u00bd'", "\u00e9t\u00e9", "\u2581"]
        ),
        st.text(st.characters(codec="ascii"), max_size=6),
    ),
    max_size=30,
).map("".join)


@contextmanager
def only(tokenizer: Any, way: int) -> Iterator[None]:
    """A tokenizer that goes one way."""
    held = tokenizer._choice
    tokenizer._choice = Choice(1)
    tokenizer._choice.next = lambda chars: way
    tokenizer._choice.took = lambda way, chars, seconds: None
    try:
        yield
    finally:
        tokenizer._choice = held


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ByteBpeTokenizer]]:
    folder, pairs = tmp_path_factory.mktemp("ways"), {}
    for style in STYLES:
        library = make(style, folder / style)
        library.normalizer = None
        loaded = load_tokenizer(folder / style)
        assert isinstance(loaded, ByteBpeTokenizer) and loaded.library == "tiktoken"
        pairs[style] = library, loaded
    return pairs


@pytest.mark.parametrize("way", [0, 1, 2])
@settings(max_examples=40, deadline=None)
@given(text=TEXT)
def test_byte_level_ids_are_those_of_the_library(made: Any, way: int, text: str) -> None:
    for library, tokenizer in made.values():
        with only(tokenizer, way):
            assert tokenizer.encode(text) == reference(library, text)


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM], ids=["bpe", "unigram"])
@settings(max_examples=50, deadline=None)
@given(text=TEXT)
def test_sentencepiece_ids_are_its_own(tokenizer: Any, way: int, text: str) -> None:
    """Unigram goes by units alone; U+2581 is spelled by bytes, lest it come back as a space."""
    expected: list[int] = []
    for i, run in enumerate(text.split("\u2581")):
        expected += tokenizer._byte_ids("\u2581").tolist() if i else []
        expected += tokenizer._sp.encode(run)
    with only(tokenizer, way):
        assert tokenizer.encode(text) == expected


def test_words_are_used_where_no_piece_mixes_them() -> None:
    assert isinstance(BPE, SentencePieceTokenizer) and isinstance(UNIGRAM, SentencePieceTokenizer)
    assert BPE.in_words and not UNIGRAM.in_words


@pytest.mark.parametrize("length", [990, 1_999, 2_000, 2_001, 2_500, 7_000])
@pytest.mark.parametrize("spaces", [0, 1, 3, 1_200])
def test_a_long_unit_is_cut_at_the_same_places_both_ways(length: int, spaces: int) -> None:
    rng = random.Random(length)
    word = "".join(rng.choice("quick-brown_fox;12") for _ in range(length))
    text = f"a b\n{' ' * spaces}{word} c\n{'d' * rng.randrange(700)} {word[::-1]}"
    found = []
    for way in (0, 1):
        with only(BPE, way):
            found.append(BPE.encode(text))
    assert found[0] == found[1]


@pytest.mark.parametrize("pattern", list(_KNOWN.values()))
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="ascii", exclude_characters=END)), max_size=4))
def test_words_of_ascii_are_those_of_the_expression(pattern: str, texts: list[str]) -> None:
    """Against another implementation of such expressions."""
    regex = pytest.importorskip("regex")
    words = ascii_words(pattern).findall("".join(text + END for text in texts))
    expected = [w for text in texts for w in (*regex.findall(pattern, text), END)]
    # `regex` takes \x1c to \x1f for white space, tiktoken does not.
    if not re.search("[\x1c-\x1f]", "".join(texts)):
        assert words == expected
    assert "".join(words) == "".join(text + END for text in texts)


def test_ids_of_units_are_counted_through_their_words() -> None:
    def encode(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        flat = np.array([ord(c) for word in words for c in word], np.uint32)
        return flat, np.array([len(word) for word in words], np.int64)

    units = ["foo(bar)", "", "x", "y.z.", ""]
    ids, lengths = encode_in_words(units, re.compile(r"\w+|[^\w\0]|\0").findall, UnitCache(encode))
    assert ids.tolist() == [ord(c) for c in "".join(units)]
    assert lengths.tolist() == [8, 0, 1, 4, 0]


def test_the_cheapest_way_is_gone_and_others_are_tried_again() -> None:
    choice, costs, ways = Choice(3, again=10), [3.0, 1.0, 2.0], []
    for i in range(60):
        if i == 40:
            costs = [0.5, 1.0, 2.0]
        ways.append(choice.next(100_000))
        choice.took(ways[-1], 100_000, costs[ways[-1]])
    assert ways[:6] == [0, 0, 1, 1, 2, 2]
    assert [ways[i] for i in (10, 20, 30, 40)] == [1, 2, 0, 1]
    assert set(ways[11:20] + ways[21:30] + ways[31:40]) == {1}


def test_little_text_decides_nothing() -> None:
    choice = Choice(2)
    for _ in range(9):
        assert choice.next(100) == 0
        choice.took(0, 100, 1e9)
    assert [choice.next(100_000) for _ in range(4)] == [0, 0, 1, 1]
