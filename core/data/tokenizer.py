"""Tokenizers: text to token ids and back without losing a byte.

Three kinds. `bpe`: sentencepiece BPE with byte fallback and settings under which every string
survives. `char`: one id per character of the text it was made from. `byte`: the 256 bytes. Text
never becomes a control id: `<|end|>` typed by a user is seven characters. A document in the token
stream is followed by `eos_id`, so `eos_id` also stands before a document's first token (`bos_id`).
Making one from text is `core.data.tokenizer_training`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import PippinError

KINDS = ("bpe", "char", "byte")
BPE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.pippin.json"
CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# unk, bos, eos, pad, the chat symbols and 256 bytes come before the first learned piece.
NUM_FIXED_PIECES = 4 + len(CHAT_SYMBOLS) + 256
MIN_BPE_VOCAB = NUM_FIXED_PIECES + 16

_META = "\u2581"  # sentencepiece's sign for a space
# Encoding is done in parts: 64 KB at once takes 1.5 times as long as 2 KB parts (2026-11-21, Xeon),
# and the memory for a whole book is 100 times the book's.
_PART_CHARS = 2_000

Ids = NDArray[np.uint32]


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        kind: "bpe", "char" or "byte".
        vocab_size: Number of ids.
        bos_id: Id that stands before a document's first token: equal to `eos_id`.
        eos_id: Id that follows a document.
        control_ids: Id of each symbol that text can never become.
        fingerprint: sha256 of the saved file, in hex.
    """

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    control_ids: Mapping[str, int]
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a control id."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text; a character cut in the middle becomes U+FFFD."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text; control ids give none."""
        ...

    def token_bytes(self) -> NDArray[np.int64]:
        """int64 `[V]`: bytes of text that each id stands for; 0 for control ids."""
        ...

    def unknown_characters(self, text: str) -> tuple[str, ...]:
        """The characters of a text that cannot be encoded; only kind "char" has any."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the tokenizer's one file into a folder and return its path."""
        ...


class _Base:
    """What the kinds share: a saved form, and the bytes of each id."""

    kind: str

    def __init__(
        self, content: bytes, file_name: str, pieces: Sequence[bytes], controls: Mapping[str, int]
    ) -> None:
        self._content = content
        self._file_name = file_name
        self._pieces = tuple(pieces)
        self.control_ids: Mapping[str, int] = dict(controls)
        self.vocab_size = len(self._pieces)
        self.eos_id = self.control_ids["</s>"]
        self.bos_id = self.eos_id
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a control id."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text; a character cut in the middle becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text; control ids give none.

        Raises:
            PippinError: P204 for an id that the tokenizer does not have.
        """
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise PippinError(
                    "P204", f"token id {i} cannot be decoded: the tokenizer has {self.vocab_size:,}"
                )
        return b"".join(self._pieces[i] for i in checked)

    def token_bytes(self) -> NDArray[np.int64]:
        """int64 `[V]`: bytes of text that each id stands for; 0 for control ids."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    def unknown_characters(self, text: str) -> tuple[str, ...]:
        """The characters of a text that cannot be encoded: none."""
        return ()

    def save(self, folder: Path) -> Path:
        """Write the tokenizer's one file into a folder and return its path."""
        path = folder / self._file_name
        partial = folder / f".{self._file_name}.{os.getpid()}.tmp"
        partial.write_bytes(self._content)
        partial.replace(path)
        return path


