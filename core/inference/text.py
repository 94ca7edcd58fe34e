"""Text for the terminal: whole characters from token bytes, and no control codes.

A token may end in the middle of a UTF-8 character, and a model can be taught to write escape
sequences. `StreamDecoder` waits for whole characters; `printable` shows controls instead of sending
them.
"""

import codecs
import unicodedata
from collections.abc import Sequence
from typing import Protocol


class BytesDecoder(Protocol):
    """The part of a tokenizer that turns ids into bytes, token by token."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 bytes of the tokens; the bytes of a text are those of its tokens in a row."""
        ...


class StreamDecoder:
    """Tokens in, text out, with no character cut in two.

    The pieces in a row equal the decoding of all tokens at once; bytes that are no UTF-8 become
    U+FFFD.
    """

    def __init__(self, tokenizer: BytesDecoder) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was not completed."""
        return self._decoder.decode(b"", final=True)


def decode_tokens(tokenizer: BytesDecoder, tokens: Sequence[int]) -> str:
    """Text of tokens that continue another text: no space is added or taken at its start."""
    return tokenizer.decode_bytes(list(tokens)).decode("utf-8", errors="replace")


def printable(text: str) -> str:
    """Text that can only be read, not obeyed, by a terminal.

    Newline and tab stay. Other C0 controls and DEL become their Unicode pictures (ESC is U+241B),
    C1 controls and lone surrogates U+FFFD. Marks that reorder text (bidirectional overrides,
    embeddings, isolates) are left out.
    """
    return "".join(map(_printable_char, text))


def _printable_char(char: str) -> str:
    if char in "\n\t" or (char.isascii() and char.isprintable()):
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if code < 0xA0 or unicodedata.category(char) == "Cs":
        return "\ufffd"
    if char in _BIDI:
        return ""
    return "\n" if char in "\u2028\u2029" else char


# Unicode's Bidi_Control characters (UAX 9), the means of "Trojan Source".
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
