"""A source for a character tokenizer that knows only some characters.

A document with others is a bad record like any other: an error that says where it is, or left out
and counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from core.data.chat import ChatSource
from core.data.reading.documents import Document
from core.data.reading.sources import RecordSource, Source, StorySource
from core.data.tokenizers.tokenizer import Tokenizer
from core.errors import PippinError


@dataclass
class KnownCharacters:
    """The documents of a source that a tokenizer can spell.

    Attributes:
        source: The documents.
        records: Where they come from: what becomes of bad ones is told there.
        tokenizer: Of kind "char".
    """

    source: Source
    records: RecordSource
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """Name of the source."""
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
        """That of the source: the tokenizer has its own."""
        return self.source.fingerprint

    def documents(self) -> Iterator[Document]:
        """Those that hold known characters alone; of a pair both or none.

        Raises:
            PippinError: P202 for another one, where bad records are errors.
        """
        documents = self.source.documents()
        for first in documents:
            # The two of a pair follow each other, and each is found by the other's place.
            pair = [first] if first.group is None else [first, next(documents)]
            unknown = self.tokenizer.unknown_characters("".join(one.text for one in pair))
            if not unknown:
                yield from pair
                continue
            reason, error = _unknown(unknown, first.origin)
            self.records.tally.reject(reason, first.origin, error)

    def notes(self) -> tuple[str, ...]:
        """What was left out in the last full pass, in words."""
        return self.source.notes()


def known_to(tokenizer: Tokenizer | None, source: Source) -> Source:
    """The source, without what the tokenizer cannot spell; itself where there is nothing like that."""
    if tokenizer is None or tokenizer.kind != "char" or isinstance(source, StorySource):
        return source
    records = source.source if isinstance(source, ChatSource) else source
    if not hasattr(records, "tally"):
        return source
    return KnownCharacters(source, records, tokenizer)  # type: ignore[arg-type]


def _unknown(characters: tuple[str, ...], origin: str) -> tuple[str, PippinError]:
    shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters[:8])
    more = f" and {len(characters) - 8:,} more" if len(characters) > 8 else ""
    return "characters that the tokenizer does not know", PippinError(
        "P202",
        f"{origin} holds what the character tokenizer does not know: {shown}{more}",
        remedy="data.tokenizer=bpe",
    )