class SentencePieceTokenizer(_Base):
    """A sentencepiece model that loses nothing."""

    kind = "bpe"

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
            raise _bad_tokenizer(f"the file is not a sentencepiece model: {error}") from error
        if self._sp.eos_id() < 0:
            raise _bad_tokenizer("the model has no end-of-document piece `</s>`")
        pieces, controls = self._table()
        controls["</s>"] = int(self._sp.eos_id())
        super().__init__(content, BPE_FILE, pieces, controls)
        self._meta_ids = self._byte_ids(_META)
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

    def _check_lossless(self) -> None:
        for text in ("a  b ", " a", "\t\n\r\n", "0\u00e9\u6f22\U0001f600", "<|end|></s>", _META):
            back = self.decode(self.encode(text))
            if back != text:
                raise _bad_tokenizer(f"the model is not lossless: {text!r} comes back as {back!r}")

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`.

        Raises:
            PippinError: P202 for a lone surrogate.
        """
        parts: list[bytes] = []
        plans = [self._plan(text, parts) for text in texts]
        rows = self._sp.encode(parts, num_threads=num_threads()) if parts else []
        encoded = [np.array(row, dtype=np.uint32) for row in rows]
        return [_joined([self._meta_ids if i < 0 else encoded[i] for i in plan]) for plan in plans]

    def _plan(self, text: str, parts: list[bytes]) -> list[int]:
        """Cut a text into `parts`; returns their indices, -1 for U+2581.

        That character is spelled in bytes: as a piece it would come back as a space.
        """
        plan: list[int] = []
        for i, run in enumerate(text.split(_META)):
            if i > 0:
                plan.append(-1)
            for part in cut_text(run, _PART_CHARS):
                plan.append(len(parts))
                parts.append(_utf8(part))
        return plan


class CharTokenizer(_Base):
    """One id per character, in code point order, then the controls."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        """Make the tokenizer of a set of characters, given sorted and without repetition."""
        if not characters or list(characters) != sorted(set(characters)):
            raise _bad_tokenizer("the characters are not sorted, repeat or are none")
        content = _json_content("char", characters)
        pieces = [_utf8(c) for c in characters]
        names = ("</s>", *CHAT_SYMBOLS)
        controls = {name: len(pieces) + i for i, name in enumerate(names)}
        super().__init__(content, JSON_FILE, pieces + [b""] * len(names), controls)
        self._characters = frozenset(characters)
        points = np.array([ord(c) for c in characters])
        self._id_of = np.full(points[-1] + 2, -1, dtype=np.int64)
        self._id_of[points] = np.arange(len(points))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`.

        Raises:
            PippinError: P202 for a character that the vocabulary lacks.
        """
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> Ids:
        points = code_points(text)
        ids = self._id_of[np.minimum(points, len(self._id_of) - 1)]
        if ids.size and ids.min() < 0:
            unknown = self.unknown_characters(text)
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:8])
            raise PippinError(
                "P202",
                f"{len(unknown)} characters are not among the {len(self._characters)} that this "
                f"character tokenizer was made from: {shown}",
                remedy="leave these characters out, or train with data.tokenizer=bpe",
            )
        return ids.astype(np.uint32)

    def unknown_characters(self, text: str) -> tuple[str, ...]:
        """The distinct characters of a text that cannot be encoded, sorted."""
        return tuple(sorted(set(text) - self._characters))


class ByteTokenizer(_Base):
    """The 256 bytes of UTF-8, then the controls. Encodes everything, needs no training."""

    kind = "byte"

    def __init__(self) -> None:
        names = ("</s>", *CHAT_SYMBOLS)
        pieces = [bytes([i]) for i in range(256)] + [b""] * len(names)
        controls = {name: 256 + i for i, name in enumerate(names)}
        super().__init__(_json_content("byte", ""), JSON_FILE, pieces, controls)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`."""
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint32) for text in texts]


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer from its file, or from a folder (run or shards) that holds one.

    Raises:
        PippinError: P301 where there is none or it cannot be used.
    """
    if path.is_dir():
        candidates = [path / name for name in (BPE_FILE, JSON_FILE) if (path / name).is_file()]
        if not candidates:
            raise _bad_tokenizer(f"no tokenizer in {path} (looked for {BPE_FILE}, {JSON_FILE})")
        path = candidates[0]
    if not path.is_file():
        raise _bad_tokenizer(f"no tokenizer at {path}")
    content = path.read_bytes()
    if not content.lstrip().startswith(b"{"):
        return SentencePieceTokenizer(content)
    tokenizer = _from_json(content, path)
    if tokenizer.fingerprint != hashlib.sha256(content).hexdigest():
        raise _bad_tokenizer(f"{path} was changed after it was written")
    return tokenizer


def cut_text(text: str, max_chars: int) -> list[str]:
    """Cut a text where no piece can lie across: after a newline, else before spaces, else anywhere.

    The parts joined are the text, each at most `max_chars` long.
    """
    parts, start = [], 0
    while len(text) - start > max_chars:
        end = start + max_chars
        cut = text.rfind("\n", start, end) + 1
        if cut <= start:
            cut = text.rfind(" ", start + 1, end)
            while cut > start and text[cut - 1] == " ":
                cut -= 1
        if cut <= start:
            cut = end
        parts.append(text[start:cut])
        start = cut
    if start < len(text):
        parts.append(text[start:])
    return parts


def code_points(text: str) -> NDArray[np.uint32]:
    """uint32 `[len(text)]`."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def _json_content(kind: str, characters: str) -> bytes:
    data = {"format": "pippin-tokenizer", "version": 1, "kind": kind, "characters": characters}
    return (json.dumps(data, indent=1) + "\n").encode()


def _from_json(content: bytes, path: Path) -> Tokenizer:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _bad_tokenizer(f"{path} is not readable: {error}") from error
    if not isinstance(data, dict) or data.get("format") != "pippin-tokenizer":
        raise _bad_tokenizer(f"{path} is not a tokenizer of Pippin nor a sentencepiece model")
    if data.get("kind") == "byte":
        return ByteTokenizer()
    characters = data.get("characters")
    if data.get("kind") != "char" or not isinstance(characters, str):
        raise _bad_tokenizer(f"{path} has kind {data.get('kind')!r}, known are char and byte")
    return CharTokenizer(characters)


def _bad_tokenizer(what: str) -> PippinError:
    return PippinError("P301", what, remedy="leave data.tokenizer out, so that one is trained")


def _joined(parts: Sequence[Ids]) -> Ids:
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint32), *parts])


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PippinError(
            "P202",
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start:,}, which is no character",
        ) from error


def num_threads() -> int:
    """Threads for encoding and training."""
    return min(8, os.cpu_count() or 1)


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
