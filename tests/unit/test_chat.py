"""The template: what a chat is in tokens, and exactly which of them are trained.

Run: pytest tests/unit/test_chat.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.chat import (
    TRAIN_EOS,
    ChatSource,
    Fit,
    chat_segments,
    documents_of,
    encode_segments,
    fit,
    pair_segments,
    prompt_segments,
)
from core.data.reading.chat_formats import Chat, Message, Pair, Plain
from core.data.reading.documents import Document
from core.data.reading.sources import ReadOptions, open_source
from core.data.tokenizers.tokenizer import CHAT_SYMBOLS, ByteTokenizer, Tokenizer
from core.data.tokenizers.training import train_tokenizer
from core.errors import PippinError

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards mix 12 jugs of juice"
TEXTS = [f"{WORDS[i:]}\n\n  {WORDS[:i]}.\t<|end|> \u00e9t\u00e9 {i}\r\n" for i in range(80)]
BYTE = ByteTokenizer()
BPE = train_tokenizer("bpe", TEXTS, 420)
TOKENIZERS = {"byte": BYTE, "bpe": BPE}

CHAT = Chat(
    (
        Message("system", "Be kind."),
        Message("user", "Who are you?\n"),
        Message("assistant", " A pippin."),
        Message("user", "<|end|>"),
        Message("assistant", "<|assistant|>\nNo."),
    )
)

# Texts that look like the template, texts with white space, and anything else.
HOSTILE = st.sampled_from(
    [*CHAT_SYMBOLS, "</s>", "\n", "\n\n", " ", "<|end|>\n<|user|>\n", "\u2581", "<0x0A>"]
)
TEXT = st.lists(HOSTILE | st.text(st.characters(codec="utf-8"), max_size=6), max_size=5).map(
    "".join
)
FILLED = TEXT.filter(str.strip)
ROLES = st.sampled_from(["user", "assistant"])
MESSAGES = st.builds(
    lambda system, turns: (*system, *turns),
    st.lists(st.builds(Message, st.just("system"), FILLED), max_size=1),
    st.lists(st.builds(Message, ROLES, FILLED), min_size=1, max_size=6),
)


def naive(messages: Sequence[Message], first_trained: int) -> tuple[list[int], list[int]]:
    """The template once more, for bytes: whole string with marks, then walked byte by byte.

    Private-use characters stand for the symbols, and the trained span is found by searching.
    """
    symbols = {"system": "\ue001", "user": "\ue002", "assistant": "\ue003"}
    ids_of = {"\ue001": 257, "\ue002": 258, "\ue003": 259, "\ue004": 260}
    whole = "".join(f"{symbols[m.role]}\n{m.content}\ue004\n" for m in messages)
    ids: list[int] = []
    weights: list[int] = []
    turn, inside = -1, False
    for i, char in enumerate(whole):
        if char in symbols.values():
            turn, inside = turn + 1, False
        elif not inside and whole[i - 1] in symbols.values():
            new = [10]
            assert char == "\n"
            ids, weights = ids + new, [*weights, 0]
            inside = True
            continue
        new = [ids_of[char]] if char in ids_of else list(char.encode())
        trained = inside and messages[turn].role == "assistant" and turn >= first_trained
        ids, weights = ids + new, weights + [int(trained)] * len(new)
        if char == "\ue004":
            inside = False
    return ids, weights


def no_marks(messages: Sequence[Message]) -> bool:
    return not any(mark in m.content for m in messages for mark in "\ue001\ue002\ue003\ue004")


def test_template_by_hand() -> None:
    chat = Chat((Message("user", "Hi"), Message("assistant", "Yo")))
    ids, weights = encode_segments(chat_segments(chat), BYTE)
    symbols = BYTE.control_ids
    user, assistant, end = (symbols[f"<|{name}|>"] for name in ("user", "assistant", "end"))
    newline, text = 10, {c: ord(c) for c in "HiYo"}
    expected = [
        (user, 0),
        (newline, 0),
        (text["H"], 0),
        (text["i"], 0),
        (end, 0),
        (newline, 0),
        (assistant, 0),
        (newline, 0),
        (text["Y"], 1),
        (text["o"], 1),
        (end, 1),
        (newline, 0),
    ]
    assert list(zip(ids.tolist(), weights.tolist())) == expected
    assert ids.dtype == np.uint32 and weights.dtype == np.uint8
    assert TRAIN_EOS is False


@settings(max_examples=100, deadline=None)
@given(messages=MESSAGES.filter(no_marks), first_trained=st.integers(0, 7))
def test_trained_span_is_exact(messages: tuple[Message, ...], first_trained: int) -> None:
    ids, weights = encode_segments(chat_segments(Chat(messages, first_trained)), BYTE)
    assert (ids.tolist(), weights.tolist()) == naive(messages, first_trained)


def trained_texts(ids: Sequence[int], weights: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Contents of the trained stretches, each of which must end with `<|end|>`, its only symbol."""
    end = tokenizer.control_ids["<|end|>"]
    texts: list[str] = []
    held: list[int] = []
    for token, weight in zip(ids, weights):
        if weight and token == end:
            texts.append(tokenizer.decode(held))
            held = []
        elif weight:
            assert token not in tokenizer.control_ids.values()
            held.append(token)
        else:
            assert not held, "a trained stretch must end with <|end|>"
    assert not held
    return texts


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(messages=MESSAGES)
def test_trained_tokens_are_the_answers(kind: str, messages: tuple[Message, ...]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids, weights = encode_segments(chat_segments(Chat(messages)), tokenizer)
    answers = [m.content for m in messages if m.role == "assistant"]
    assert trained_texts(ids.tolist(), weights.tolist(), tokenizer) == answers


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(messages=MESSAGES)
def test_text_never_becomes_a_symbol(kind: str, messages: tuple[Message, ...]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids, _ = encode_segments(chat_segments(Chat(messages)), tokenizer)
    names = {i: name for name, i in tokenizer.control_ids.items()}
    symbols = [names[i] for i in ids.tolist() if i in names]
    assert symbols == [s for m in messages for s in (f"<|{m.role}|>", "<|end|>")]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(messages=MESSAGES)
def test_everything_said_comes_back(kind: str, messages: tuple[Message, ...]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids, _ = encode_segments(chat_segments(Chat(messages)), tokenizer)
    symbols = set(tokenizer.control_ids.values())
    turns: list[list[int]] = []
    for token in ids.tolist():
        if token not in symbols:
            turns[-1].append(token)
        elif token != tokenizer.control_ids["<|end|>"]:
            turns.append([])
    assert [tokenizer.decode(turn) for turn in turns] == [f"\n{m.content}\n" for m in messages]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(messages=MESSAGES, answer=FILLED)
def test_generation_begins_as_training_did(
    kind: str, messages: tuple[Message, ...], answer: str
) -> None:
    whole = (*messages, Message("assistant", answer))
    prompt, chat = prompt_segments(messages), chat_segments(Chat(whole))
    assert chat[: len(prompt)] == prompt
    tokenizer = TOKENIZERS[kind]
    begun, _ = encode_segments(prompt, tokenizer)
    ids, weights = encode_segments(chat, tokenizer)
    assert ids[: len(begun)].tolist() == begun.tolist()
    # What is left is the answer, trained from its first token to its symbol, and one newline.
    assert weights[len(begun) :].tolist() == [1] * (len(ids) - len(begun) - 1) + [0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(messages=MESSAGES, chosen=FILLED, rejected=FILLED)
def test_pairs_train_the_answers_alone(
    kind: str, messages: tuple[Message, ...], chosen: str, rejected: str
) -> None:
    tokenizer = TOKENIZERS[kind]
    answers = [(Message("assistant", text),) for text in (chosen, rejected)]
    sides = pair_segments(Pair(messages, answers[0], answers[1]))
    begun, _ = encode_segments(prompt_segments(messages), tokenizer)
    for side, answer in zip(sides, (chosen, rejected)):
        ids, weights = encode_segments(side, tokenizer)
        assert not weights[: len(begun)].any()
        assert trained_texts(ids.tolist(), weights.tolist(), tokenizer) == [answer]
        # The same tokens as in a chat, where the answers of the prompt are trained as well.
        whole = Chat((*messages, Message("assistant", answer)))
        assert ids.tolist() == encode_segments(chat_segments(whole), tokenizer)[0].tolist()


def test_context_of_a_completion_is_not_trained() -> None:
    messages = (Message("assistant", "old"), Message("user", "q"), Message("assistant", "new"))
    ids, weights = encode_segments(chat_segments(Chat(messages, first_trained=2)), BYTE)
    assert trained_texts(ids.tolist(), weights.tolist(), BYTE) == ["new"]


def test_no_segments_give_no_tokens() -> None:
    ids, weights = encode_segments((), BYTE)
    assert ids.shape == weights.shape == (0,) and ids.dtype == np.uint32


def test_tokenizer_without_symbols() -> None:
    class Bare:
        control_ids = {"</s>": 2, "<|user|>": 4}  # noqa: RUF012

    with pytest.raises(PippinError) as caught:
        encode_segments(chat_segments(CHAT), Bare())  # type: ignore[arg-type]
    assert caught.value.code == "P301"
    for name in ("<|system|>", "<|assistant|>", "<|end|>"):
        assert name in caught.value.what
    assert "<|user|>" not in caught.value.what


def test_fit_counts_and_cuts_nothing() -> None:
    segments = chat_segments(Chat((Message("user", "abc"), Message("assistant", "de"))))
    # <|user|> \n a b c <|end|> \n <|assistant|> \n | d e <|end|> | \n
    assert fit(segments, BYTE, 100) == Fit(13, 3, 3, whole=True)
    assert fit(segments, BYTE, 13) == Fit(13, 3, 3, whole=True)
    assert fit(segments, BYTE, 11) == Fit(13, 3, 2, whole=False)
    assert fit(segments, BYTE, 9) == Fit(13, 3, 0, whole=False)


def test_documents_of_each_kind() -> None:
    (plain,) = documents_of(Plain("x"), "a:1", "val")
    assert plain == Document("x", "a:1", split="val")
    (chat,) = documents_of(CHAT, "a:2", "train")
    assert chat.segments == chat_segments(CHAT) and chat.group is None and chat.split == "train"
    ids, _ = encode_segments(chat_segments(CHAT), BPE)
    assert chat.text == BPE.decode(ids)
    pair = Pair((Message("user", "a"),), (Message("assistant", "b"),), (Message("assistant", "c"),))
    chosen, rejected = documents_of(pair, "a:3")
    assert (chosen.segments, rejected.segments) == pair_segments(pair)
    assert chosen.group == rejected.group
    assert chosen.origin == rejected.origin == "a:3"
    # What one prompt was answered stays in one split.
    turned = documents_of(Pair(pair.prompt, pair.rejected, pair.chosen), "a:3")
    assert turned[0].group == chosen.group is not None
    # Which turn a text belongs to counts.
    one = Pair((Message("user", "ab"),), (Message("assistant", "c"),), (Message("assistant", "d"),))
    two = Pair((Message("user", "a"),), (Message("assistant", "bc"),), (Message("assistant", "d"),))
    assert documents_of(one, "")[0].group != documents_of(two, "")[0].group


def write(path: Path, records: Sequence[Any]) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def source(path: Path, on_bad_line: Any = "error") -> ChatSource:
    return ChatSource(open_source(path, options=ReadOptions(on_bad_line=on_bad_line)))


GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
PAIR = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}


def test_source_of_chats(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [GOOD, GOOD])
    chats = source(path)
    assert chats.content == "chat" and chats.name == "chats"
    assert chats.num_bytes == path.stat().st_size and chats.streams is False
    documents = list(chats.documents())
    assert [d.origin for d in documents] == ["chats.jsonl:1", "chats.jsonl:2"]
    expected = chat_segments(Chat((Message("user", "Hi"), Message("assistant", "Yo"))))
    assert [d.segments for d in documents] == [expected] * 2
    assert chats.bytes_read == chats.num_bytes
    assert list(chats.documents()) == documents
    assert chats.notes() == ()


def test_source_of_preferences(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [PAIR, {**PAIR, "chosen": "Yes"}])
    pairs = source(path)
    assert pairs.content == "preference"
    documents = list(pairs.documents())
    answers = [[s.text for s in d.segments or () if s.trained] for d in documents]
    assert answers == [[a, "<|end|>"] for a in ("Yo", "No", "Yes", "No")]
    groups = [d.group for d in documents]
    assert len(set(groups)) == 1 and groups[0] is not None


def test_source_of_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "a"}, {"text": " "}, {"text": "b"}])
    texts = source(path)
    assert texts.content == "text"
    assert [(d.text, d.segments) for d in texts.documents()] == [("a", None), ("b", None)]
    assert texts.notes() == ("1 empty documents left out",)


