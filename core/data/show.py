"""Rows of tokens for the eye: what a model sees, and which of it is trained.

    row 2   train   9 tokens, 4 trained (44.4 %)   chats.jsonl:2
    <|user|>
    Hi<|end|>
    <|assistant|>
    [[Hello<|end|>]]

Trained stretches stand between marks, in colour too. A symbol is shown by its name; text that only
looks like a symbol or a mark is escaped, so that the two cannot be confused. Nothing that is shown
can steer a terminal.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

from rich.cells import cell_len
from rich.text import Text

from core.data.tokenizers.tokenizer import Tokenizer

_MARKS = ("\u27e6", "\u27e7")
_ASCII_MARKS = ("[[", "]]")
_TAB = 8
_HEADER, _TRAINED, _CONTROL = "bold", "green", "cyan"

# A stretch of what is printed, with its style.
_Styled = tuple[str, str]


@dataclass(frozen=True)
class Row:
    """Tokens to be shown.

    Attributes:
        number: Its number.
        ids: Token ids `[n]`.
        weights: `[n]`, above 0 where a token is trained; None: everywhere.
        split: "train", "val" or "test".
        origin: Where it is from, "data.jsonl:17"; may be empty.
    """

    number: int
    ids: Sequence[int]
    weights: Sequence[float] | None = None
    split: str = ""
    origin: str = ""


def render_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, *, width: int, colour: bool, ascii: bool
) -> Text:
    """Rows, each with a header, one empty line apart.

    Args:
        rows: What to show.
        tokenizer: The one the ids are of.
        width: Columns of the terminal, at least 20 are used.
        colour: Whether to use styles; without, `plain` is all there is.
        ascii: Whether every character must be ASCII.

    Returns:
        The text, wrapped, without a newline at its end.

    Raises:
        PippinError: P204 for an id that the tokenizer does not have.
        ValueError: Where weights are not as many as ids.
    """
    text = Text(no_wrap=True, overflow="ignore", end="", tab_size=_TAB)
    for i, row in enumerate(rows):
        stretches = [(_header(row, ascii), _HEADER), ("\n", ""), *_body(row, tokenizer, ascii)]
        text.append("\n\n" if i else "")
        for style, chars in groupby(_wrapped(stretches, max(width, 20)), key=lambda part: part[1]):
            text.append("".join(char for char, _ in chars), style if colour else "")
    return text


def visible(text: str, *, ascii: bool = False) -> str:
    """Text that cannot steer a terminal.

    Newline and tab stay; other controls, characters that reorder text or are no characters become
    escapes; with `ascii` so does every other character that is not ASCII.
    """
    return "".join(char if _is_harmless(char, ascii) else _escape(char) for char in text)


def _is_harmless(char: str, ascii: bool) -> bool:
    if char in "\n\t" or (char.isascii() and char.isprintable()):
        return True
    # Cc controls, Cf marks without width or that reorder text, Cs surrogates, Zl and Zp line ends.
    harmful = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    # The joiners within emoji and Indic words cannot steer anything.
    return not ascii and (not harmful or char in "\u200c\u200d")


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x80 or unicodedata.category(char) == "Cc":
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _header(row: Row, ascii: bool) -> str:
    weights = _weights(row)
    trained, total = sum(weights), len(weights)
    share = f"{100 * trained / total:.1f} %" if total else "none"
    counts = f"{total:,} tokens, {trained:,} trained ({share})"
    parts = [f"row {row.number:,}", row.split, counts, row.origin]
    line = "   ".join(part for part in parts if part)
    return visible(line, ascii=ascii).replace("\n", r"\x0a").replace("\t", r"\x09")


def _weights(row: Row) -> list[bool]:
    if row.weights is None:
        return [True] * len(row.ids)
    if len(row.weights) != len(row.ids):
        raise ValueError(f"{len(row.weights)} weights for {len(row.ids)} tokens")
    return [weight > 0 for weight in row.weights]


def _body(row: Row, tokenizer: Tokenizer, ascii: bool) -> Iterator[_Styled]:
    names = {i: name for name, i in tokenizer.control_ids.items()}
    opening, closing = _ASCII_MARKS if ascii else _MARKS
    lookalikes = re.compile("|".join(map(re.escape, (*names.values(), opening, closing))))
    tokens = zip(_weights(row), (int(i) for i in row.ids))
    for trained, stretch in groupby(tokens, key=lambda token: token[0]):
        style = _TRAINED if trained else ""
        if trained:
            yield opening, _TRAINED
        # All text between two symbols is decoded at once: a character may be many tokens.
        for name, run in groupby((i for _, i in stretch), key=names.get):
            if name is None:
                text = tokenizer.decode_bytes(run).decode(errors="backslashreplace")
                shown = visible(text, ascii=ascii)
                yield lookalikes.sub(_spelled, shown), style
            else:
                for _ in run:
                    yield visible(name, ascii=ascii), f"bold {style or _CONTROL}"
        if trained:
            yield closing, _TRAINED


def _spelled(match: "re.Match[str]") -> str:
    """What only looks like a symbol, with its first character as an escape."""
    first, rest = match[0][0], match[0][1:]
    escape = f"\\x{ord(first):02x}" if first.isascii() else _escape(first)
    return escape + rest


def _wrapped(stretches: Sequence[_Styled], width: int) -> Iterator[_Styled]:
    """Break lines after spaces where there are any, else anywhere; nothing is lost but line ends."""
    line: list[_Styled] = []
    used = 0
    for char, style in ((char, style) for part, style in stretches for char in part):
        if char == "\n":
            yield from (*line, ("\n", ""))
            line, used = [], 0
            continue
        line.append((char, style))
        used = _advance(used, char)
        if used > width:
            kept = _break_place(line[:-1])
            yield from (*line[:kept], ("\n", ""))
            line = line[kept:]
            used = reduce(_advance, (char for char, _ in line), 0)
    yield from line


def _advance(used: int, char: str) -> int:
    return used + (_TAB - used % _TAB if char == "\t" else cell_len(char))


def _break_place(line: Sequence[_Styled]) -> int:
    """How much of a full line stays in it: up to its last space, unless that is far away."""
    for i in range(len(line), len(line) // 2, -1):
        if line[i - 1][0] in " \t":
            return i
    return len(line)
