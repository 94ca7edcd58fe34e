"""Sentencepiece models, kinds "bpe" and "unigram", and encoding with them fast.

A text is encoded in units: a run of spaces with the word after it, a newline, U+2581. In a model
of which no piece lies across two units this changes nothing, and each distinct unit is encoded
once. Where no piece of a bpe model mixes letters, digits and other characters either, a new unit is
put together of such words, each distinct one encoded once; or the text is taken apart into them at
once, whichever is measured to be faster. A unit of more than 2,000 characters is encoded in parts
of 2,000.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.tokenizers.base import (
    CHAT_SYMBOLS,
    GROUP_CHARS,
    BaseTokenizer,
    Ids,
    bad_tokenizer,
    cut_text,
    cut_where,
    groups,
    joined,
    utf8,
)
from core.data.tokenizers.sentencepiece_file import BPE, UNIGRAM, WORD, keeping_text, model_type
from core.data.tokenizers.unit_cache import (
    END,
    Choice,
    EncodeUnits,
    UnitCache,
    encode_apart,
    encode_in_words,
)
from core.errors import PippinError

PIECE_FILE = "tokenizer.model"
# unk, bos, eos, pad, the chat symbols and 256 bytes come before the first learned piece.
NUM_FIXED_PIECES = 4 + len(CHAT_SYMBOLS) + 256

SPACE_SIGN = "\u2581"
_META = SPACE_SIGN  # sentencepiece writes a space so
# Encoding is done in parts: 64 KB at once takes 1.5 times as long as 2 KB parts (2026-11-21, Xeon),
# and the memory for a whole book is 100 times the book's.
_PART_CHARS = 2_000
# Units that are encoded at once: about as many characters.
_LINES = 200
_UNITS = re.compile(f" *[^ \n{_META}]+| +|\n|{_META}")
# Letters, digits and all else are not mixed in a piece, where a model is trained as usual.
# Signs of numbers, as a half, are alphanumeric for Python.
_SIGNS = "_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u218b\u2460-\u249b\u2776-\u2793"
_WORDS = re.compile(
    f" *(?:[^\\W\\d{_SIGNS}]+|\\d+|(?:[^\\w \n{END}{_META}]|[{_SIGNS}])+)| +|\n|{END}|{_META}"
)
_HALF_UNIT = re.compile(f"[^ \n{_META}]{{{_PART_CHARS // 2}}}")
_BY_UNITS, _BY_WORDS = 0, 1
# Text that models lose: spaces, white space, rare and composed characters, symbols, odd code points.
_PROBES = (
    "a  b ",
    " a",
    "   ",
    "\t\n\r\n\n x\n",
    "0\u00e9\u6f22\U0001f600 1\u00bd \ufb01\uff21 e\u0301 \u2167",
    "<|end|></s><s><unk><0x41>",
    _META,
    f"a{_META}{_META} b",
    "\u2585 \u2047 \ufeff\u200b\u00a0\u3000\u2028",
    "".join(map(chr, range(0x180))),
)


class SentencePieceTokenizer(BaseTokenizer):
    """A sentencepiece model that loses nothing."""

    def __init__(self, content: bytes) -> None:
        """Read a model.

        What the model does to text before it looks for pieces is switched off (`changes`): a space in
        front, spaces left out, characters replaced. Its pieces and their ids stay.

        Args:
            content: The bytes of a `.model` file.

        Raises:
            PippinError: P301 for bytes that are no model, or for a model that loses characters.
        """
        self._sp = _processor(content)
        content, switched_off = keeping_text(content)
        if switched_off:
            self._sp = _processor(content)
        trained_as = model_type(content)
        self._check_usable(trained_as)
        pieces, controls = self._table()
        controls["</s>"] = int(self._sp.eos_id())
        super().__init__(content, PIECE_FILE, pieces, controls)
        self.changes = tuple(f"{name} off" for name in switched_off)
        self.kind = "unigram" if trained_as == UNIGRAM else "bpe"
        self._meta_ids = self._byte_ids(_META)
        self.in_units = trained_as in (UNIGRAM, BPE) and self._units_are_independent()
        self._newline = next(iter(self._sp.encode("\n")), -1)
        # Not those of unigram: which of two equal scores is larger may depend on what was added before.
        self.in_words = self.in_units and trained_as == BPE and self._words_are_independent()
        self._words = UnitCache(self._encode_words)
        self._choice = Choice(2)
        self._cache = UnitCache(self._encode_units)
        self._check_lossless()

    def _check_usable(self, trained_as: int) -> None:
        if self._sp.eos_id() < 0:
            raise bad_tokenizer("the model has no end-of-document piece `</s>`")
        if not any(self._sp.is_byte(i) for i in range(self._sp.vocab_size())):
            raise bad_tokenizer(
                "the model is not lossless: it has no pieces for single bytes",
                found="a character without a piece of its own, as the newline, would be lost "
                "(trained without byte_fallback)",
            )
        if trained_as == WORD:
            raise bad_tokenizer(
                "the model is not lossless: its pieces are whole words",
                found="the space before a word that it does not know would become U+2581",
            )
        if self._sp.id_to_piece(self._sp.piece_to_id(_META)) != _META:
            raise bad_tokenizer(
                "the model is not lossless: it has no piece for a single space",
                found="in bytes, a space is spelled as U+2581",
            )

    def _table(self) -> tuple[list[bytes], dict[str, int]]:
        sp, pieces, controls = self._sp, [], {}
        for i in range(sp.vocab_size()):
            piece = sp.id_to_piece(i)
            if sp.is_control(i) or sp.is_unknown(i):
                controls[piece] = i
                pieces.append(b"")
            elif sp.is_byte(i):
                pieces.append(bytes([int(piece[3:5], 16)]))  # "<0x41>"
            else:
                pieces.append(piece.replace(_META, " ").encode())
        return pieces, controls

    def _byte_ids(self, text: str) -> Ids:
        ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        return np.array(ids, dtype=np.uint32)

    def _units_are_independent(self) -> bool:
        """Whether no piece lies across two units."""
        return not any(
            ("\n" in piece and piece != "\n") or _META in piece.lstrip(_META) or " " in piece
            for piece in self._text_pieces()
        )

    def _words_are_independent(self) -> bool:
        """Whether no piece lies across two words."""
        pieces = (piece.replace(_META, " ") for piece in self._text_pieces())
        return all(END not in piece and len(_WORDS.findall(piece)) == 1 for piece in pieces)

    def _text_pieces(self) -> Iterator[str]:
        sp = self._sp
        for i in range(sp.vocab_size()):
            if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)):
                yield sp.id_to_piece(i)

    def _check_lossless(self) -> None:
        """Encode texts in every way that is used, and compare what comes back."""
        for text in _PROBES:
            for ids in (self.encode(text), self._encode_plain(text)):
                back = self.decode(ids)
                if back != text:
                    what = f"the model is not lossless: {text[:20]!r} comes back as {back[:20]!r}"
                    raise bad_tokenizer(what)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`.

        Raises:
            PippinError: P202 for a lone surrogate.
        """
        if not self.in_units:
            return [self._encode_plain(text) for text in texts]
        results: list[Ids] = []
        for group in groups(texts):
            if len(group) == 1 and len(group[0]) > GROUP_CHARS:
                parts = self.cut(group[0], GROUP_CHARS)
                results.append(joined([self._encode_group([part])[0] for part in parts]))
            else:
                results += self._encode_group(group)
        return results

    def cut(self, text: str, max_chars: int) -> list[str]:
        """Cut between units, else at a multiple of 2,000 characters of one."""
        return cut_where(text, max_chars, _last_unit_end, _PART_CHARS)

    def _encode_group(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts that together are not long."""
        way, chars = _BY_UNITS, sum(map(len, texts))
        if self.in_words and not any(map(_may_hold_long_unit, texts)):
            way = self._choice.next(chars)
        find: Callable[[str], list[str]] = _units
        cache = self._cache
        if way == _BY_WORDS:
            find, cache = _WORDS.findall, self._words
        began = time.thread_time()
        units: list[str] = []
        ends = []
        for text in texts:
            units += find(text)
            ends.append(len(units))
        try:
            ids, starts = cache.encode(units)
        except UnicodeEncodeError:
            for text in texts:
                utf8(text)
            raise
        self._choice.took(way, chars, time.thread_time() - began)
        return np.split(ids, starts[ends[:-1]])

    def _encode_units(self, units: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Ids of units one after the other, uint32 `[n]`, and how many each has, int64 `[units]`."""
        encode = self._encode_in_words if self.in_words else self._encode_lines
        return self._encode_new(units, encode)

    def _encode_words(self, words: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        return self._encode_new(words, self._encode_lines)

    def _encode_new(
        self, units: Sequence[str], encode: EncodeUnits
    ) -> tuple[Ids, NDArray[np.int64]]:
        held = "".join(units)
        if max(map(len, units)) <= _PART_CHARS and not any(c in held for c in ("\n", _META, END)):
            return encode(units)
        apart = [len(u) > _PART_CHARS or u in ("\n", _META) or END in u for u in units]
        return encode_apart(units, apart, encode, self._encode_alone)

    def _encode_in_words(self, units: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        return encode_in_words(units, _WORDS.findall, self._words)

    def _encode_lines(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Many short texts at once, with newlines between: no piece lies across one."""
        step = _LINES
        parts = ["".join(f"{t}\n" for t in texts[i : i + step]) for i in range(0, len(texts), step)]
        rows = self._sp.encode([p.encode() for p in parts], num_threads=1) if parts else []
        flat = np.fromiter(chain.from_iterable(rows), np.uint32, sum(map(len, rows)))
        ends = np.flatnonzero(flat == self._newline)
        lengths = np.diff(ends, prepend=-1) - 1
        if len(lengths) != len(texts):
            raise RuntimeError("sentencepiece did not keep the newlines between units")
        return flat[flat != self._newline], lengths

    def _encode_alone(self, text: str) -> Ids:
        if text == _META:
            return self._meta_ids
        parts = [text[i : i + _PART_CHARS].encode() for i in range(0, len(text), _PART_CHARS)]
        rows = self._sp.encode(parts, num_threads=1)
        return np.fromiter(chain.from_iterable(rows), np.uint32, sum(map(len, rows)))

    def _encode_plain(self, text: str) -> Ids:
        """Encode in parts of 2,000 characters, cut where pieces seldom lie across."""
        found: list[Ids] = []
        for i, run in enumerate(text.split(_META)):
            if i > 0:
                # As a piece that character would come back as a space.
                found.append(self._meta_ids)
            for part in cut_text(run, _PART_CHARS):
                found.append(np.array(self._sp.encode(utf8(part)), dtype=np.uint32))
        return joined(found)


def _units(text: str) -> list[str]:
    """The units of a text, with empty ones among them; faster than by the expression."""
    if END in text or _META in text:
        return _UNITS.findall(text)
    marked = text.replace("\n", f"{END}\n{END}").replace(" ", f"{END} ")
    if "  " in text:
        # The first joins pairs of spaces, the second the pairs.
        marked = marked.replace(f" {END} ", "  ").replace(f" {END} ", "  ")
    return marked.split(END)


def _may_hold_long_unit(text: str) -> bool:
    """Whether a unit may be so long that it is encoded in parts; words would not be cut there."""
    half = _PART_CHARS // 2
    # Half of it is spaces, or the other half has none and so a stretch from a multiple of a quarter.
    if " " * half in text:
        return True
    step = half // 2
    return any(
        text.find(" ", i, i + step) < 0
        and text.find("\n", i, i + step) < 0
        and _HALF_UNIT.search(text, max(0, i - half), i + step + half)
        for i in range(0, len(text) - step + 1, step)
    )


def _last_unit_end(text: str, start: int, end: int) -> int:
    """The last boundary of units in `(start, end]`, else `start`; those at newlines come first."""
    newline = text.rfind("\n", start, end)
    if newline >= start:
        return newline + 1
    meta = text.rfind(_META, start, end)
    if meta >= start:
        return meta + 1
    place = text.rfind(" ", start + 1, end)
    while place > start and text[place - 1] == " ":
        place -= 1
    return max(place, start)


def _processor(content: bytes) -> Any:
    if not content:
        raise bad_tokenizer("the file of the tokenizer is empty")
    try:
        return import_sentencepiece().SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        why = reason_of(error)
        what = "the file is not a sentencepiece model"
        raise bad_tokenizer(f"{what}: {why}" if why else what) from error


def reason_of(error: Exception) -> str:
    """What sentencepiece says is wrong, without the place in its own source; perhaps nothing."""
    return re.sub(r"^[A-Z_]+: \S+\(\d+\) \[.*\]\s*", "", str(error)).strip()


def import_sentencepiece() -> Any:
    """The package, imported when first needed: it is not there on every machine that converts."""
    try:
        import sentencepiece
    except ImportError as error:
        raise PippinError(
            "P502",
            f"the package sentencepiece cannot be imported: {error}",
            remedy="pip install 'sentencepiece>=0.2'",
        ) from error
    return sentencepiece
