"""Chats as tokens: one template, and one place that decides what is trained.

A turn is its role's symbol, a newline, the content, `<|end|>` and a newline:

    <|user|>
    Who are you?<|end|>
    <|assistant|>
    A pippin.<|end|>

Trained are the contents of answers and the `<|end|>` after them, so that a model learns to stop;
never a role's symbol, which is given to it. Content is used character by character, and text never
becomes a symbol. Generation begins with the very tokens that training had: `prompt_segments`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.data.reading.chat_formats import (
    FORMATS,
    Chat,
    Content,
    Message,
    Pair,
    Plain,
    Role,
    content_of,
    detect_format,
    normalise,
)
from core.data.reading.documents import Document
from core.data.reading.example import Segment
from core.data.reading.readers import Record
from core.data.reading.sources import RecordSource
from core.data.split import Split
from core.data.tokenizers.tokenizer import CHAT_SYMBOLS, Ids, Tokenizer
from core.errors import PippinError

# Part of the data's identity: a change of the template or of what is trained raises it.
TEMPLATE_VERSION = 1
# Generation stops at `<|end|>`; the end of the document, which follows it, is never asked for.
TRAIN_EOS = False

END = "<|end|>"
_SYMBOL_OF: dict[Role, str] = {"system": "<|system|>", "user": "<|user|>"}
# The newline is a segment of its own: it is there before the answer is.
_OPENED = (Segment("<|assistant|>", control=True, trained=False), Segment("\n", trained=False))


def chat_segments(chat: Chat) -> tuple[Segment, ...]:
    """The segments of a chat; trained are the answers from `chat.first_trained` on."""
    return _turns(chat.messages, first_trained=chat.first_trained)


def pair_segments(pair: Pair) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The segments of the chosen and of the rejected conversation; the prompt is trained in none."""
    start = len(pair.prompt)
    chosen = _turns((*pair.prompt, *pair.chosen), first_trained=start)
    return chosen, _turns((*pair.prompt, *pair.rejected), first_trained=start)


def prompt_segments(messages: Sequence[Message]) -> tuple[Segment, ...]:
    """What an answer is generated from: all turns, then an opened turn of the assistant."""
    return (*_turns(messages, first_trained=0), *_OPENED)


def _turns(messages: Sequence[Message], *, first_trained: int) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for i, message in enumerate(messages):
        trained = message.role == "assistant" and i >= first_trained
        if message.role == "assistant":
            segments += [*_OPENED, Segment(message.content, trained=trained)]
        else:
            symbol = Segment(_SYMBOL_OF[message.role], control=True, trained=False)
            segments += [symbol, Segment(f"\n{message.content}", trained=False)]
        segments += [Segment(END, control=True, trained=trained), Segment("\n", trained=False)]
    return tuple(segments)


def encode_segments(
    segments: Sequence[Segment], tokenizer: Tokenizer
) -> tuple[Ids, NDArray[np.uint8]]:
    """Token ids of a document, and which of them are trained.

    Each segment is encoded by itself, never joined with its neighbours: so an answer has the same
    tokens whether it is trained, is context in a pair, or is part of a prompt.

    Args:
        segments: From one of the functions above.
        tokenizer: One with the chat symbols.

    Returns:
        Ids, uint32 `[n]`, and weights, uint8 `[n]`: 1 where a token is trained. Without `</s>`.

    Raises:
        PippinError: P301 where the tokenizer lacks a symbol, P202 for text it cannot encode.
    """
    _check_symbols(tokenizer)
    # Most texts between symbols are one newline: each different text is encoded once.
    texts = list(dict.fromkeys(segment.text for segment in segments if not segment.control))
    ids_of = dict(zip(texts, tokenizer.encode_batch(texts)))
    control = {name: np.array([i], np.uint32) for name, i in tokenizer.control_ids.items()}
    parts = [control[s.text] if s.control else ids_of[s.text] for s in segments]
    trained = [segment.trained for segment in segments]
    weights = np.repeat(np.array(trained, np.uint8), [len(part) for part in parts])
    return np.concatenate([np.zeros(0, np.uint32), *parts]), weights


def _check_symbols(tokenizer: Tokenizer) -> None:
    missing = [name for name in CHAT_SYMBOLS if name not in tokenizer.control_ids]
    if missing:
        raise PippinError(
            "P301",
            f"the tokenizer has no chat symbols: {' '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing",
            found="conversations are told apart by symbols that text cannot become",
            choices=sorted(tokenizer.control_ids),
            remedy="use the tokenizer that the model was trained with, or data.tokenizer=bpe",
        )


@dataclass(frozen=True)
class Fit:
    """How a document fits a number of tokens.

    Attributes:
        tokens: All its tokens, without `</s>`.
        trained_tokens: The trained ones.
        trained_within: The trained ones among the first `max_tokens`; 0: nothing could be learned,
            so the document is to be skipped and counted as "no trained token".
        whole: Whether all tokens are within.
    """

    tokens: int
    trained_tokens: int
    trained_within: int
    whole: bool


