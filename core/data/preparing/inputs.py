"""What is trained on: the story corpus, texts, or chats where the records are chats and no text."""

from pathlib import Path

from core.data.chat import ChatSource
from core.data.preparing.building import Content
from core.data.reading.chat_formats import content_of, detect_format
from core.data.reading.selection import bad_text_field
from core.data.reading.sources import FileSource, ReadOptions, RecordSource, Source, open_source
from core.errors import PippinError


def open_input(input_file: str | Path, options: ReadOptions) -> tuple[Source, Content]:
    """The source of an input, and what its documents are.

    Records that hold the text field are texts, whatever else they hold. Where the first one has no
    field "text" and none was named, but is a turn of a chat, all are chats, prepared as
    `tools/prepare_data.py` does.

    Raises:
        PippinError: P201 and P202 as `open_source`, P010 for preferences.
    """
    records = open_source(input_file, options=options)
    if options.text_field != "text" or _content(records) == "text":
        return records, "text"
    if _content(records) == "preference":
        raise preferences_are_no_text(records.name)
    return ChatSource(records), "chat"


def preferences_are_no_text(name: str) -> PippinError:
    """P010 for pairs given to training."""
    return PippinError(
        "P010",
        f"{name} holds pairs of chosen and rejected answers",
        found="training on text would learn both",
        remedy="shards of text or of chats",
    )


def _content(records: RecordSource) -> Content:
    """What the first record is."""
    try:
        first = next(iter(records.records()), None)
    except PippinError as error:
        if error.code != "P202":
            raise
        return "text"  # whatever is wrong with it is told when it is read
    text_field = records.options.text_field
    if first is None or bad_text_field(first.fields, text_field, first.where) is None:
        return "text"
    return content_of(detect_format(first.fields))


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
