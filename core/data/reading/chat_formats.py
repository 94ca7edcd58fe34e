"""Chats and preferences in the shapes that datasets have, made into one.

Known are `messages` (OpenAI), `conversations` (ShareGPT), `prompt`/`completion`,
`instruction`/`input`/`output` (Alpaca), `prompt`/`chosen`/`rejected` (TRL, UltraFeedback,
Anthropic-HH) and plain `text`. Content is kept as it is, character by character. What cannot be
used is P202 with file and line; what is left out on purpose is in `Normalised.left_out`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from core.errors import PippinError

Role = Literal["system", "user", "assistant"]
Content = Literal["text", "chat", "preference"]
Fields: TypeAlias = Mapping[str, Any]

# Format -> the keys that it is known by, all of them; the first format that fits a record is its.
# UltraFeedback has `messages` and `prompt` beside `chosen`, Alpaca has `text`: hence this order.
FORMATS: dict[str, tuple[str, ...]] = {
    "chosen/rejected": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "conversation": ("conversation",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
    "text": ("text",),
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
_TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "ipython"}
_TOOL_ROLES |= {"tool_call", "tool_response", "tool_calls"}
_HH_TURNS: tuple[tuple[str, Role], ...] = (("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant"))
_TRAILING = "turns after the last answer left out"
_EMPTY_SYSTEM = "empty system messages left out"


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and what is said."""

    role: Role
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one answer.

    Attributes:
        messages: Its turns; the last one is an answer.
        first_trained: Answers before this index are context: the prompt of a completion.
    """

    messages: tuple[Message, ...]
    first_trained: int = 0


@dataclass(frozen=True)
class Pair:
    """Two different continuations of one beginning.

    Attributes:
        prompt: The common beginning, at least one turn.
        chosen: What follows in the better one; begins and ends with an answer.
        rejected: What follows in the worse one, likewise.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


@dataclass(frozen=True)
class Plain:
    """A text without turns."""

    text: str


@dataclass(frozen=True)
class Normalised:
    """A record in the one shape.

    Attributes:
        value: What it is.
        left_out: What was left out of it, in words, once for each time.
    """

    value: Chat | Pair | Plain
    left_out: tuple[str, ...] = ()


def detect_format(fields: Fields) -> str:
    """The key of `FORMATS` that a record is of, or "" if none; a key with null is not there."""
    for name, keys in FORMATS.items():
        if all(fields.get(key) is not None for key in keys):
            return name
    return ""


def content_of(format_name: str) -> Content:
    """What records of a format are; of no known format ("") they can only be text."""
    if format_name in ("", "text"):
        return "text"
    return "preference" if format_name == "chosen/rejected" else "chat"


def normalise(fields: Fields, format_name: str, origin: str) -> Normalised:
    """Read one record of a known format.

    Args:
        fields: The record.
        format_name: A key of `FORMATS`: what the records of its file are.
        origin: Where it is, "file:line".

    Raises:
        PippinError: P202 for a record of another format or one that cannot be used.
    """
    found = detect_format(fields)
    if not found or found != format_name:
        raise _other_format(fields, found, format_name, origin)
    reader = _Reader(origin)
    if format_name == "text":
        value: Chat | Pair | Plain = Plain(reader.string(fields["text"], "text"))
    elif format_name == "chosen/rejected":
        value = _pair(fields, reader)
    else:
        value = _chat(fields, format_name, reader)
    return Normalised(value, tuple(reader.left_out))