def fit(segments: Sequence[Segment], tokenizer: Tokenizer, max_tokens: int) -> Fit:
    """Count; nothing is cut.

    Raises:
        PippinError: P301 and P202 as `encode_segments`.
    """
    ids, weights = encode_segments(segments, tokenizer)
    within = int(np.count_nonzero(weights[:max_tokens]))
    return Fit(len(ids), int(np.count_nonzero(weights)), within, len(ids) <= max_tokens)


def documents_of(
    value: Chat | Pair | Plain, origin: str, split: Split | None = None
) -> tuple[Document, ...]:
    """The documents of one record: one, or for a pair two, chosen and then rejected.

    A document's `text` is its segments without the symbols: what `decode` gives back.
    """
    if isinstance(value, Plain):
        return (Document(value.text, origin, split=split),)
    sides: tuple[tuple[Segment, ...], ...]
    if isinstance(value, Chat):
        sides, group = (chat_segments(value),), None
    else:
        sides, group = pair_segments(value), _group_of(value)
    return tuple(
        Document(
            "".join(segment.text for segment in segments if not segment.control),
            origin,
            split=split,
            segments=segments,
            group=group,
        )
        for segments in sides
    )


def _group_of(pair: Pair) -> str:
    """Of the prompt alone: what one prompt was answered never lies in two splits."""
    text = json.dumps([(m.role, m.content) for m in pair.prompt])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class ChatSource:
    """Chats, preferences or texts of a source of records.

    The first record of a file decides the format of the file, the first of all what the source holds;
    a record of another format or content is a bad one.

    Attributes:
        source: The records, and what becomes of bad ones.
        kind: What the source holds where that is known; None leaves it to the first record.
    """

    source: RecordSource
    kind: Content | None = None

    @property
    def name(self) -> str:
        """Name of the source of records."""
        return self.source.name

    @property
    def num_bytes(self) -> int:
        """Bytes of what is read, about."""
        return self.source.num_bytes

    @property
    def bytes_read(self) -> int:
        """How much of `num_bytes` the current pass has read."""
        return self.source.bytes_read

    @property
    def streams(self) -> bool:
        """Whether reading is so dear that it should be done once only."""
        return self.source.streams

    @property
    def fingerprint(self) -> str:
        """sha256 of the records' fingerprint, the template's version and what is trained."""
        text = f"chat {TEMPLATE_VERSION} {TRAIN_EOS}\n{self.source.fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def content(self) -> Content:
        """What the records are, by the first one that can be used.

        Raises:
            PippinError: P202 for a bad record where those are errors, P201 where there is none.
        """
        for value, _ in self._values():
            if isinstance(value, Plain):
                return "text"
            return "chat" if isinstance(value, Chat) else "preference"
        found = "\n".join(self.notes())
        what = f"no record of {self.name} can be used"
        raise PippinError("P201", what, found=found, choices=tuple(FORMATS))

    def documents(self) -> Iterator[Document]:
        """The documents of all records; of a pair the chosen, then the rejected one.

        Raises:
            PippinError: P202 for a bad record where those are errors.
        """
        for value, record in self._values():
            if isinstance(value, Plain) and not value.text.strip():
                self.source.tally.done["empty documents left out"] += 1
            else:
                yield from documents_of(value, record.origin, record.split)

    def notes(self) -> tuple[str, ...]:
        """What was left out in the last full pass, in words."""
        return self.source.notes()

    def _values(self) -> Iterator[tuple[Chat | Pair | Plain, Record]]:
        """What the records are; bad ones go to the tally."""
        formats: dict[str, str] = {}
        content = self.kind
        for record in self.source.records():
            where = record.where or record.origin
            file, found = _file_of(where), detect_format(record.fields)
            if found:
                content = content or content_of(found)
            if found and content_of(found) == content:
                formats.setdefault(file, found)
            format_name = formats.get(file, found)
            try:
                result = normalise(record.fields, format_name, where)
                if content_of(format_name) != content:
                    raise _other_content(where, content_of(format_name), content)
            except PippinError as error:
                reason = _reason(error, where)
                self.source.tally.reject(reason, record.origin, error)
                continue
            self.source.tally.done.update(result.left_out)
            yield result.value, record


def _file_of(origin: str) -> str:
    file, colon, line = origin.rpartition(":")
    return file if colon and line.isdigit() else origin


def _other_content(where: str, found: Content, needed: Content | None) -> PippinError:
    return PippinError(
        "P202",
        f"{where} is of the kind {found}, but the first one that counts is of the kind {needed}",
        found="one data set holds texts, chats or preferences; files of one kind belong in a folder",
    )


def _reason(error: PippinError, where: str) -> str:
    """The problem in words that are the same for each of its kind: without its place."""
    what = error.what.removeprefix(where).lstrip(": ")
    return re.sub(r"\[\d+\]", "[]", re.sub(r"\b(turn|after) \d+", r"\1 n", what))