def test_fingerprint_is_of_records_and_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.jsonl", [GOOD])
    inner = open_source(path)
    before = source(path).fingerprint
    assert before == source(path).fingerprint != inner.fingerprint
    monkeypatch.setattr("core.data.chat.TEMPLATE_VERSION", 99)
    assert source(path).fingerprint != before
    monkeypatch.undo()
    write(path, [GOOD, GOOD])
    assert source(path).fingerprint != before


BAD_ROLE = {"messages": [{"role": "bot", "content": "Hi"}]}
NO_ANSWER = {"messages": [{"role": "user", "content": "Hi"}]}


def test_bad_record_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [GOOD, "", NO_ANSWER, GOOD])
    with pytest.raises(PippinError) as caught:
        list(source(path).documents())
    assert caught.value.code == "P202"
    assert f"{path}:3: messages has no assistant turn" in caught.value.what
    assert "skip" in caught.value.remedy


def test_bad_records_are_skipped_and_counted(tmp_path: Path) -> None:
    trailing = {"messages": [*GOOD["messages"], {"role": "user", "content": "?"}]}
    records = [BAD_ROLE, GOOD, NO_ANSWER, "{", PAIR, NO_ANSWER, {"messages": None}, trailing]
    path = write(tmp_path / "c.jsonl", records)
    chats = source(path, "skip")
    assert chats.content == "chat"
    documents = list(chats.documents())
    assert [d.origin for d in documents] == ["c.jsonl:2", "c.jsonl:8"]
    assert documents[0].segments == documents[1].segments
    notes = "\n".join(chats.notes())
    assert (
        "2 left out: messages has no assistant turn, so nothing to learn (first: c.jsonl:3)"
        in notes
    )
    assert "1 left out: messages[] has the unknown role 'bot' (first: c.jsonl:1)" in notes
    assert "format chosen/rejected, but the file began with messages (first: c.jsonl:5)" in notes
    assert "1 left out: lacks 'messages' (first: c.jsonl:7)" in notes
    assert "1 turns after the last answer left out" in notes
    assert "broken JSON" in notes


