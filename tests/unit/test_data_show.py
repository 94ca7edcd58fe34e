"""What is shown of tokens is what is there, and nothing in it can steer a terminal.

Run: pytest tests/unit/test_data_show.py
"""

import io
import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from core.data.chat import chat_segments, encode_segments
from core.data.reading.chat_formats import Chat, Message
from core.data.show import Row, render_rows, visible
from core.data.tokenizers.tokenizer import ByteTokenizer
from core.data.tokenizers.training import train_tokenizer
from core.errors import PippinError

BYTE = ByteTokenizer()
BPE = train_tokenizer("bpe", [f"the quick brown fox jumps {i} times" for i in range(80)], 300)


def shown(row: Row, *, width: int = 80, ascii: bool = False) -> str:
    return render_rows([row], BYTE, width=width, colour=False, ascii=ascii).plain


def row_of(text: str, weights: Sequence[int] | None = None, number: int = 1) -> Row:
    return Row(number, list(text.encode()), weights)


def body(row: Row, *, width: int = 200, ascii: bool = False) -> str:
    """What is shown below the header, which may be wrapped too."""
    header = shown(Row(row.number, row.ids, row.weights), width=10**6, ascii=ascii).split("\n")[0]
    lines = shown(row, width=width, ascii=ascii).split("\n")
    while header:
        header = header.removeprefix(lines.pop(0))
    return "\n".join(lines)


def chat_row(number: int, question: str, answer: str) -> Row:
    chat = Chat((Message("user", question), Message("assistant", answer)))
    ids, weights = encode_segments(chat_segments(chat), BYTE)
    ids_and_end = [*ids.tolist(), BYTE.eos_id]
    return Row(number, ids_and_end, [*weights.tolist(), 0], "train", f"chats.jsonl:{number}")


def test_rows_exactly() -> None:
    rows = [chat_row(1, "Hi", "Yo"), chat_row(1234, "a\nb", "No")]
    text = render_rows(rows, BYTE, width=80, colour=False, ascii=False).plain
    assert text == (
        "row 1   train   13 tokens, 3 trained (23.1 %)   chats.jsonl:1\n"
        "<|user|>\n"
        "Hi<|end|>\n"
        "<|assistant|>\n"
        "\u27e6Yo<|end|>\u27e7\n"
        "</s>\n\n"
        "row 1,234   train   14 tokens, 3 trained (21.4 %)   chats.jsonl:1234\n"
        "<|user|>\n"
        "a\n"
        "b<|end|>\n"
        "<|assistant|>\n"
        "\u27e6No<|end|>\u27e7\n"
        "</s>"
    )


def test_ascii_exactly() -> None:
    text = render_rows(
        [chat_row(2, "\u00e9", "\U0001f600")], BYTE, width=80, colour=False, ascii=True
    )
    assert text.plain == (
        "row 2   train   15 tokens, 5 trained (33.3 %)   chats.jsonl:2\n"
        "<|user|>\n"
        "\\u00e9<|end|>\n"
        "<|assistant|>\n"
        "[[\\U0001f600<|end|>]]\n"
        "</s>"
    )


def test_headers() -> None:
    assert shown(Row(7, [])) == "row 7   0 tokens, 0 trained (none)\n"
    assert shown(row_of("ab")).startswith("row 1   2 tokens, 2 trained (100.0 %)\n")
    assert shown(Row(1, [97], [0], "val")).startswith("row 1   val   1 tokens, 0 trained (0.0 %)\n")
    odd = Row(1, [97], origin="a\x1b[31m\nb\t.jsonl:1")
    assert shown(odd).startswith(
        "row 1   1 tokens, 1 trained (100.0 %)   a\\x1b[31m\\x0ab\\x09.jsonl:1\n"
    )


def test_stretches() -> None:
    assert body(row_of("abcdef", [0, 1, 1, 0, 0, 1])) == "a\u27e6bc\u27e7de\u27e6f\u27e7"
    assert body(row_of("abc", [0, 0, 0])) == "abc"
    assert body(row_of("abc", [1, 0, 1]), ascii=True) == "[[a]]b[[c]]"
    # Two symbols of one name in a row are both there.
    end = BYTE.control_ids["<|end|>"]
    assert body(Row(1, [end, end, 97], [0, 0, 0])) == "<|end|><|end|>a"


def test_a_typed_symbol_is_not_a_symbol() -> None:
    end = BYTE.control_ids["<|end|>"]
    row = Row(1, [*b"x<|end|>y</s>", end], [0] * 14)
    assert body(row) == "x\\x3c|end|>y\\x3c/s><|end|>"
    assert body(row_of("a\u27e6b\u27e7[[", [0] * 10)) == "a\\u27e6b\\u27e7[["
    assert body(row_of("a[[b]]\u27e6", [0] * 9), ascii=True) == "a\\x5b[b\\x5d]\\u27e6"


