"""Tokenizers lose nothing, never make a control id of text, and know themselves when saved.

Run: pytest tests/unit/test_tokenizer.py
"""

import io
import pickle
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.tokenizers.text_sample import TextSample
from core.data.tokenizers.tokenizer import (
    CHAT_SYMBOLS,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    cut_text,
)
from core.data.tokenizers.training import train_tokenizer
from core.data.tokenizers.unit_cache import UnitCache
from core.errors import PippinError
from tests.tokenizer_helpers import ALL, AWKWARD, BPE, BYTE, PIECES, TEXTS, UNIGRAM, WORDS


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = ALL[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(tokenizer.control_ids.values())


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(kind: str, text: str) -> None:
    tokenizer = ALL[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.control_ids.values())


@pytest.mark.parametrize("kind", list(ALL))
def test_own_text_comes_back_and_is_free_of_controls(kind: str) -> None:
    tokenizer = ALL[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.control_ids.values())


@pytest.mark.parametrize("kind", list(ALL))
def test_batches_are_the_single_texts(kind: str) -> None:
    tokenizer = ALL[kind]
    single = [tokenizer.encode(text) for text in TEXTS]
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == single


@pytest.mark.parametrize("kind", list(ALL))
def test_ids_and_controls(kind: str) -> None:
    tokenizer = ALL[kind]
    assert tokenizer.kind == kind
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.control_ids["</s>"]
    assert set(CHAT_SYMBOLS) <= set(tokenizer.control_ids)
    controls = sorted(tokenizer.control_ids.values())
    assert len(set(controls)) == len(controls) and max(controls) < tokenizer.vocab_size
    assert tokenizer.decode_bytes(controls) == b""
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert np.flatnonzero(lengths == 0).tolist() == controls
    ids = tokenizer.encode(TEXTS[3])
    assert int(lengths[ids].sum()) == len(TEXTS[3].encode())


def test_char_ids_are_the_sorted_characters() -> None:
    assert CharTokenizer("abz").encode("zab") == [2, 0, 1]
    assert CharTokenizer("abz").vocab_size == 3 + 1 + len(CHAT_SYMBOLS)


def test_char_tokenizer_names_what_it_does_not_know() -> None:
    tokenizer = CharTokenizer("ab")
    assert tokenizer.unknown_characters("bxa\u6f22x") == ("x", "\u6f22")
    with pytest.raises(PippinError) as error:
        tokenizer.encode("a\u6f22bx")
    assert error.value.code == "P202"
    assert "'x' (U+0078)" in error.value.what and "U+6F22" in error.value.what
    assert BPE.unknown_characters("\u6f22") == ()


@pytest.mark.parametrize("kind", list(ALL))
def test_lone_surrogates_are_refused(kind: str) -> None:
    with pytest.raises(PippinError) as error:
        ALL[kind].encode("ok \ud800")
    assert error.value.code == "P202"


@pytest.mark.parametrize("kind", PIECES)
def test_training_is_deterministic(kind: str) -> None:
    again = train_tokenizer(kind, iter(TEXTS), 420)
    assert again.fingerprint == ALL[kind].fingerprint
    assert train_tokenizer(kind, TEXTS, 330).fingerprint != again.fingerprint


@pytest.mark.parametrize("kind", PIECES)
def test_pieces_never_hold_a_newline_and_spaces_only_in_front(kind: str) -> None:
    """What makes it exact to encode a text in units."""
    made = ALL[kind]
    assert isinstance(made, SentencePieceTokenizer) and made.in_units
    pieces = [made.decode_bytes([i]).decode("utf-8", "replace") for i in range(made.vocab_size)]
    assert all("\n" not in p or p == "\n" for p in pieces)
    assert all(" " not in p.lstrip(" ") for p in pieces)


def reference(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids by the library alone, from the saved file; U+2581, which it cannot keep, in bytes."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    meta = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    ids = []
    for i, run in enumerate(text.split("\u2581")):
        ids += (meta if i else []) + sp.encode(run)
    return ids


MIXED = st.lists(
    st.one_of(
        st.sampled_from(
            [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u2581", "\x00", "\u00a0"]
        ),
        st.sampled_from(
            [*WORDS.split(), "12", "\u6f22\u5b57", "\U0001f600", "<|end|>", ".", "e\u0301"]
        ),
        st.text(st.characters(codec="utf-8"), max_size=3),
        st.sampled_from(["x" * 64, "quick" * 13, "\u6f22" * 70]),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("kind", PIECES)
@settings(max_examples=300, deadline=None)
@given(text=MIXED)
def test_units_give_the_ids_of_the_whole_text(kind: str, text: str) -> None:
    assert ALL[kind].encode(text) == reference(ALL[kind], text)


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("text", [" ".join(TEXTS) * 3, f"{WORDS}  and " * 400, *AWKWARD])
def test_long_texts_are_encoded_as_in_one_piece(kind: str, text: str) -> None:
    assert ALL[kind].encode(text) == reference(ALL[kind], text)


@pytest.mark.parametrize("kind", list(ALL))
@settings(max_examples=100, deadline=None)
@given(text=MIXED.map(lambda t: "".join(c for c in t if c in CHAR_SET)), size=st.integers(150, 400))
def test_parts_have_the_ids_of_the_text(kind: str, text: str, size: int) -> None:
    """No run in these texts is as long as a part."""
    text = "".join(text[i : i + 100] + " " for i in range(0, len(text), 100)) * 5
    tokenizer = ALL[kind]
    parts = tokenizer.cut(text, size)
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


CHAR_SET = frozenset("".join(TEXTS))


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("size", [4_000, 9_999, 100_000])
def test_parts_of_endless_words_have_the_ids_of_the_text(kind: str, size: int) -> None:
    """Words of thousands of characters, and spaces, at every offset to the parts."""
    rng = random.Random(size)
    text = "".join(
        f"{rng.choice([' ', '  ', chr(10), chr(0x2581)])}{rng.choice('quick') * rng.randrange(7_000)}"
        for _ in range(40)
    )
    tokenizer = ALL[kind]
    parts = tokenizer.cut(text, size)
    assert "".join(parts) == text and len(parts) > 1
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_with_pieces_across_units_is_encoded_the_plain_way() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["by the way of the way"] * 30),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    made = SentencePieceTokenizer(model.getvalue())
    assert not made.in_units
    assert any(" " in made.decode([i]).strip() for i in range(made.vocab_size))
    for text in ("by the way of the way", *AWKWARD):
        assert made.encode(text) == reference(made, text)
        assert made.decode(made.encode(text)) == text


def test_the_cache_is_bounded_and_forgets_nothing_it_needs() -> None:
    calls = []

    def encode(units: list[str]) -> tuple[np.ndarray, np.ndarray]:
        calls.append(list(units))
        flat = np.array([ord(c) for unit in units for c in unit], np.uint32)
        return flat, np.array([len(unit) for unit in units], np.int64)

    cache = UnitCache(encode, max_units=3, max_unit_chars=4)
    for units in (
        ["a", "bc", "a"],
        ["bc", "longer", "a", "longer"],
        [],
        ["d", "e"],
        ["a", "", "x"],
    ):
        ids, starts = cache.encode(units)
        assert ids.tolist() == [ord(c) for c in "".join(units)]
        assert starts.tolist() == [len("".join(units[:i])) for i in range(len(units) + 1)]
        assert len(cache) <= 5
    assert calls == [["a", "bc"], ["longer"], ["d", "e"], ["a", "", "x"]]


def test_a_failure_leaves_no_wrong_ids_in_the_cache() -> None:
    with pytest.raises(PippinError) as error:
        BPE.encode_batch(["quick fox", "new \ud800 words after"])
    assert error.value.code == "P202" and "character 4" in error.value.what
    for text in ("words after new", "quick fox"):
        assert BPE.encode(text) == reference(BPE, text)


@pytest.mark.parametrize("kind", list(ALL))
def test_other_processes_get_the_same_tokenizer(kind: str) -> None:
    again = pickle.loads(pickle.dumps(ALL[kind]))
    assert (again.kind, again.fingerprint) == (kind, ALL[kind].fingerprint)
    assert again.encode(TEXTS[1]) == ALL[kind].encode(TEXTS[1])


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(
        st.sampled_from([*CHAT_SYMBOLS, "<s>", "</s>", "<unk>", "<pad>", " ", "a"]), max_size=8
    )
)
def test_names_of_controls_are_text(names: list[str]) -> None:
    text = "".join(names)
    for tokenizer in (BPE, UNIGRAM, BYTE):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.control_ids.values())
        assert tokenizer.decode(ids) == text


def test_a_sample_depends_on_the_blocks_and_not_on_their_order() -> None:
    blocks = [f"{word} {i}" for i in range(300) for word in ("one", "three", "eleven")]
    shuffled = random.Random(5).sample(blocks, len(blocks))
    held = []
    for order in (blocks, shuffled):
        sample = TextSample(2_000, seed=3)
        for block in order:
            sample.add(block)
        kept = list(sample.blocks())
        assert kept == [block for block in order if block in kept]
        assert 1_900 < sum(map(len, kept)) == sample.held_bytes <= 2_000
        held.append(sorted(kept))
    assert held[0] == held[1]
    other = TextSample(2_000, seed=4)
    for block in blocks:
        other.add(block)
    assert sorted(other.blocks()) != held[0]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n"), max_size=80), size=st.integers(min_value=1, max_value=9)
)
def test_cut_text_joins_to_the_text(text: str, size: int) -> None:
    parts = cut_text(text, size)
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)
