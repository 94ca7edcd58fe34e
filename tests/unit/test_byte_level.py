"""Imported byte-level tokenizers give the ids of the library they were made for, and lose nothing.

Run: python -m pytest tests/unit/test_byte_level.py
"""

import base64
import json
import pickle
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from core.data.tokenizers.byte_bpe import ByteBpeTokenizer
from core.data.tokenizers.byte_level import BYTE_CHARACTERS, spelled, unspelled
from core.data.tokenizers.byte_level_patterns import CL100K, LLAMA3, O200K, QWEN, R50K
from core.data.tokenizers.tokenizer import CHAT_SYMBOLS, load_tokenizer
from core.errors import PippinError

WORDS = "the quick brown fox jumps over the lazy dog while 12 wizards don't mix 345 jugs of juice"
TEXTS = [
    f"{WORDS[i:]}\n  {WORDS[:i]}.\t\u00e9t\u00e9 {i}\r\n\r\n\u6f22\u5b57\u3002\u304b\u306a"
    for i in range(60)
]
STYLES = ("gpt2", "llama3", "qwen", "o200k")
SYMBOLS = {"llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]}
# What GPT-2's own file has, from the published encoder.json.
GPT2_SPELLING = {
    0x20: "\u0120",
    0x0A: "\u010a",
    0x41: "A",
    0xE9: "\u00e9",
    0x00: "\u0100",
    0xAD: "\u0143",
}


def make(style: str, folder: Path, *, vocab_size: int = 700, **model: Any) -> tokenizers.Tokenizer:
    """Train a tokenizer.json of a style with the library itself."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "llama3", **model))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    patterns = {"llama3": LLAMA3, "qwen": QWEN, "o200k": O200K, "own": r"\S+|\s+"}
    if style == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(patterns[style]), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    if style == "qwen":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    inside = [] if style in SYMBOLS else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=inside,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(SYMBOLS.get(style, []))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("byte_level")


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, tuple[tokenizers.Tokenizer, ByteBpeTokenizer]]:
    pairs = {}
    for style in (*STYLES, "own"):
        library = make(style, folder / style)
        library.normalizer = normalizers.Sequence([])  # NFC is left out on purpose.
        loaded = load_tokenizer(folder / style)
        assert isinstance(loaded, ByteBpeTokenizer)
        pairs[style] = library, loaded
    return pairs


def reference(library: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = library.encode(text, add_special_tokens=False).ids
    return ids


MIXED = st.lists(
    st.one_of(
        st.sampled_from(
            [" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\x00", "\u00a0", "\u2028"]
        ),
        st.sampled_from(
            [*WORDS.split(), "'S", "'ll", "12", "1234", "\u6f22\u5b57", "\u3002", "/", "\n/"]
        ),
        st.sampled_from(
            [".", "...", "!\n", "e\u0301", "\u017f", "\U0001f600", "\u0661\u0662", "_", "\x1c"]
        ),
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Z"]), max_size=3),
    ),
    max_size=25,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=MIXED)
def test_ids_are_those_of_the_library(made: Any, text: str) -> None:
    for style, (library, tokenizer) in made.items():
        ids = tokenizer.encode(text)
        assert ids == reference(library, text), style
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.control_ids.values())


@settings(max_examples=100, deadline=None)
@given(text=MIXED, size=st.integers(1, 20))
def test_parts_have_the_ids_of_the_whole_text(made: Any, text: str, size: int) -> None:
    """Cut wherever the rule allows, and nowhere else: each place must be harmless by itself."""
    for style in STYLES:
        library, tokenizer = made[style]
        places = tokenizer.cut(text, size)
        assert "".join(places) == text
        if all(len(part) < size for part in places[:-1]):  # Else it had to be cut anywhere.
            ids = [i for part in places for i in reference(library, part)]
            assert ids == reference(library, text), style


@pytest.mark.parametrize("style", STYLES)
def test_long_texts_have_the_ids_of_the_library(made: Any, style: str) -> None:
    library, tokenizer = made[style]
    text = "\n\n".join(TEXTS) + "".join(
        f"\n\tif x[{i}]:\n\t\ty = '\u6f22\u3002\u5b57'" for i in range(999)
    )
    assert len(text) > 20_000
    assert tokenizer.encode(text) == reference(library, text)
    batch = tokenizer.encode_batch([*TEXTS, text, ""])
    assert [ids.tolist() for ids in batch] == [reference(library, t) for t in (*TEXTS, text, "")]
    assert all(ids.dtype == np.uint32 for ids in batch)


@pytest.mark.parametrize("style", STYLES)
def test_known_styles_are_encoded_by_tiktoken(made: Any, style: str) -> None:
    assert made[style][1].library == "tiktoken"
    assert made["own"][1].library == "tokenizers"


@pytest.mark.parametrize("style", [*STYLES, "own"])
@pytest.mark.parametrize("character", ["a", " ", "\n", "^", "1"])
def test_endless_runs_end(made: Any, style: str, character: str) -> None:
    tokenizer = made[style][1]
    text = character * (1_000_000 if character == "a" and style == "gpt2" else 50_000)
    started = time.monotonic()
    ids = tokenizer.encode(text)
    assert time.monotonic() - started < 30
    assert tokenizer.decode(ids) == text
    parts = tokenizer.cut(text, 20_001)
    assert [i for part in parts for i in tokenizer.encode(part)] == ids


@pytest.mark.parametrize("style", [*STYLES, "own"])
def test_saved_form_is_whole_and_its_hash_the_fingerprint(
    made: Any, style: str, tmp_path: Path
) -> None:
    tokenizer = made[style][1]
    path = tokenizer.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["tokenizer.json"]
    for again in (
        load_tokenizer(path),
        load_tokenizer(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.kind == "byte_bpe"
        assert again.fingerprint == tokenizer.fingerprint
        assert again.control_ids == tokenizer.control_ids
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode(TEXTS[7]) == tokenizer.encode(TEXTS[7])
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version":  1'))
    with pytest.raises(PippinError, match="changed after it was written"):
        load_tokenizer(path)


def test_symbols_and_their_ids(made: Any) -> None:
    library, tokenizer = made["llama3"]
    size = library.get_vocab_size()
    names = {name: library.token_to_id(name) for name in SYMBOLS["llama3"]}
    chat = {name: size + i for i, name in enumerate(CHAT_SYMBOLS)}
    eos = names["<|end_of_text|>"]
    assert tokenizer.control_ids == {**names, **chat, "</s>": eos}
    assert tokenizer.eos_id == tokenizer.bos_id == eos
    assert tokenizer.vocab_size == size + len(CHAT_SYMBOLS)
    lengths = tokenizer.token_bytes()
    assert np.flatnonzero(lengths == 0).tolist() == sorted({*names.values(), *chat.values()})
    assert int(lengths[tokenizer.encode(TEXTS[2])].sum()) == len(TEXTS[2].encode())
    assert tokenizer.decode(list(chat.values())) == ""
    assert tokenizer.decode(tokenizer.encode("\u00e9")[:1]) in ("\u00e9", "\ufffd")


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(
        st.sampled_from(["<|endoftext|>", "<|eot_id|>", *CHAT_SYMBOLS, " ", "x"]), max_size=6
    )
)
def test_names_of_symbols_are_text(made: Any, names: list[str]) -> None:
    text = "".join(names)
    for _, tokenizer in made.values():
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.control_ids.values())
        assert tokenizer.decode(ids) == text


def test_the_end_is_what_the_configuration_beside_says(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "llama3" / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for value in ("<|eot_id|>", {"content": "<|eot_id|>", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": value}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.eos_id == tokenizer.control_ids["<|eot_id|>"]
    config.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(PippinError, match="none of its symbols"):
        load_tokenizer(tmp_path)
    config.write_text("{")
    with pytest.raises(PippinError, match="not readable"):
        load_tokenizer(tmp_path)


def test_a_merge_that_only_tiktoken_would_make_is_left_to_the_library(tmp_path: Path) -> None:
    """ "abc" is only made of "ab" and "c"; tiktoken would also join "a" and "bc"."""
    vocab = {c: i for i, c in enumerate(BYTE_CHARACTERS)}
    for piece in ("bc", "ab", "abc"):
        vocab[piece] = len(vocab)
    data = {
        "added_tokens": [{"id": 400, "content": "</s>"}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["b", "c"], ["a", "b"], ["ab", "c"]]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ByteBpeTokenizer)
    assert tokenizer.library == "tokenizers"
    assert tokenizer.encode("abc") == [ord("a") - 33 + vocab["!"], vocab["bc"]]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (400, 405)
    assert tokenizer.decode_bytes([300, 399]) == b""


def test_spelling_is_that_of_gpt2() -> None:
    assert {byte: BYTE_CHARACTERS[byte] for byte in GPT2_SPELLING} == GPT2_SPELLING
    assert sorted(BYTE_CHARACTERS) == sorted(pre_tokenizers.ByteLevel.alphabet())
    everything = bytes(range(256))
    assert unspelled(spelled(everything)) == everything
    assert unspelled("a b") is None


@pytest.mark.parametrize(
    ("name", "pattern"), [("gpt2", R50K), ("cl100k_base", CL100K), ("o200k_base", O200K)]
)
def test_rank_files(made: Any, name: str, pattern: str, tmp_path: Path) -> None:
    tokenizer = made["gpt2"][1]
    order = sorted(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes()[i])
    ranks = {tokenizer.decode_bytes([i]): rank for rank, i in enumerate(order)}
    path = tmp_path / f"{name}-small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(p).decode()} {r}\n" for p, r in ranks.items()))
    loaded = load_tokenizer(path)
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    text = "\n\n".join(TEXTS)
    assert loaded.encode(text) == encoding.encode_ordinary(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.control_ids["<|endoftext|>"] == loaded.eos_id == len(ranks)
    again = load_tokenizer(loaded.save(tmp_path))
    assert again.fingerprint == loaded.fingerprint and again.encode(text) == loaded.encode(text)
    assert load_tokenizer(tmp_path).fingerprint == loaded.fingerprint


@pytest.mark.parametrize("names", [("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")])
def test_word_files(made: Any, folder: Path, names: tuple[str, str], tmp_path: Path) -> None:
    model = json.loads((folder / "gpt2" / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / names[0]).write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (tmp_path / names[1]).write_text(json.dumps(model["vocab"]))
    for path in (tmp_path, *(tmp_path / name for name in names)):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == made["gpt2"][1].fingerprint
    (tmp_path / names[0]).unlink()
    with pytest.raises(PippinError, match=f"needs {names[0]} beside it"):
        load_tokenizer(tmp_path / names[1])


VALID: dict[str, Any] = {
    "added_tokens": [{"id": 256, "content": "</s>"}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(BYTE_CHARACTERS)}, "merges": []},
}


def _with(path: str, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(VALID))
    *keys, last = path.split(".")
    place = data
    for key in keys:
        place = place[key]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_with("model.type", "Unigram"), "byte-level BPE is read"),
        (_with("model.vocab", []), "no object of ids"),
        (_with("model.vocab", {"a": "1"}), "no whole numbers"),
        (_with("model.vocab", {"a": 0}), "not lossless"),
        (_with("model.vocab.A", 1), "one id to two pieces"),
        (_with("model.vocab.AB", 10**9), "ids from 0 to"),
        (_with("model.vocab.AB", -1), "ids from -1"),
        (_with("model.vocab.AB", True), "no whole numbers"),
        (_with("model.merges", ["A B"]), "that the vocabulary lacks"),
        (_with("model.merges", ["A"]), "no list of pairs"),
        (_with("model.merges", [["A", 1]]), "no list of pairs"),
        (_with("model.merges", 3), "no list of pairs"),
        (_with("model.end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (_with("added_tokens", []), "no symbol for the end"),
        (_with("added_tokens", [{"id": "1"}]), "has no id"),
        (_with("added_tokens", [{"id": 1}]), "has no content"),
        (_with("added_tokens", [{"id": 3, "content": "</s>"}]), "one id to two pieces"),
        (_with("pre_tokenizer", None), "no byte-level tokenizer"),
        (_with("pre_tokenizer", {"type": "Metaspace"}), "no byte-level tokenizer"),
        (_with("pre_tokenizer", {"type": "Sequence", "pretokenizers": [3]}), "no byte-level"),
    ],
)
def test_what_cannot_be_used_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(PippinError, match=message) as error:
        load_tokenizer(tmp_path)
    assert error.value.code == "P301"


def test_a_cut_that_drops_text_is_refused(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    data = _with("pre_tokenizer", {"type": "Sequence", "pretokenizers": steps})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(PippinError, match="not lossless"):
        load_tokenizer(tmp_path)


def test_the_least_valid_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(VALID))
    assert load_tokenizer(tmp_path).encode("AB") == [BYTE_CHARACTERS.index(c) for c in "AB"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.tiktoken", b"IQ== 0\n", "does not say how it cuts"),
        ("gpt2.tiktoken", b"IQ== 0\nIg== x\n", ":2 is no base64"),
        ("gpt2.tiktoken", b"I 0\n", ":1 is no base64"),
        ("gpt2.tiktoken", b"\xff\xfe", "not UTF-8"),
        ("gpt2.tiktoken", b"", "is empty"),
        ("gpt2.tiktoken", b"IQ== 0\nIQ== 1\n", "second rank"),
        ("gpt2.tiktoken", b"IQ== 0\n", "not lossless"),
        ("tokenizer.json", b'{"model": {"type": "BPE"', "not readable"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PippinError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert error.value.code == "P301"


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as stream:
        stream.truncate(65_000_000)
    with pytest.raises(PippinError, match="at most 64,000,000"):
        load_tokenizer(path)


def test_lone_surrogates_are_refused(made: Any) -> None:
    for _, tokenizer in made.values():
        with pytest.raises(PippinError) as error:
            tokenizer.encode("ok \ud800")
        assert error.value.code == "P202"


@pytest.mark.parametrize("package", ["tiktoken", "tokenizers"])
def test_a_missing_package_is_named(
    package: str, folder: Path, made: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PippinError) as error:
        load_tokenizer(folder / "gpt2")
    assert error.value.code == "P502" and f"pip install '{package}" in error.value.remedy


@pytest.mark.parametrize("style", ["gpt2", "own"])
def test_a_text_of_megabytes_is_encoded_in_parts(made: Any, style: str) -> None:
    library, tokenizer = made[style]
    text = "\n\n".join(TEXTS) * (300 if style == "gpt2" else 10)
    ids = tokenizer.encode_batch([text])[0]
    parts = tokenizer.encode_batch(tokenizer.cut(text, 77_777))
    assert np.array_equal(np.concatenate(parts), ids)
    assert reference(library, text[:50_000]) == tokenizer.encode(text[:50_000])
