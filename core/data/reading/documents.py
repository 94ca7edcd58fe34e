"""One text as it is prepared, and the texts of records."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from core.data.reading.bad_lines import Tally
from core.data.reading.example import Segment
from core.data.reading.readers import Record
from core.data.reading.selection import ReadOptions, bad_text_field, scored
from core.data.split import Split

# What an input begins with that is a data set of the Hub, or of a folder in its layout.
HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: The text, at least one character that is not white space; of a chat all segments
            joined.
        origin: Where it is: "book.txt", "data.jsonl:17", "story 12".
        entropy_bits: Upper bound of its information where it was generated, else None.
        split: Where the source itself decides it, else None.
        segments: Text and control symbols of a chat; None for plain text.
        group: Documents of one group stay in one split and next to each other.
    """

    text: str
    origin: str
    entropy_bits: float | None = None
    split: Split | None = None
    segments: tuple[Segment, ...] | None = None
    group: str | None = None


def text_documents(
    records: Iterable[Record], options: ReadOptions, tally: Tally
) -> Iterator[Document]:
    """Documents of the text field of records, filtered and limited as the options say.

    Raises:
        PippinError: P202 for a record without text, unless the tally skips it.
    """
    count = 0
    for record in scored(records, options, tally):
        problem = bad_text_field(record.fields, options.text_field, record.where)
        if problem is not None:
            tally.reject(problem[0], record.origin, problem[1])
            continue
        text = record.fields[options.text_field]
        if not text or text.isspace():
            tally.done["empty documents left out"] += 1
            continue
        yield Document(text, record.origin, split=record.split)
        count += 1
        if count == options.num_documents:
            return