def test_terminals_are_not_steered() -> None:
    text = "\x1b]0;t\x07\x1b[31m\r\b\x00\x7f\x9b31m\u202e\u2066\u2028\ufeff[bold red]"
    assert body(row_of(text, [0] * len(text.encode()))) == (
        "\\x1b]0;t\\x07\\x1b[31m\\x0d\\x08\\x00\\x7f\\x9b31m\\u202e\\u2066\\u2028\\ufeff[bold red]"
    )


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), ascii=st.booleans())
def test_visible_text_is_harmless(text: str, ascii: bool) -> None:
    for char in visible(text, ascii=ascii):
        assert char in "\n\t\u200c\u200d" or unicodedata.category(char) not in (
            "Cc",
            "Cf",
            "Cs",
            "Zl",
            "Zp",
        )
        assert char.isascii() or not ascii
    if text.isascii() and text.isprintable():
        assert visible(text, ascii=ascii) == text


def test_characters_of_many_tokens() -> None:
    text = "\u00e9\u6f22\U0001f600"
    assert len(text.encode()) == 9
    assert body(row_of(text, [0] * 9)) == text
    assert len(BPE.encode("\U0001f600")) > 1
    row = Row(1, BPE.encode("fox \U0001f600."), None)
    plain = render_rows([row], BPE, width=80, colour=False, ascii=False).plain
    assert plain.endswith("\u27e6fox \U0001f600.\u27e7")
    # Cut by the row's ends, or where training begins inside a character.
    assert body(Row(1, list(text.encode())[1:-1], [0] * 7)) == "\\xa9\u6f22\\xf0\\x9f\\x98"
    assert body(row_of("\u00e9", [0, 1])) == "\\xc3\u27e6\\xa9\u27e7"


def test_wrapping_by_hand() -> None:
    words = "the quick brown fox jumps over"
    assert body(row_of(words, [0] * len(words)), width=20) == "the quick brown fox \njumps over"
    assert body(row_of("x" * 45, [0] * 45), width=20) == "\n".join(["x" * 20, "x" * 20, "x" * 5])
    # A character of two columns does not stand across the edge.
    wide = "x" * 19 + "\u6f22"
    assert body(row_of(wide, [0] * 22), width=20) == "x" * 19 + "\n\u6f22"
    assert body(row_of("ab\tcd\t" + "e" * 6, [0] * 12), width=20) == "ab\tcd\t\neeeeee"


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=120),
    width=st.integers(20, 60),
    ascii=st.booleans(),
    data=st.data(),
)
def test_wrapping_loses_nothing_and_fits(
    text: str, width: int, ascii: bool, data: st.DataObject
) -> None:
    ids = list(text.encode())
    weights = data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    narrow = body(Row(1, ids, weights), width=width, ascii=ascii)
    wide = body(Row(1, ids, weights), width=10**6, ascii=ascii)
    # Breaks that the text has cannot be told from those of wrapping.
    assert narrow.replace("\n", "") == wide.replace("\n", "")
    for line in narrow.split("\n"):
        assert cell_len(line.expandtabs(8)) <= width or "\t" in line
    marks = ("[[", "]]") if ascii else ("\u27e6", "\u27e7")
    stretches = sum(b > a for a, b in zip([0, *weights], weights))
    assert wide.count(marks[0]) >= stretches if ascii else wide.count(marks[0]) == stretches


def test_without_colour_there_are_no_styles_and_no_codes() -> None:
    text = render_rows([chat_row(1, "Hi", "Yo")], BYTE, width=80, colour=False, ascii=False)
    assert [span for span in text.spans if span.style] == []
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=80, color_system="truecolor").print(text)
    assert out.getvalue() == f"{text.plain}\n"


def test_colour_changes_no_character() -> None:
    rows = [chat_row(1, "Hi [red] :smile:", "Yo\tx")]
    plain, coloured = (
        render_rows(rows, BYTE, width=40, colour=colour, ascii=False) for colour in (False, True)
    )
    assert coloured.plain == plain.plain
    styles = {coloured.plain[s.start : s.end].strip(): str(s.style) for s in coloured.spans}
    assert "green" in styles["\u27e6Yo\tx"] and "green" in styles["<|end|>"]
    assert styles["<|user|>"] == "bold cyan"
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=40, color_system="standard").print(coloured)
    assert "\x1b[" in out.getvalue() and "[red] :smile:" in out.getvalue()


def test_faults() -> None:
    with pytest.raises(ValueError, match="2 weights for 1 tokens"):
        shown(Row(1, [97], [1, 1]))
    with pytest.raises(PippinError) as caught:
        shown(Row(1, [261]))
    assert caught.value.code == "P204"
