"""Every known shape of a chat or preference gives the same thing; what is bad says where and why.

Run: pytest tests/unit/test_chat_formats.py
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.reading.chat_formats import (
    FORMATS,
    Chat,
    Message,
    Normalised,
    Pair,
    Plain,
    content_of,
    detect_format,
    normalise,
)
from core.errors import PippinError

WHERE = "data/chats.jsonl:17"
HI, HELLO = Message("user", "Hi"), Message("assistant", "Hello")
BYE = Message("assistant", "Bye")
SYSTEM = Message("system", "Be kind.")


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


U, A, B, S = (message(m.role, m.content) for m in (HI, HELLO, BYE, SYSTEM))
U2, A2 = message("user", "And?"), message("assistant", "No.")


def read(fields: dict[str, Any]) -> Normalised:
    return normalise(fields, detect_format(fields), WHERE)


CHATS: dict[str, tuple[dict[str, Any], Chat]] = {
    "openai": ({"messages": [S, U, A]}, Chat((SYSTEM, HI, HELLO))),
    "no system": ({"messages": [U, A], "id": 7}, Chat((HI, HELLO))),
    "conversation": ({"conversation": [U, A]}, Chat((HI, HELLO))),
    "conversations with roles": ({"conversations": [U, A]}, Chat((HI, HELLO))),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Chat((HI, HELLO)),
    ),
    "sharegpt, other names": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "user", "value": "Hi", "weight": None},
                {"from": "chatgpt", "value": "Hello"},
                {"from": "model", "value": "Bye"},
            ]
        },
        Chat((SYSTEM, HI, HELLO, BYE)),
    ),
    "sharegpt, system beside it": (
        {"system": "Be kind.", "conversations": [U, A]},
        Chat((SYSTEM, HI, HELLO)),
    ),
    "capital roles": (
        {"messages": [message("User", "Hi"), message("Assistant", "Hello")]},
        Chat((HI, HELLO)),
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, Chat((HI, HELLO), 1)),
    "prompt and completion as lists": (
        {"prompt": [S, U, A, U], "completion": [B]},
        Chat((SYSTEM, HI, HELLO, HI, BYE), 4),
    ),
    "list and string": ({"prompt": [U], "completion": "Hello"}, Chat((HI, HELLO), 1)),
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2", "text": "Below is ..."},
        Chat((Message("user", "Add.\n\n1 1"), Message("assistant", "2"))),
    ),
    "alpaca without input": (
        {"instruction": "Hi", "input": "", "output": "Hello"},
        Chat((HI, HELLO)),
    ),
    "alpaca, input null": (
        {"instruction": "Hi", "input": None, "output": "Hello", "system": ""},
        Chat((HI, HELLO)),
    ),
    "parts": (
        {
            "messages": [
                message("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
                A,
            ]
        },
        Chat((HI, HELLO)),
    ),
    "users in a row": ({"messages": [U, U, A]}, Chat((HI, HI, HELLO))),
    "assistants in a row": ({"messages": [U, A, B]}, Chat((HI, HELLO, BYE))),
    "assistant first": ({"messages": [A, U, B]}, Chat((HELLO, HI, BYE))),
    "null beside it": ({"prompt": None, "messages": [U, A], "text": "x"}, Chat((HI, HELLO))),
    "content is kept": (
        {"messages": [message("user", " Hi\r\n"), message("assistant", "\n\u2028 <|end|>\x00 ")]},
        Chat((Message("user", " Hi\r\n"), Message("assistant", "\n\u2028 <|end|>\x00 "))),
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats(name: str) -> None:
    fields, expected = CHATS[name]
    assert read(fields) == Normalised(expected)


ONE_PAIR = Pair((HI,), (HELLO,), (BYE,))
HH = "\n\nHuman: Hi\n\nAssistant:"
PAIRS: dict[str, tuple[dict[str, Any], Pair]] = {
    "strings": ({"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}, ONE_PAIR),
    "string and answers": ({"prompt": "Hi", "chosen": [A], "rejected": [B]}, ONE_PAIR),
    "lists": ({"prompt": [U], "chosen": [A], "rejected": [B]}, ONE_PAIR),
    "list and strings": ({"prompt": [U], "chosen": "Hello", "rejected": "Bye"}, ONE_PAIR),
    "ultrafeedback": (
        {
            "prompt": "Hi",
            "prompt_id": "f0e3",
            "chosen": [U, A],
            "rejected": [U, B],
            "messages": [U, A],
            "score_chosen": 8.0,
            "score_rejected": 7.5,
        },
        ONE_PAIR,
    ),
    "without prompt": ({"chosen": [U, A], "rejected": [U, B]}, ONE_PAIR),
    "list repeated": ({"prompt": [U], "chosen": [U, A], "rejected": [U, B]}, ONE_PAIR),
    "the prompt is an extract": (
        {"prompt": "And?", "chosen": [U, A, U2, A2], "rejected": [U, A, U2, B]},
        Pair((HI, HELLO, Message("user", "And?")), (Message("assistant", "No."),), (BYE,)),
    ),
    "system in the prompt": (
        {"prompt": [S, U], "chosen": [U, A], "rejected": [B]},
        Pair((SYSTEM, HI), (HELLO,), (BYE,)),
    ),
    "system alone": (
        {"prompt": [S], "chosen": [U, A], "rejected": [U, B]},
        Pair((SYSTEM, HI), (HELLO,), (BYE,)),
    ),
    "system in the answers": (
        {"prompt": "Hi", "chosen": [S, U, A], "rejected": [S, U, B]},
        Pair((SYSTEM, HI), (HELLO,), (BYE,)),
    ),
    "system beside it": (
        {"system": "Be kind.", "prompt": "Hi", "chosen": "Hello", "rejected": "Bye"},
        Pair((SYSTEM, HI), (HELLO,), (BYE,)),
    ),
    "answers of many turns": (
        {"chosen": [U, A, U2, A2], "rejected": [U, B, U2, A2]},
        Pair(
            (HI,),
            (HELLO, Message("user", "And?"), Message("assistant", "No.")),
            (BYE, Message("user", "And?"), Message("assistant", "No.")),
        ),
    ),
    "hh": ({"chosen": f"{HH} Hello", "rejected": f"{HH} Bye"}, ONE_PAIR),
    "hh, many turns": (
        {
            "chosen": f"{HH} Hello\n\nHuman: And?\n\nAssistant: No.",
            "rejected": f"{HH} Hello\n\nHuman: And?\n\nAssistant: Bye",
        },
        Pair((HI, HELLO, Message("user", "And?")), (Message("assistant", "No."),), (BYE,)),
    ),
    "hh with a prompt": ({"prompt": HH, "chosen": " Hello", "rejected": " Bye"}, ONE_PAIR),
    "hh, all three": ({"prompt": HH, "chosen": f"{HH} Hello", "rejected": f"{HH} Bye"}, ONE_PAIR),
    "hh keeps content": (
        {
            "chosen": "\n\nHuman:  a\n b \n\nAssistant:x\n\n",
            "rejected": "\n\nHuman:  a\n b \n\nAssistant: y",
        },
        Pair(
            (Message("user", " a\n b "),),
            (Message("assistant", "x\n\n"),),
            (Message("assistant", "y"),),
        ),
    ),
    "a leading space is content": (
        {"prompt": "Hi", "chosen": " Hello", "rejected": "Hello"},
        Pair((HI,), (Message("assistant", " Hello"),), (HELLO,)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    fields, expected = PAIRS[name]
    assert detect_format(fields) == "chosen/rejected"
    assert read(fields) == Normalised(expected)


def test_plain_text() -> None:
    assert read({"text": " a\n", "meta": {}}) == Normalised(Plain(" a\n"))


def test_what_is_left_out_is_said() -> None:
    result = read({"messages": [message("system", " "), U, A, U, U]})
    assert result.value == Chat((HI, HELLO))
    assert sorted(result.left_out) == [
        "empty system messages left out",
        "turns after the last answer left out",
        "turns after the last answer left out",
    ]


def test_formats_and_contents() -> None:
    assert {name: content_of(name) for name in FORMATS} == {
        "chosen/rejected": "preference",
        "messages": "chat",
        "conversations": "chat",
        "conversation": "chat",
        "prompt/completion": "chat",
        "instruction/output": "chat",
        "text": "text",
    }
    assert content_of("") == "text"
    assert detect_format({}) == detect_format({"prompt": "Hi"}) == ""
    assert detect_format({"prompt": "Hi", "chosen": "a"}) == ""


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no known format": ({"question": "a", "answer": "b"}, "is of no known format"),
    "no field": ({}, "is of no known format"),
    "not a list": ({"messages": "Hi"}, "messages is not a list of messages"),
    "empty list": ({"messages": []}, "messages is empty"),
    "not an object": ({"messages": ["Hi"]}, "messages[0] is not an object"),
    "unknown role": (
        {"messages": [message("bot", "Hi"), A]},
        "messages[0] has the unknown role 'bot'",
    ),
    "no role": ({"messages": [U, {"content": "Hello"}]}, "messages[1] has no 'role'"),
    "role of another type": ({"messages": [message(1, "x"), A]}, "messages[0] has no 'role'"),  # type: ignore[arg-type]
    "tool role": ({"messages": [U, message("tool", "4"), A]}, "tools are not supported"),
    "sharegpt tool": (
        {"conversations": [{"from": "function_call", "value": "{}"}, A]},
        "tools are not supported",
    ),
    "tool call": (
        {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        "messages[1] calls a tool",
    ),
    "no content": ({"messages": [U, {"role": "assistant"}]}, "messages[1] has no 'content'"),
    "content null": (
        {"messages": [U, message("assistant", None)]},
        "messages[1].content is missing",
    ),
    "content a number": (
        {"messages": [message("user", 4), A]},
        "messages[0].content is not a string",
    ),
    "content an object": (
        {"messages": [message("user", {}), A]},
        "messages[0].content is not a string",
    ),
    "an image": (
        {"messages": [message("user", [{"type": "image_url", "image_url": {}}]), A]},
        "messages[0].content has a part of type 'image_url'",
    ),
    "a part that is none": ({"messages": [message("user", ["Hi"]), A]}, "a part of type 'str'"),
    "a part without text": (
        {"messages": [message("user", [{"type": "text"}]), A]},
        "a text part of messages[0].content is missing",
    ),
    "only users": ({"messages": [U, U]}, "messages has no assistant turn"),
    "only a system": ({"messages": [S]}, "messages has no assistant turn"),
    "empty answer": ({"messages": [U, message("assistant", " \n")]}, "the assistant turn is empty"),
    "empty question": (
        {"messages": [message("user", ""), A]},
        "messages[0]: the user turn is empty",
    ),
    "two systems": ({"messages": [S, S, U, A]}, "messages has a second system message"),
    "late system": ({"messages": [U, S, A]}, "messages has its system message late"),
    "system twice": ({"system": "x", "messages": [S, U, A]}, "two system messages"),
    "surrogate": (
        {"messages": [message("user", "a\ud800"), A]},
        "messages[0].content holds a lone surrogate",
    ),
    "surrogate in a text": ({"text": "\udfff"}, "text holds a lone surrogate"),
    "text a number": ({"text": 5}, "text is not a string"),
    "prompt empty": ({"prompt": " ", "completion": "a"}, "prompt is empty"),
    "completion empty": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "completion of a user": (
        {"prompt": [U, A], "completion": [U]},
        "completion has no assistant turn",
    ),
    "instruction empty": ({"instruction": "", "input": "x", "output": "a"}, "instruction is empty"),
    "output empty": ({"instruction": "x", "output": ""}, "output is empty"),
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
    "equal lists": ({"chosen": [U, A], "rejected": [U, A, U]}, "chosen and rejected are equal"),
    "preference, prompt empty": ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    "preference, no prompt": ({"chosen": [A], "rejected": [B]}, "the prompt is empty"),
    "strings without prompt": (
        {"chosen": "a", "rejected": "b"},
        "chosen is a string, and there is no prompt",
    ),
    "chosen empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
    "hh answer empty": (
        {"chosen": f"{HH} ", "rejected": f"{HH} a"},
        "chosen, turn 2 (assistant) is empty",
    ),
    "one goes on": (
        {"chosen": [U, A, U2, A2], "rejected": [U, A]},
        "not two answers to one prompt",
    ),
    "two prompts": ({"chosen": [U, A], "rejected": [U2, B]}, "not two answers to one prompt"),
    "an answer by a user": ({"prompt": [U], "chosen": [U2, A], "rejected": [B]}, "not two answers"),
    "chosen a number": (
        {"prompt": "a", "chosen": 1, "rejected": "b"},
        "chosen is not a list of messages",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_say_where_and_why(name: str) -> None:
    fields, expected = BAD[name]
    with pytest.raises(PippinError) as caught:
        read(fields)
    assert caught.value.code == "P202"
    assert caught.value.what.startswith(WHERE)
    assert expected in caught.value.what


def test_unknown_role_names_the_known_ones() -> None:
    with pytest.raises(PippinError) as caught:
        read({"messages": [message("bot", "Hi")]})
    assert set(caught.value.choices) >= {"system", "user", "assistant", "human", "gpt"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "is a record of the format prompt/completion, but the file",
        ),
        ({"messages": None, "id": 4}, "lacks 'messages'"),
    ],
)
def test_record_of_another_format(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(PippinError) as caught:
        normalise(fields, "messages", WHERE)
    assert caught.value.code == "P202"
    assert expected in caught.value.what and "messages" in caught.value.what
    assert caught.value.what.startswith(WHERE)


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(turns=TURNS, answer=TEXTS)
def test_all_spellings_of_a_chat_are_one(turns: list[tuple[str, str]], answer: str) -> None:
    turns = [*turns, ("assistant", answer)]
    expected = tuple(Message(role, text) for role, text in turns)  # type: ignore[arg-type]
    openai = [message(role, text) for role, text in turns]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[role], "value": text} for role, text in turns]
    parts = [
        message(role, [{"type": "text", "text": char} for char in text]) for role, text in turns
    ]
    for fields in ({"messages": openai}, {"conversations": sharegpt}, {"conversation": parts}):
        assert read(fields) == Normalised(Chat(expected))


@settings(max_examples=80, deadline=None)
@given(turns=TURNS, one=TEXTS, two=TEXTS)
def test_all_spellings_of_a_pair_are_one(turns: list[tuple[str, str]], one: str, two: str) -> None:
    turns = [*turns, ("user", "?")]
    prompt = tuple(Message(role, text) for role, text in turns)  # type: ignore[arg-type]
    asked = [message(role, text) for role, text in turns]
    a, b = message("assistant", one), message("assistant", two)
    spellings: list[dict[str, Any]] = [
        {"prompt": asked, "chosen": [a], "rejected": [b]},
        {"prompt": asked, "chosen": one, "rejected": two},
        {"prompt": asked, "chosen": [*asked, a], "rejected": [*asked, b]},
        {"chosen": [*asked, a], "rejected": [*asked, b]},
    ]
    if turns[0][0] == "user":
        spellings.append({"prompt": "?", "chosen": [*asked, a], "rejected": [*asked, b]})
    for fields in spellings:
        if one.startswith("\n\nHuman:") or two.startswith("\n\nHuman:"):
            continue
        if one == two:
            with pytest.raises(PippinError, match="equal"):
                read(fields)
        else:
            sides = (Message("assistant", one),), (Message("assistant", two),)
            assert read(fields) == Normalised(Pair(prompt, *sides))
