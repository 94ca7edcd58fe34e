"""What becomes of input that cannot be used: an error that says where, or a count.

A reader hands each bad line, record or file to its `Tally`. With `on_bad_line="error"` the first one
is raised; with "skip" it is left out and counted by reason, with the place of the first one.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.errors import PippinError

OnBadLine = Literal["error", "skip"]

_SKIP = "data.on_bad_line=skip"
# Beginnings of files that are no text, whatever their name says.
_MAGIC = {
    b"\x1f\x8b": "a gzip file, whose name should end in .gz",
    b"\x28\xb5\x2f\xfd": "a zstd file, whose name should end in .zst",
    b"PAR1": "a parquet file, whose name should end in .parquet",
    b"PK\x03\x04": "a zip file, which must be unpacked first",
    b"%PDF": "a PDF, of which the text must be taken out first",
}
_UTF32_MARKS = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UNPACKERS = {".gz": "gzip -dc", ".zst": "zstd -dc"}


@dataclass
class Tally:
    """What was left out, dropped or changed in one pass over a source.

    Attributes:
        on_bad_line: Whether the first bad record is an error, or all of them are left out.
        bad: Number of bad lines, records and files left out, by reason.
        first: Where the first one of each reason is.
        done: Number of times that something else was done on purpose, in words.
    """

    on_bad_line: OnBadLine = "error"
    bad: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)

    def reject(self, reason: str, origin: str, error: PippinError) -> None:
        """Leave something out, or raise.

        Args:
            reason: Kind of problem, the same words for each of its kind.
            origin: Where it is, "data.jsonl:17".
            error: What a user is told where bad lines are errors.
        """
        if self.on_bad_line == "error":
            leave_out = f"leave out what is bad with {_SKIP}"
            error.remedy = f"{error.remedy}; or {leave_out}" if error.remedy else leave_out
            raise error
        self.bad[reason] += 1
        self.first.setdefault(reason, origin)

    def notes(self) -> tuple[str, ...]:
        """The counts in words, what was bad first."""
        bad = [f"{n:,} left out: {why} (first: {self.first[why]})" for why, n in self.bad.items()]
        return (*bad, *(f"{count:,} {what}" for what, count in self.done.items()))


def parse_record(line: str, where: str) -> tuple[str, PippinError] | dict[str, Any]:
    """A line of JSON as a record, or the reason and the error that it is none.

    Repeated fields and NaN, which Python would take, are refused.
    """
    try:
        record = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            why = f"{error.msg} at character {error.pos + 1:,}"
        return "broken JSON", PippinError("P202", f"{where} is not valid JSON: {why}")
    if not isinstance(record, dict):
        found = f"needed: an object, {{...}}; found: {type(record).__name__}"
        return "no JSON object", PippinError("P202", f"{where} is no JSON object", found=found)
    return record


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: it holds no lone surrogate."""
    if value.isascii():
        return True  # known without a look at the characters
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def lone_surrogate(value: str, where: str) -> tuple[str, PippinError]:
    """The reason and the error for a string with a lone surrogate."""
    at = next(i for i, char in enumerate(value) if "\ud800" <= char <= "\udfff")
    return "a lone surrogate", PippinError(
        "P202",
        f"{where} holds a lone surrogate, which is no character",
        found=f"U+{ord(value[at]):04X} at character {at:,} of the text",
    )


def not_utf8(
    path: Path, block: bytes, line: int, offset: int, error: UnicodeDecodeError
) -> tuple[str, PippinError]:
    """The reason and the error for bytes that are no UTF-8.

    Args:
        path: The file.
        block: What was to be decoded.
        line: Number of the line that `block` begins in.
        offset: Place of `block` in the file, unpacked.
        error: What Python says of it.
    """
    at = line + block.count(b"\n", 0, error.start)
    content = "unpacked file" if path.suffix.lower() in _UNPACKERS else "file"
    found = f"byte 0x{block[error.start]:02X} at offset {offset + error.start:,} of the {content}"
    kind = next((k for magic, k in _MAGIC.items() if offset == 0 and block.startswith(magic)), None)
    return "not valid UTF-8", PippinError(
        "P202",
        f"{path}:{at} is not valid UTF-8",
        found=f"{found}\nit looks like {kind}" if kind else found,
        remedy="" if kind else _convert(path, "latin1"),
    )


def too_long(where: str, num_bytes: int) -> tuple[str, PippinError]:
    """The reason and the error for a record that is larger than what is read at once."""
    limit = f"a record longer than {num_bytes / 1e6:g} MB"
    return limit, PippinError("P202", f"{where} is {limit}")


def other_unicode(head: bytes) -> str:
    """Which other form of Unicode than UTF-8 the beginning of a file has; "" for none.

    By its mark; or without one, of UTF-16: Latin letters in it are valid UTF-8 with a NUL beside each.
    Either way a file must be left out whole: lines of it that happen to be valid UTF-8 are no text.
    """
    for marks, coding in ((_UTF32_MARKS, "utf-32"), (_UTF16_MARKS, "utf-16")):
        if head.startswith(marks):
            return coding
    head = head[:1_000]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(head) < 8 or max(even, odd) < 0.4 * len(head) or min(even, odd) > 0.1 * len(head):
        return ""
    return "utf-16le" if odd > even else "utf-16be"


def in_other_unicode(path: Path, coding: str) -> tuple[str, PippinError]:
    """The reason and the error for a file in UTF-16 or UTF-32.

    Args:
        path: The file.
        coding: From `other_unicode`.
    """
    marked = coding in ("utf-16", "utf-32")
    return f"text in {coding[:6].upper()}", PippinError(
        "P202",
        f"{path}:1 is not UTF-8 text: it looks like {coding.upper()}",
        found="its first bytes are the mark of it" if marked else "every other byte is 0x00",
        remedy=_convert(path, coding),
    )


def _convert(path: Path, looks: str) -> str:
    unpacker = _UNPACKERS.get(path.suffix.lower())
    if unpacker is None:
        return f"iconv -f {looks} -t utf-8 '{path}' > '{path.stem}.utf8{path.suffix}'"
    inner = Path(path.stem)
    target = f"{inner.stem}.utf8{inner.suffix}"
    return f"{unpacker} '{path}' | iconv -f {looks} -t utf-8 > '{target}'"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the field {counts.most_common(1)[0][0]!r} is there twice")
    return record


# One decoder for all lines: json.loads with hooks would build one for each.
_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_repeats)
