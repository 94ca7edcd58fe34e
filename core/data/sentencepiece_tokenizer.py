"""Sentencepiece models, kinds "bpe" and "unigram", and encoding with them fast.

A text is encoded in units: a run of spaces with the word after it, a newline, U+2581. In a model
of which no piece lies across two units this changes nothing, and each distinct unit is encoded
once. A unit of more than 2,000 characters is encoded in parts of 2,000.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.tokenizer_base import (
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
from core.data.unit_cache import UnitCache, unit_text
from core.errors import PippinError

PIECE_FILE = "tokenizer.model"
# unk, bos, eos, pad, the chat symbols and 256 bytes come before the first learned piece.
NUM_FIXED_PIECES = 4 + len(CHAT_SYMBOLS) + 256

_META = "\u2581"  # sentencepiece's sign for a space
# Encoding is done in parts: 64 KB at once takes 1.5 times as long as 2 KB parts (2026-11-21, Xeon),
# and the memory for a whole book is 100 times the book's.
_PART_CHARS = 2_000
# Units that are encoded at once: about as many characters.
_LINES = 200
_SPACES = re.compile("( {2,})")
_UNIGRAM, _BPE = 1, 2


class SentencePieceTokenizer(BaseTokenizer):
    """A sentencepiece model that loses nothing."""

    def __init__(self, content: bytes) -> None:
        """Read a model.

        Args:
            content: The bytes of a `.model` file.

        Raises:
            PippinError: P301 for bytes that are no model, or a model that loses characters.
        """
        spm = import_sentencepiece()
        try:
            self._sp = spm.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise bad_tokenizer(f"the file is not a sentencepiece model: {error}") from error
        if self._sp.eos_id() < 0:
            raise bad_tokenizer("the model has no end-of-document piece `</s>`")
        pieces, controls = self._table()
        controls["</s>"] = int(self._sp.eos_id())
        super().__init__(content, PIECE_FILE, pieces, controls)
        trained_as = _model_type(content)
        self.kind = "unigram" if trained_as == _UNIGRAM else "bpe"
        self._meta_ids = self._byte_ids(_META)
        self.in_units = trained_as in (_UNIGRAM, _BPE) and self._units_are_independent(content)
        self._newline = next(iter(self._sp.encode("\n")), -1)
        self._cache = UnitCache(self._encode_units)
        self._check_lossless()

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

    def _units_are_independent(self, content: bytes) -> bool:
        """Whether no piece lies across two units and nothing is changed before pieces are found."""
        if not _text_is_kept(content):
            return False
        sp = self._sp
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i):
                continue
            piece = sp.id_to_piece(i)
            if ("\n" in piece and piece != "\n") or _META in piece.lstrip(_META) or " " in piece:
                return False
        return True

    def _check_lossless(self) -> None:
        for text in ("a  b ", " a", "\t\n\r\n", "0\u00e9\u6f22\U0001f600", "<|end|></s>", _META):
            back = self.decode(self.encode(text))
            if back != text:
                raise bad_tokenizer(f"the model is not lossless: {text!r} comes back as {back!r}")

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
        units: list[str] = []
        ends = []
        for text in texts:
            _add_units(text, units)
            ends.append(len(units))
        try:
            ids, starts = self._cache.encode(units)
        except UnicodeEncodeError:
            for text in texts:
                utf8(text)
            raise
        return np.split(ids, starts[ends[:-1]])

    def _encode_units(self, units: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Ids of units one after the other, uint32 `[n]`, and how many each has, int64 `[units]`.

        Many short ones at once, with newlines between: no piece lies across one.
        """
        texts = [unit_text(unit) for unit in units]
        alone = np.array([len(t) > _PART_CHARS or t in ("\n", _META) for t in texts], dtype=bool)
        ids, lengths = self._encode_lines([t for t, own in zip(texts, alone) if not own])
        if not alone.any():
            return ids, lengths
        found = [self._encode_alone(texts[i]) for i in np.flatnonzero(alone).tolist()]
        counts = np.zeros(len(units), np.int64)
        counts[~alone], counts[alone] = lengths, [len(row) for row in found]
        place = np.repeat(alone, counts)
        out = np.empty(len(place), np.uint32)
        out[~place], out[place] = ids, joined(found)
        return out, counts

    def _encode_lines(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
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


_META_UNIT = f"{_META} "


def _add_units(text: str, units: list[str]) -> None:
    """Append the units of a text.

    They have the form that `unit_text` reads: "word" for " word", "word " for "word".
    """
    for i, run in enumerate(text.split(_META)):
        if i > 0:
            units.append(_META_UNIT)
        lines = run.split("\n")
        for j, line in enumerate(lines):
            if j > 0:
                units.append("\n ")
            if not line:
                continue
            if "  " in line:
                _add_spaced(line, units)
                continue
            words = line.split(" ")
            if words[0]:
                words[0] += " "
                units += words
            else:
                units += words[1:]


def _add_spaced(line: str, units: list[str]) -> None:
    """Append the units of a line with runs of spaces."""
    pieces = _SPACES.split(line)
    for spaces, piece in zip(["", *pieces[1::2]], pieces[::2]):
        words = piece.split(" ")
        if spaces or words[0]:
            words[0] = f"{spaces}{words[0]} "
            units += words
        else:
            units += words[1:]


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


def _model_type(content: bytes) -> int:
    """How a model was trained, as its file says; sentencepiece does not tell."""
    for trainer in _fields(content, 2):
        if isinstance(trainer, bytes):
            return next((v for v in _fields(trainer, 3) if isinstance(v, int)), _UNIGRAM)
    return _UNIGRAM


def _text_is_kept(content: bytes) -> bool:
    """Whether a model's normalizer changes nothing."""
    for normalizer in _fields(content, 3):
        if isinstance(normalizer, bytes):
            charsmap = any(_fields(normalizer, 2))
            flags = [list(_fields(normalizer, number)) for number in (3, 4)]
            return not charsmap and all(values and values[-1] == 0 for values in flags)
    return False


def _fields(message: bytes, number: int) -> Iterator[int | bytes]:
    """The values of one field of a protobuf message.

    Only the encoding of https://protobuf.dev/programming-guides/encoding is needed, not the package.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        value: int | bytes | None = None
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value = message[at : at + size]
            at += size
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            return
        if key >> 3 == number and value is not None:
            yield value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, at


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
