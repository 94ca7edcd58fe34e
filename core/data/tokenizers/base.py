"""What all kinds of tokenizers share: the protocol, the saved form, and cutting text."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.cores import usable_cores
from core.durable import replace_file
from core.errors import PippinError

# Kinds that Pippin makes; "byte_bpe" is imported only.
KINDS = ("bpe", "unigram", "char", "byte")
CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# Texts encoded at once: a multiple of the parts in which each kind encodes endless words.
GROUP_CHARS = 200_000

Ids = NDArray[np.uint32]


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        kind: "bpe", "unigram", "char", "byte" or "byte_bpe".
        vocab_size: Number of ids.
        bos_id: Id that stands before a document's first token: equal to `eos_id`.
        eos_id: Id that follows a document.
        control_ids: Id of each symbol that text can never become; "</s>" is `eos_id`.
        fingerprint: sha256 of the saved file, in hex.
        changes: What was switched off in a file of another origin so that text comes back as it was,
            in words; the saved file has it off already.
    """

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    control_ids: Mapping[str, int]
    fingerprint: str
    changes: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a control id."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`. Starts no threads; not to be shared by any."""
        ...

    def cut(self, text: str, max_chars: int) -> list[str]:
        """Cut a long text so that the ids of the parts, joined, are those of the text.

        This holds for every text with `max_chars` of 8,000 or more; with fewer, for every text
        that has a place to cut in each stretch of `max_chars`.
        """
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


class BaseTokenizer(ABC):
    """What the kinds share: a saved form, and the bytes of each id."""

    kind: str

    def __init__(
        self,
        content: bytes,
        file_name: str,
        pieces: Sequence[bytes],
        controls: Mapping[str, int],
    ) -> None:
        self._content = content
        self._file_name = file_name
        self._pieces = tuple(pieces)
        self.control_ids: Mapping[str, int] = dict(controls)
        self.vocab_size = len(self._pieces)
        self.eos_id = self.control_ids["</s>"]
        self.bos_id = self.eos_id
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.changes: tuple[str, ...] = ()

    @property
    def content(self) -> bytes:
        """The saved file."""
        return self._content

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        """Other processes make the tokenizer anew from its file."""
        from core.data.tokenizers.tokenizer import tokenizer_from_bytes

        return tokenizer_from_bytes, (self._content,)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of several texts, each uint32 `[n]`."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a control id."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def cut(self, text: str, max_chars: int) -> list[str]:
        """Cut anywhere: each character has its own ids."""
        check_max_chars(max_chars)
        return [text[i : i + max_chars] for i in range(0, len(text), max_chars)]

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
        """Write the tokenizer's one file into a folder and return its path.

        Raises:
            PippinError: P312 where it cannot be written; what was there is as it was.
        """
        path = folder / self._file_name
        write_atomically(path, self._content)
        return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and wait until it is on the disk.

    Raises:
        PippinError: P312 for a full disk or a folder that may not be written.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise PippinError(
            "P312",
            f"{path} cannot be written: {error.strerror or error}.",
            remedy="a folder that may be written, on a disk with room",
            kept="No file was left half written.",
        ) from error


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


def cut_where(
    text: str, max_chars: int, last_place: Callable[[str, int, int], int], unit: int
) -> list[str]:
    """Cut a text at places that do not change its ids.

    Args:
        text: Any text.
        max_chars: Longest part.
        last_place: `(text, start, end)` to the last such place in `(start, end]`, else `start`.
        unit: A stretch without any is encoded in parts of so many characters: cut at a multiple.
    """
    check_max_chars(max_chars)
    parts, start = [], 0
    blind = max_chars // unit * unit or max_chars
    while len(text) - start > max_chars:
        place = last_place(text, start, start + max_chars)
        if place <= start:
            place = start + blind
        parts.append(text[start:place])
        start = place
    if start < len(text):
        parts.append(text[start:])
    return parts


def groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in their order, in groups of at most `GROUP_CHARS`; a longer one is alone."""
    group: list[str] = []
    chars = 0
    for text in texts:
        if group and chars + len(text) > GROUP_CHARS:
            yield group
            group, chars = [], 0
        group.append(text)
        chars += len(text)
    if group:
        yield group


def check_max_chars(max_chars: int) -> None:
    """Refuse parts of no characters, which would never end."""
    if max_chars < 1:
        raise ValueError(f"max_chars is {max_chars}; it must be at least 1")


def code_points(text: str) -> NDArray[np.uint32]:
    """uint32 `[len(text)]`."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def joined(parts: Sequence[Ids]) -> Ids:
    """The ids of parts in a row, uint32 `[n]`."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint32), *parts])


def utf8(text: str) -> bytes:
    """The text's bytes.

    Raises:
        PippinError: P202 for a lone surrogate.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PippinError(
            "P202",
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start:,}, which is no character",
        ) from error


def bad_tokenizer(what: str, found: str = "", choices: Sequence[str] = ()) -> PippinError:
    """P301: a tokenizer that cannot be used."""
    return PippinError(
        "P301",
        what,
        found=found,
        choices=choices,
        remedy="data.tokenizer=auto, for which one is trained",
    )


def num_threads() -> int:
    """Threads for training."""
    return min(8, usable_cores())
