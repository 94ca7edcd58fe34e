"""Kind "byte_bpe": byte-level BPE tokenizers of other models, encoded fast and exactly.

tiktoken encodes four times as fast as the library that the files are made for, but knows no
merges: it joins any two neighbours that make a piece. Where this is the same for the file at hand
(`_ranks` decides it exactly, and a battery of texts is compared besides) it is used, for each
distinct stretch between spaces once, or each distinct word, or whole texts, whichever is measured
to be faster; else the library itself. A stretch of more than 8,000 characters without a
place to cut, as 8,000 letters in a row, is encoded in parts of 8,000: in one, its time would grow
with the square of its length.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.tokenizers.base import (
    GROUP_CHARS,
    BaseTokenizer,
    Ids,
    bad_tokenizer,
    cut_where,
    groups,
    joined,
    utf8,
)
from core.data.tokenizers.byte_level import (
    BYTE_CHARACTERS,
    KIND,
    SAVED_FILE,
    ByteLevelSpec,
    unspelled,
)
from core.data.tokenizers.byte_level_patterns import R50K, ascii_words, known_pattern
from core.data.tokenizers.unit_cache import (
    END,
    Choice,
    EncodeUnits,
    UnitCache,
    encode_apart,
    encode_in_words,
)
from core.errors import PippinError

PART_CHARS = 8_000
_NEAR_CHARS = 200
# No known expression matches across these: one space or newline between what is no white space (a
# slash may belong to the newline before it), and a mark after an ideograph or syllable.
_PLACE = re.compile(
    r"(?<=\S) (?=\S)|(?<=\S)\n(?=[^\s/])"
    "|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    "(?=[\u3001\u3002\uff0c\uff01\uff1a\uff1b\uff1f])"
)
# The stretches between spaces after what is no white space, and such newlines: no known expression
# matches across their ends either.
_UNITS = re.compile(r"\s*\S+(?:(?!\n[^\s/])[^\S ]\s*\S+)*(?:\n(?=[^\s/])|[^\S ]\s*\Z)?|\s+")
_LINE_END = re.compile(r"\n(?=[^\s/])(?<=\S\n)")
_ODD = f"{END}\x0b\x0c\x1c\x1d\x1e\x1f"
BATTERY = (
    "Hello world, it's 12345 o'clock; they'LL say \"we've\" (I'd) don't!!",
    "  two  spaces   three\ttab\t\ttabs \n new\n\nlines\n \n  x\r\n\r\ny  \n",
    "trailing \n ",
    "trailing\t ",
    "\u00e9t\u00e9 e\u0301 \u00df \u01c5 \u0130i \u017f 's'S's\u017f '\u017f \ufb01 \uff21",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u0e01\u0e33",
    "\u0661\u0662\u0663\u0664 \u2460\u2461 \u00bd 3.14159 1,000,000 0x1F",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f600\U0001f600 \u202eabc \ufeffbom\x00nul",
    "\u00a0\u2003x\u2028y\u2029z\u0085w\u3000v\x1cu",
    "def f(x):\n    return x[0] // 2  # ok\n\n\nclass A:\n\tpass\n</s><|endoftext|><|end|>",
    "https://example.org/a/b?c=d&e=%20f#g a_b-c--d...e/\n/f",
    "".join(chr(i) for i in range(0x180)),
)


class ByteBpeTokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer made by others."""

    kind = KIND

    def __init__(self, spec: ByteLevelSpec) -> None:
        """Make the tokenizer.

        Args:
            spec: Checked by `checked_spec`.

        Raises:
            PippinError: P301 where a text does not come back, P502 where a package is missing.
        """
        # A file whose own "</s>" is not the end of a document keeps its id, without the name.
        controls = {**spec.controls, "</s>": spec.controls[spec.eos]}
        last = max((*spec.vocab.values(), *spec.controls.values()))
        pieces = [b""] * (1 + last)
        for piece, i in spec.vocab.items():
            pieces[i] = unspelled(piece) or b""
        super().__init__(spec.content(), SAVED_FILE, pieces, controls)
        self._encode_part, self._encode_words, self.library = _encoder(spec)
        self._find_words = ascii_words(known_pattern(spec.pre_tokenizer) or R50K).findall
        self._words = UnitCache(self._encode_words)
        self._cache = UnitCache(self._encode_units)
        self._choice = Choice(3)
        for text in BATTERY:
            back = self.decode(self.encode(text))
            if back != text:
                raise bad_tokenizer(f"the file is not lossless: {text!r} comes back as {back!r}")

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`.

        Raises:
            PippinError: P202 for a lone surrogate.
        """
        if self.library == "tokenizers":
            return [self._encode_one(text) for text in texts]
        results: list[Ids] = []
        for group in groups(texts):
            for text in group:
                utf8(text)
            if len(group) == 1:
                parts = self.cut(group[0], GROUP_CHARS)
                results.append(joined([self._encode_group([part])[0] for part in parts]))
            else:
                results += self._encode_group(group)
        return results

    def _encode_units(self, units: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        held = "".join(units)
        if held.isascii() and END not in held:
            return self._encode_ascii(units)
        apart = [not unit.isascii() or END in unit for unit in units]
        return encode_apart(units, apart, self._encode_ascii, self._encode_part)

    def _encode_ascii(self, units: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        return encode_in_words(units, self._find_words, self._words)

    def _encode_group(self, texts: Sequence[str]) -> list[Ids]:
        """In the way that is the fastest for such text."""
        chars = sum(map(len, texts))
        way = self._choice.next(chars)
        began = time.thread_time()
        encode = (self._by_units, self._by_words, self._encode_one)[way]
        rows = [encode(text) for text in texts]
        self._choice.took(way, chars, time.thread_time() - began)
        return rows

    def _by_units(self, text: str) -> Ids:
        """By stretches between spaces, each distinct one once."""
        units: list[str] = []
        for part in self.cut(text, PART_CHARS):
            units += _units(part)
        return self._cache.encode(units)[0]

    def _by_words(self, text: str) -> Ids:
        """By words and signs, each distinct one once."""
        parts = self.cut(text, PART_CHARS)
        if text.isascii() and END not in text:
            return self._words.encode(self._find_words(END.join([*parts, ""])))[0]
        return joined(
            [
                self._words.encode(self._find_words(part + END))[0]
                if part.isascii() and END not in part
                else self._encode_part(part)
                for part in parts
            ]
        )

    def cut(self, text: str, max_chars: int) -> list[str]:
        """Cut between words or lines, else at a multiple of 8,000 characters."""
        return cut_where(text, max_chars, last_place, PART_CHARS)

    def _encode_one(self, text: str) -> Ids:
        utf8(text)
        return joined([self._encode_part(part) for part in self.cut(text, PART_CHARS)])


def _units(text: str) -> list[str]:
    """The stretches of a text, with empty ones among them; of most text without the expression."""
    if not text.isascii() or any(character in text for character in _ODD):
        return _UNITS.findall(text)
    marked = _LINE_END.sub(f"\n{END}", text).replace(" ", f"{END} ")
    if "  " in text:
        # The first joins pairs of spaces, the second the pairs.
        marked = marked.replace(f" {END} ", "  ").replace(f" {END} ", "  ")
    for white in "\n\t\r":
        marked = marked.replace(f"{white}{END} ", f"{white} ")
    return marked.split(END)


def last_place(text: str, start: int, end: int) -> int:
    """The last place in `(start, end]` where a cut changes no ids, else `start`."""
    for begin in (max(start, end - _NEAR_CHARS), start):
        found = start
        for match in _PLACE.finditer(text, begin, end + 2):
            place = match.end() if match.group() == "\n" else match.start()
            if start < place <= end:
                found = place
        if found > start:
            return found
    return start


def _encoder(spec: ByteLevelSpec) -> tuple[Callable[[str], Ids], EncodeUnits, str]:
    """Functions for a part of a text and for words, and the library they use."""
    if spec.merges is None:
        ranks = {unspelled(piece) or b"": rank for piece, rank in spec.vocab.items()}
        pattern = known_pattern(spec.pre_tokenizer)
        if pattern is None:
            raise bad_tokenizer("ranks without merges need one of the known regular expressions")
        return *_with_tiktoken(pattern, ranks, None), "tiktoken"
    whole = _with_tokenizers(spec, spec.pre_tokenizer, spec.ignore_merges)
    pattern = known_pattern(spec.pre_tokenizer)
    if pattern is None:
        return whole, _each(whole), "tokenizers"
    alone = _with_tokenizers(spec, None, False)
    found = _ranks(spec, alone)
    if found is None:
        return whole, _each(whole), "tokenizers"
    ids = np.array([spec.vocab[piece] for piece in found], dtype=np.uint32)
    ranks = {unspelled(piece) or b"": rank for rank, piece in enumerate(found)}
    fast, words = _with_tiktoken(pattern, ranks, ids)
    if any(fast(text).tolist() != whole(text).tolist() for text in BATTERY):
        return whole, _each(whole), "tokenizers"
    return fast, words, "tiktoken"


def _each(encode: Callable[[str], Ids]) -> EncodeUnits:
    """Words one by one by a function for parts."""

    def encode_words(words: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        rows = [encode("" if word == END else word) for word in words]
        return joined(rows), np.array([len(row) for row in rows], np.int64)

    return encode_words


def _ranks(spec: ByteLevelSpec, alone: Callable[[str], Ids]) -> list[str] | None:
    """The pieces in the order in which tiktoken is to join them; None where no order will do.

    tiktoken joins any neighbours that make a piece, the file only those of its merges. Whether two
    neighbours x and y can come about that make a piece t and are not merged is decided by t alone: up
    to then nothing was joined across the ends of t. So they differ exactly where some t, encoded
    by its merges, ends as two pieces. A t that ends as more never comes about by merging.

    Args:
        spec: With merges.
        alone: Ids of byte-level characters by the merges only.
    """
    made = list(dict.fromkeys(merge.replace(" ", "") for merge in spec.merges or ()))
    known = {*made, *BYTE_CHARACTERS}
    others = (
        [p for p in spec.vocab if p not in known and unspelled(p)] if spec.ignore_merges else []
    )
    pieces = list(BYTE_CHARACTERS)
    previous, seen = "", set()
    for merge in spec.merges or ():
        piece = merge.replace(" ", "")
        if piece != previous and piece in seen:
            return None  # Its merges have different ranks: which one counts would have to be known.
        seen.add(piece)
        previous = piece
    for piece in (*made, *others):
        count = len(alone(piece))
        if count == 2:
            return None
        if count == 1 or spec.ignore_merges:
            pieces.append(piece)
    return pieces


def _with_tiktoken(
    pattern: str, ranks: dict[bytes, int], ids: Ids | None
) -> tuple[Callable[[str], Ids], EncodeUnits]:
    """Encoding by tiktoken; `ids` gives the id of each rank, None where they are equal."""
    tiktoken = _import("tiktoken", "tiktoken>=0.8")
    try:
        encoding = tiktoken.Encoding(
            KIND, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except (ValueError, KeyError, OverflowError) as error:
        raise bad_tokenizer(f"tiktoken refuses the vocabulary: {error}") from error

    def encode(text: str) -> Ids:
        found = np.array(encoding.encode_ordinary(text), dtype=np.uint32)
        return found if ids is None else ids[found]

    def encode_words(words: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        # Words of ASCII, of which `END` is none.
        rows = [() if word == END else encoding.encode_ordinary(word) for word in words]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        found = np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum()))
        return found if ids is None else ids[found], lengths

    return encode, encode_words


def _with_tokenizers(
    spec: ByteLevelSpec, cutting: Any, ignore_merges: bool
) -> Callable[[str], Ids]:
    """Encoding by the library of Hugging Face, without added tokens."""
    tokenizers = _import("tokenizers", "tokenizers>=0.20")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": dict(spec.vocab),
        "merges": list(spec.merges or ()),
    }
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": cutting,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    try:
        made = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # The library raises nothing narrower.
        raise bad_tokenizer(f"the library tokenizers refuses the vocabulary: {error}") from error

    def encode(text: str) -> Ids:
        return np.array(made.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    return encode


def _import(package: str, needed: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise PippinError(
            "P502",
            f"the package {package}, which reads imported tokenizers, cannot be imported: {error}",
            remedy=f"pip install '{needed}'",
        ) from error