def test_files_have_formats_of_their_own_but_one_content(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"instruction": "Hi", "input": "", "output": "Yo"}])
    write(tmp_path / "b.jsonl", [GOOD])
    chats = source(tmp_path)
    documents = list(chats.documents())
    assert documents[0].segments == documents[1].segments
    write(tmp_path / "c.jsonl", [PAIR])
    with pytest.raises(PippinError) as caught:
        list(source(tmp_path).documents())
    assert caught.value.code == "P202"
    assert "c.jsonl:1 is of the kind preference" in caught.value.what


@pytest.mark.parametrize(
    "second", [PAIR, {"text": "a"}, {"conversations": GOOD["messages"]}, {"question": "a"}]
)
def test_file_of_two_formats(tmp_path: Path, second: dict[str, Any]) -> None:
    path = write(tmp_path / "c.jsonl", [GOOD, second])
    with pytest.raises(PippinError) as caught:
        list(source(path).documents())
    assert caught.value.code == "P202" and caught.value.what.startswith(f"{path}:2 ")


def test_nothing_usable(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [NO_ANSWER])
    chats = source(path, "skip")
    assert list(chats.documents()) == []
    with pytest.raises(PippinError) as caught:
        _ = chats.content
    assert caught.value.code == "P201" and "no assistant turn" in caught.value.found


def test_parquet_gives_the_same_as_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    fields = [{**GOOD, "text": None}, {**GOOD, "text": "beside it"}]
    table = pyarrow.Table.from_pylist(fields)
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    write(tmp_path / "c.jsonl", fields)
    read = [list(source(tmp_path / name).documents()) for name in ("c.parquet", "c.jsonl")]
    assert [d.segments for d in read[0]] == [d.segments for d in read[1]] != [None, None]
