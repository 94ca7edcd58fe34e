"""What is trained on: the story corpus, texts, or chats where the records are chats and no text."""

import itertools
from pathlib import Path
from typing import NamedTuple

from core.data.chat import ChatSource
from core.data.preparing.building import Content
from core.data.reading.chat_formats import content_of, detect_format
from core.data.reading.selection import bad_text_field, prepare_command
from core.data.reading.sources import FileSource, ReadOptions, RecordSource, Source, open_source
from core.errors import PippinError

# Records that may come before the first one that is known; more would be read for nothing.
LOOKED_AT = 1_000


class Input(NamedTuple):
    """What is trained on.

    Attributes:
        source: Its documents.
        content: What they are.
        note: Where records could be taken in two ways, which one was, in words; else "".
    """

    source: Source
    content: Content
    note: str = ""


def open_input(input_file: str | Path, options: ReadOptions) -> Input:
    """The source of an input for training, and what its documents are.

    Raises:
        PippinError: P201 and P202 as `open_source`, P010 for preferences.
    """
    records = open_source(input_file, options=options)
    as_text = prepare_command(str(input_file), "--format text ")
    try:
        found = read_as(records, f"for the text: {as_text}")
    except PippinError as error:
        if error.code != "P202":
            raise
        return Input(records, "text")  # whatever is wrong with it is told when it is read
    if found.content == "preference":
        raise preferences_are_no_text(records.name, as_text if found.note else "")
    return found


def read_as(records: RecordSource, otherwise: str, *, chats: bool = False) -> Input:
    """Records as texts, or as chats or preferences where they are of such a format.

    The first record decides; where bad ones are left out, the first one that can be used. Records of
    a format of chats are chats though they hold the field "text" too, as Alpaca's do. Another
    text field that is named asks for texts.

    Args:
        records: The records.
        otherwise: What a user does for the texts of records that are chats too.
        chats: Chats or preferences are asked for: the first record that is one decides.

    Raises:
        PippinError: P202 for a bad first record, P201 as reading does.
    """
    options = records.options
    if options.text_field != "text" and not chats:
        return Input(records, "text")
    patient = chats or options.on_bad_line == "skip"
    for record in itertools.islice(records.records(), LOOKED_AT if patient else 1):
        name = detect_format(record.fields)
        content = content_of(name)
        is_text = bad_text_field(record.fields, options.text_field, record.where) is None
        if content != "text":
            kind = "chats" if content == "chat" else "preferences"
            note = f"{records.name} holds {name} and text: taken as {kind}; {otherwise}"
            return Input(ChatSource(records, content), content, note if is_text else "")
        if is_text and not chats:
            break
    return Input(records, "text")


def preferences_are_no_text(name: str, as_text: str = "") -> PippinError:
    """P010 for pairs given to training.

    Args:
        name: Of the input.
        as_text: The command that makes shards of the text beside them, where there is any.
    """
    return PippinError(
        "P010",
        f"{name} holds pairs of chosen and rejected answers",
        found="training on text would learn both",
        remedy=f"for the text beside them: {as_text}" if as_text else "shards of text or of chats",
    )


def splits_are_given(source: Source) -> bool:
    """Whether the names of files say which text is for validation."""
    records = source.source if isinstance(source, ChatSource) else source
    return isinstance(records, FileSource) and any(file.split for file in records.files)


def other_readings(source: Source) -> dict[str, str]:
    """Fingerprints of the same files read otherwise, and in words what is other there."""
    records = source.source if isinstance(source, ChatSource) else source
    if not isinstance(records, FileSource):
        return {}
    found = {}
    for other in records.read_otherwise():
        whole: Source = ChatSource(other) if isinstance(source, ChatSource) else other
        was, now = other.options.on_bad_line, records.options.on_bad_line
        found[whole.fingerprint] = f"data.on_bad_line was {was}, is {now}"
    return found
