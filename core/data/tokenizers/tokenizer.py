"""Tokenizers: text to token ids and back without losing a byte.

Kinds that Pippin makes: `bpe` and `unigram`, sentencepiece models with byte fallback and settings
under which every string survives; `char`, one id per character of the text it was made from;
`byte`, the 256 bytes. Imported: `byte_bpe`, the byte-level BPE of other models. Text never becomes a
control id: `<|end|>` typed by a user is seven characters. A document in the token stream is
followed by `eos_id`, so `eos_id` also stands before a document's first token (`bos_id`). Making one
from text is `core.data.tokenizers.training`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.data.tokenizers.base import (
    CHAT_SYMBOLS,
    KINDS,
    BaseTokenizer,
    Ids,
    Tokenizer,
    bad_tokenizer,
    code_points,
    cut_text,
    num_threads,
    utf8,
)
from core.data.tokenizers.byte_bpe import ByteBpeTokenizer
from core.data.tokenizers.byte_level import KIND as BYTE_BPE_KIND
from core.data.tokenizers.byte_level import SAVED_FILE as BYTE_BPE_FILE
from core.data.tokenizers.byte_level import read_bounded, spec_from_saved
from core.data.tokenizers.byte_level_import import (
    RANK_SUFFIX,
    WORD_FILES,
    from_rank_file,
    from_tokenizer_json,
    from_word_files,
    switched_off,
)
from core.data.tokenizers.sentencepiece_tokenizer import (
    NUM_FIXED_PIECES,
    SPACE_SIGN,
    SentencePieceTokenizer,
    import_sentencepiece,
    reason_of,
)
from core.data.tokenizers.sentencepiece_tokenizer import PIECE_FILE as BPE_FILE
from core.errors import PippinError

__all__ = [
    "BPE_FILE",
    "BYTE_BPE_FILE",
    "CHAT_SYMBOLS",
    "JSON_FILE",
    "KINDS",
    "MIN_BPE_VOCAB",
    "NUM_FIXED_PIECES",
    "SPACE_SIGN",
    "ByteBpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Ids",
    "SentencePieceTokenizer",
    "Tokenizer",
    "code_points",
    "cut_text",
    "import_sentencepiece",
    "load_tokenizer",
    "num_threads",
    "reason_of",
    "tokenizer_from_bytes",
]

JSON_FILE = "tokenizer.pippin.json"
MIN_BPE_VOCAB = NUM_FIXED_PIECES + 16


class CharTokenizer(BaseTokenizer):
    """One id per character, in code point order, then the controls."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        """Make the tokenizer of a set of characters, given sorted and without repetition."""
        if not characters or list(characters) != sorted(set(characters)):
            raise bad_tokenizer("the characters are not sorted, repeat or are none")
        content = _json_content("char", characters)
        pieces = [utf8(c) for c in characters]
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


class ByteTokenizer(BaseTokenizer):
    """The 256 bytes of UTF-8, then the controls. Encodes everything, needs no training."""

    kind = "byte"

    def __init__(self) -> None:
        names = ("</s>", *CHAT_SYMBOLS)
        pieces = [bytes([i]) for i in range(256)] + [b""] * len(names)
        controls = {name: 256 + i for i, name in enumerate(names)}
        super().__init__(_json_content("byte", ""), JSON_FILE, pieces, controls)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`."""
        return [np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint32) for text in texts]


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer from its file, or from a folder (run, shards or model) that holds one.

    Beside Pippin's own files these are read: a sentencepiece `.model`, a `tokenizer.json` of
    Hugging Face with byte-level BPE, a `.tiktoken` rank file, GPT-2's `vocab.bpe` and
    `encoder.json`.

    Raises:
        PippinError: P301 where there is none or it cannot be used.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise bad_tokenizer(f"no tokenizer at {path}")
    if path.suffix == RANK_SUFFIX:
        return ByteBpeTokenizer(from_rank_file(path))
    if path.name in WORD_FILES:
        return ByteBpeTokenizer(from_word_files(path))
    return tokenizer_from_bytes(read_bounded(path), path)


def tokenizer_from_bytes(content: bytes, path: Path | None = None) -> Tokenizer:
    """Make a tokenizer of the content of its file.

    Args:
        content: A sentencepiece model, a JSON of Pippin, or a `tokenizer.json` of Hugging Face.
        path: Where it was read, for messages, and for the files beside it.

    Raises:
        PippinError: P301 where it cannot be used.
    """
    is_json = content.lstrip().startswith(b"{") or (path is not None and path.suffix == ".json")
    if not is_json:
        return SentencePieceTokenizer(content)
    name = "the tokenizer" if path is None else str(path)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise bad_tokenizer(f"{name} is not readable: {why}") from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict) and "format" not in data:
        spec = from_tokenizer_json(data, name, None if path is None else path.parent)
        made = ByteBpeTokenizer(spec)
        made.changes = switched_off(data)
        return made
    tokenizer = _own(data, name)
    if tokenizer.fingerprint != hashlib.sha256(content).hexdigest():
        raise bad_tokenizer(f"{name} was changed after it was written")
    return tokenizer


def _in_folder(folder: Path) -> Path:
    names = (BPE_FILE, JSON_FILE, BYTE_BPE_FILE, *WORD_FILES)
    candidates = [folder / name for name in names if (folder / name).is_file()]
    candidates += sorted(folder.glob(f"*{RANK_SUFFIX}"))
    if not candidates:
        looked = ", ".join(
            (BPE_FILE, JSON_FILE, BYTE_BPE_FILE, *WORD_FILES[::2], f"*{RANK_SUFFIX}")
        )
        raise bad_tokenizer(f"no tokenizer in {folder} (looked for {looked})")
    return candidates[0]


def _own(data: Any, name: str) -> Tokenizer:
    if not isinstance(data, dict) or data.get("format") != "pippin-tokenizer":
        raise bad_tokenizer(f"{name} is not a tokenizer of Pippin nor a sentencepiece model")
    if data.get("kind") == "byte":
        return ByteTokenizer()
    if data.get("kind") == BYTE_BPE_KIND:
        return ByteBpeTokenizer(spec_from_saved(data, name))
    characters = data.get("characters")
    if data.get("kind") != "char" or not isinstance(characters, str):
        raise bad_tokenizer(f"{name} has kind {data.get('kind')!r}, known are char, byte, byte_bpe")
    return CharTokenizer(characters)


def _json_content(kind: str, characters: str) -> bytes:
    data = {"format": "pippin-tokenizer", "version": 1, "kind": kind, "characters": characters}
    return (json.dumps(data, indent=1) + "\n").encode()
