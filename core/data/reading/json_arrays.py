"""The elements of a JSON file that is one array, `[{...}, {...}]`, found as the file is read.

At most one element and one block of the file are held. What follows a broken element cannot be found.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from core.data.reading.bad_lines import (
    Tally,
    in_other_unicode,
    not_utf8,
    other_unicode,
    parse_record,
)
from core.data.reading.byte_streams import DamagedError, opened
from core.errors import PippinError

BLOCK_BYTES = 1_000_000
_LOOKED_AT_BYTES = 64_000
_SPACE = re.compile(r"[ \t\n\r]*")
# Finds ends only: what is in an element is judged by `parse_record`, as that of a line is.
_SCANNER = json.JSONDecoder()


class NoArrayError(Exception):
    """The file is no array; the argument is its beginning."""


def is_array_of_objects(path: Path) -> bool:
    """Whether a file begins as one, or is damaged, which its reader tells. It is read no further.

    Raises:
        PippinError: P201 for a file that cannot be opened, P502 for a missing package.
    """
    try:
        with opened(path) as stream:
            head = stream.read(_LOOKED_AT_BYTES).removeprefix(codecs.BOM_UTF8)
    except DamagedError:
        return True
    return re.match(rb"\s*\[\s*\{", head) is not None


def array_elements(blocks: Iterator[str], max_chars: int) -> Iterator[str]:
    """The elements of an array, each as its JSON.

    Args:
        blocks: The file's text.
        max_chars: Longest element, about.

    Raises:
        NoArrayError: Where it does not begin with `[`.
        DamagedError: For broken JSON, a longer element, and an array that does not end.
    """
    window = _Window(blocks)
    if window.next_char() != "[":
        raise NoArrayError(window.text)
    window.at += 1
    number = 0
    while number or window.next_char() != "]":
        number += 1
        window.next_char()
        yield window.element(number, max_chars)
        mark = window.next_char()
        if mark == "]":
            break
        if mark != ",":
            raise DamagedError(
                f"after record {number:,} there is {mark or 'no'!r} instead of , or ]"
            )
        window.at += 1
    window.at += 1
    if window.next_char():
        raise DamagedError("there is more after the end of the array")


@dataclass
class _Window:
    """The part of a text that is held.

    Attributes:
        blocks: What comes after it.
        text: The part.
        at: Everything before this place in it is done.
    """

    blocks: Iterator[str]
    text: str = ""
    at: int = 0

    def next_char(self) -> str:
        """The next character that is no white space, at which this stands then; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def element(self, number: int, max_chars: int) -> str:
        """The JSON value that begins here."""
        while True:
            try:
                end = _SCANNER.raw_decode(self.text, self.at)[1]
                # A number at the end of what is held may go on.
                if end < len(self.text) or not self._more():
                    found, self.at = self.text[self.at : end], end
                    return found
                continue
            except RecursionError as error:
                raise DamagedError(f"record {number:,} is nested too deeply") from error
            except ValueError as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            if len(self.text) - self.at > max_chars:
                limit = f"longer than {max_chars / 1e6:g} MB"
                raise DamagedError(f"record {number:,} is broken JSON ({why}), or {limit}")
            if not self._more():
                raise DamagedError(f"record {number:,} is broken JSON: {why}")

    def _more(self) -> bool:
        block = next(self.blocks, "")
        self.text, self.at = self.text[self.at :] + block, 0
        return bool(block)


def decoded_blocks(path: Path, stream: BinaryIO, tally: Tally, name: str) -> Iterator[str]:
    """A file as text, block by block; it ends at bytes that are no UTF-8, which are rejected.

    Args:
        path: The file, for messages.
        stream: Its bytes, unpacked.
        tally: What becomes of bad bytes, and counts a byte order mark.
        name: Name of the file in origins.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, held = 0, 1, b""
    while True:
        block = stream.read(BLOCK_BYTES)
        if offset == 0 and (coding := other_unicode(block)):
            reason, problem = in_other_unicode(path, coding)
            tally.reject(reason, f"{name}:1", problem)
            return
        if offset == 0 and block.startswith(codecs.BOM_UTF8):
            tally.done["files began with a byte order mark, dropped"] += 1
            block, offset = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            reason, problem = not_utf8(path, held + block, line, offset - len(held), error)
            tally.reject(reason, f"{name}:{line}", problem)
            return
        if text:
            yield text
        if not block:
            return
        offset += len(block)
        line += block.count(b"\n")
        held = decoder.getstate()[0]


def no_array(path: Path, start: str) -> tuple[str, PippinError]:
    """The reason and the error for other JSON.

    Args:
        path: The file.
        start: Its beginning.
    """
    first, _, rest = start.lstrip().partition("\n")
    lines = rest.lstrip().startswith("{") and isinstance(parse_record(first, ""), dict)
    found = f"needed: [{{...}}, {{...}}]; it begins with {start.lstrip()[:20]!r}"
    remedy = "write its records as one array, or one a line in a file that ends in .jsonl"
    if lines:
        inner = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
        packed = path.suffix if inner != path else ""
        target = inner.with_suffix(f".jsonl{packed}")
        found = "each line is a record of its own, as in a file that ends in .jsonl"
        remedy = f"cp '{path}' '{target}', and give that one as the input"
    return "no array of objects", PippinError(
        "P202", f"{path} is no JSON array of objects", found=found, remedy=remedy
    )