class _Reader:
    """Reads strings and turns of one record, and keeps count of what is left out."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.left_out: list[str] = []

    def error(self, what: str, found: str = "", choices: Sequence[str] = ()) -> PippinError:
        return PippinError("P202", f"{self.origin}: {what}", found=found, choices=choices)

    def string(self, value: Any, name: str) -> str:
        """A string of Unicode characters, or the text parts of a list, joined."""
        if isinstance(value, list | tuple):
            value = "".join(self._text_part(part, name) for part in value)
        if value is None:
            raise self.error(f"{name} is missing")
        if not isinstance(value, str):
            raise self.error(f"{name} is not a string", f"found {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            place = f"U+{ord(value[error.start]):04X} at character {error.start:,}"
            what = f"{name} holds a lone surrogate, which is no character"
            raise self.error(what, place) from error
        return value

    def _text_part(self, part: Any, name: str) -> str:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            what = f"{name} has a part of type {kind!r}; only text can be learned"
            raise self.error(what, choices=("text",))
        return self.string(part.get("text"), f"a text part of {name}")

    def filled(self, value: Any, name: str) -> str:
        text = self.string(value, name)
        if not text.strip():
            raise self.error(f"{name} is empty")
        return text

    def turns(self, value: Any, name: str) -> list[Message]:
        """A list of messages in any of the known spellings."""
        if not isinstance(value, list | tuple):
            kind = type(value).__name__
            raise self.error(f"{name} is not a list of messages", f"found {kind}")
        if not value:
            raise self.error(f"{name} is empty")
        messages = [self._turn(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return [message for message in messages if message is not None]

    def _turn(self, item: Any, name: str) -> Message | None:
        if not isinstance(item, Mapping):
            what = f"{name} is not an object with 'role' and 'content'"
            raise self.error(what, f"found {type(item).__name__}")
        role = self._role(item, name)
        if item.get("tool_calls") or item.get("function_call"):
            raise self.error(f"{name} calls a tool; tools are not supported")
        key = next((k for k in ("content", "value") if k in item), None)
        if key is None:
            raise self.error(f"{name} has no 'content'", choices=tuple(map(str, item)))
        text = self.string(item[key], f"{name}.{key}")
        if text.strip():
            return Message(role, text)
        if role != "system":
            raise self.error(f"{name}: the {role} turn is empty")
        self.left_out.append(_EMPTY_SYSTEM)
        return None

    def _role(self, item: Fields, name: str) -> Role:
        role = item.get("role")
        if role is None:
            role = item.get("from")
        if not isinstance(role, str):
            raise self.error(f"{name} has no 'role'", choices=tuple(_ROLES))
        known = _ROLES.get(role.strip().lower())
        if known is not None:
            return known
        if role.strip().lower() in _TOOL_ROLES:
            what = f"{name} has the role {role!r}; tools are not supported"
            raise self.error(what, choices=tuple(_ROLES))
        raise self.error(f"{name} has the unknown role {role!r}", choices=tuple(_ROLES))

    def checked(self, messages: Sequence[Message], name: str) -> tuple[Message, ...]:
        """Turns without those after the last answer; a system message only in front."""
        for i, message in enumerate(messages):
            if message.role == "system" and i > 0:
                second = messages[0].role == "system"
                problem = "has a second system message" if second else "has its system message late"
                raise self.error(f"{name} {problem}", f"at turn {i + 1}; needed: one, in front")
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise self.error(f"{name} has no assistant turn, so nothing to learn")
        kept = tuple(messages[: answers[-1] + 1])
        self.left_out += [_TRAILING] * (len(messages) - len(kept))
        return kept

    def system(self, fields: Fields, messages: Sequence[Message]) -> list[Message]:
        """The turns, after the text of a field `system` beside them."""
        own = fields.get("system")
        if not isinstance(own, str) or not own.strip():
            return list(messages)
        if messages and messages[0].role == "system":
            raise self.error("there are two system messages", "one is the field system")
        return [Message("system", self.string(own, "system")), *messages]


def _chat(fields: Fields, format_name: str, reader: _Reader) -> Chat:
    if format_name in ("messages", "conversations", "conversation"):
        turns = reader.system(fields, reader.turns(fields[format_name], format_name))
        return Chat(reader.checked(turns, format_name))
    if format_name == "instruction/output":
        asked = reader.filled(fields["instruction"], "instruction")
        given = fields.get("input")
        context = "" if given is None else reader.string(given, "input")
        # As Alpaca has it: the input after an empty line, left out where there is none.
        question = f"{asked}\n\n{context}" if context.strip() else asked
        answer = Message("assistant", reader.filled(fields["output"], "output"))
        return Chat(tuple(reader.system(fields, [Message("user", question), answer])))
    prompt = reader.system(fields, _prompt(fields["prompt"], reader))
    answers = _answer(fields, "completion", reader)
    if not any(message.role == "assistant" for message in answers):
        raise reader.error("completion has no assistant turn, so nothing to learn")
    messages = reader.checked([*prompt, *answers], "the conversation")
    return Chat(messages, first_trained=len(prompt))


def _prompt(value: Any, reader: _Reader) -> list[Message]:
    if not isinstance(value, str):
        return reader.turns(value, "prompt")
    text = reader.filled(value, "prompt")
    if _is_hh(text):
        return _hh_turns(text, "prompt", reader, opened=True)
    return [Message("user", text)]


def _answer(fields: Fields, key: str, reader: _Reader) -> list[Message]:
    """What follows a prompt."""
    if not isinstance(fields[key], str):
        return reader.turns(fields[key], key)
    text = reader.filled(fields[key], key)
    # After "\n\nAssistant:" the space in front of the answer belongs to the format.
    return [Message("assistant", text.removeprefix(" ") if _is_hh(fields["prompt"]) else text)]


def _pair(fields: Fields, reader: _Reader) -> Pair:
    """Both as whole conversations; the prompt is what they have in common.

    Whether the prompt is given, repeated in both answers (UltraFeedback) or only there (HH) makes no
    difference so.
    """
    prompt: list[Message] = []
    if fields.get("prompt") is not None:
        prompt = _prompt(fields["prompt"], reader)
    chosen, rejected = (
        reader.checked(reader.system(fields, _continued(fields, key, prompt, reader)), key)
        for key in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise reader.error("chosen and rejected are equal")
    cut = 0
    while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
        cut += 1
    next_roles = [side[cut].role if cut < len(side) else "nothing" for side in (chosen, rejected)]
    if next_roles != ["assistant", "assistant"]:
        raise reader.error(
            "chosen and rejected are not two answers to one prompt",
            f"after {cut} equal turns follows {next_roles[0]} in chosen, {next_roles[1]} in rejected",
        )
    if cut == 0:
        raise reader.error("the prompt is empty", "chosen and rejected begin with the answer")
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:])


def _continued(fields: Fields, key: str, prompt: list[Message], reader: _Reader) -> list[Message]:
    """The prompt and what follows it in `key`, where the prompt may be repeated."""
    value = fields[key]
    if isinstance(value, str):
        if _is_hh(value):
            return _hh_turns(reader.filled(value, key), key, reader)
        if not prompt:
            what = f"{key} is a string, and there is no prompt"
            raise reader.error(what, r"needed: prompt, lists of messages, or '\n\nHuman: ...'")
        return [*prompt, *_answer(fields, key, reader)]
    turns = reader.turns(value, key)
    asked = [message for message in prompt if message.role != "system"]
    told = [message for message in turns if message.role != "system"]
    # Beside a whole conversation a string is an extract of it.
    whole = isinstance(fields.get("prompt"), str) and told[:1] != [] and told[0].role != "assistant"
    if not whole and told[: len(asked)] != asked:
        return [*prompt, *turns]
    has_system = bool(turns) and turns[0].role == "system"
    return turns if has_system else [*(m for m in prompt if m.role == "system"), *turns]


def _is_hh(value: Any) -> bool:
    """Whether it is a conversation in one string, as Anthropic-HH has it."""
    return isinstance(value, str) and value.startswith(_HH_TURNS[0][0])


def _hh_turns(text: str, name: str, reader: _Reader, *, opened: bool = False) -> list[Message]:
    """Turns of a conversation in one string; with `opened` the last one may be empty."""
    turns: list[tuple[Role, str]] = []
    rest = text
    while rest:
        mark, role = next((m, r) for m, r in _HH_TURNS if rest.startswith(m))
        rest = rest[len(mark) :]
        ends = [at for at in (rest.find(m) for m, _ in _HH_TURNS) if at >= 0]
        end = min(ends, default=len(rest))
        turns.append((role, rest[:end].removeprefix(" ")))
        rest = rest[end:]
    if opened and turns[-1][0] == "assistant" and not turns[-1][1].strip():
        turns.pop()
    return [
        Message(role, reader.filled(content, f"{name}, turn {i + 1} ({role})"))
        for i, (role, content) in enumerate(turns)
    ]


def _other_format(fields: Fields, found: str, needed: str, origin: str) -> PippinError:
    keys = ", ".join(str(key) for key in fields) or "no field"
    if found:
        return PippinError(
            "P202",
            f"{origin} is a record of the format {found}, but the file began with {needed}",
            found=f"its fields: {keys}",
        )
    missing = [key for key in FORMATS[needed] if fields.get(key) is None] if needed else []
    what = f"lacks {' and '.join(map(repr, missing))}" if missing else "is of no known format"
    return PippinError(
        "P202", f"{origin} {what}", found=f"its fields: {keys}", choices=tuple(FORMATS)
    )
