"""Which records are taken, and which of their fields is the text."""

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.reading.bad_lines import OnBadLine, Tally, is_text, lone_surrogate, too_long
from core.data.reading.chat_formats import content_of, detect_format
from core.data.reading.readers import PART_BYTES, Record
from core.errors import PippinError, all_problems


@dataclass(frozen=True)
class ReadOptions:
    """What to take from the records, and what to do with bad ones.

    Attributes:
        text_field: Field of a record that holds its text; a text file has no fields.
        on_bad_line: "error" stops at the first bad line or record, "skip" leaves out and counts.
        num_documents: At most this many, from the beginning; None is all.
        score_field: Field that holds a number, for `score_min`.
        score_min: Records with a lower score, or none (null), are left out and counted.
        config: Configuration of a Hub dataset; None is its default.
        split: Split of a Hub dataset; None is "train", or the only one.
        revision: Branch, tag or commit of a Hub dataset; None is the newest.

    Raises:
        PippinError: P010 where they contradict each other.
    """

    text_field: str = "text"
    on_bad_line: OnBadLine = "error"
    num_documents: int | None = None
    score_field: str | None = None
    score_min: float | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.num_documents is not None and self.num_documents < 1:
            problems.append(f"num_documents is {self.num_documents}, at least 1 is needed")
        if (self.score_field is None) != (self.score_min is None):
            problems.append("score_field and score_min need each other; one of them is missing")
        if self.score_min is not None and math.isnan(self.score_min):
            problems.append("score_min is no number")
        if self.on_bad_line not in ("error", "skip"):
            problems.append(f'on_bad_line is {self.on_bad_line!r}, not "error" or "skip"')
        if problems:
            raise all_problems("P010", problems, what="the options for reading do not fit")

    def decides(self) -> str:
        """Everything here that decides the documents, as text for a fingerprint."""
        return json.dumps(vars(self), sort_keys=True)


DEFAULT_OPTIONS = ReadOptions()


def limited_records(
    records: Iterable[Record], options: ReadOptions, tally: Tally
) -> Iterator[Record]:
    """Records with a sufficient score, as many as the options say."""
    for count, record in enumerate(scored(records, options, tally), start=1):
        yield record
        if count == options.num_documents:
            return


def scored(records: Iterable[Record], options: ReadOptions, tally: Tally) -> Iterator[Record]:
    """Records whose score is not too low; all where no score is asked for."""
    name, least = options.score_field, options.score_min
    for record in records:
        if name is None or least is None:
            yield record
            continue
        score = _score(record.fields.get(name))
        if score is None and record.fields.get(name, "") is not None:
            tally.reject(*_no_score(record, name))
        elif score is None or not score >= least:
            tally.done[f"records left out, as {name} is below {least:g}"] += 1
        else:
            yield record


def _score(value: object) -> float | None:
    """A number, or its text as a CSV has it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _no_score(record: Record, name: str) -> tuple[str, str, PippinError]:
    numbers = [key for key, value in record.fields.items() if _score(value) is not None]
    problem = "is not a number" if name in record.fields else "is missing"
    what = f"{record.where}: the score field {name!r} {problem}"
    error = PippinError("P202", what, choices=numbers)
    return f"the score field {name!r} {problem}", record.origin, error


def bad_text_field(
    record: Mapping[str, Any], name: str, where: str
) -> tuple[str, PippinError] | None:
    """Why a field of a record is no text; None where it is."""
    value = record.get(name)
    if isinstance(value, str):
        if len(value) > PART_BYTES:  # from parquet: the other formats are read in parts
            return too_long(where, PART_BYTES)
        return None if is_text(value) else lone_surrogate(value, where)
    texts = [key for key, other in record.items() if isinstance(other, str)]
    kind = "null" if value is None else type(value).__name__
    problem = f"is not a string but {kind}" if name in record else "is missing"
    others = ", ".join(map(str, record)) or "none"
    return (
        f"the text field {name!r} {problem}",
        PippinError(
            "P202",
            f"{where}: the text field {name!r} {problem}",
            found="" if texts else f"no field holds a string; the fields: {others}",
            choices=texts,
            remedy=_field_remedy(record, texts, where),
        ),
    )


def _field_remedy(record: Mapping[str, Any], texts: list[str], where: str) -> str:
    if content_of(detect_format(record)) == "text":
        return f"data.text_field={texts[0]}" if texts else ""
    # "a/b.jsonl:17", or "hf:NAME split, record 17"
    path = re.sub(r":\d+\Z", "", where)
    if path.startswith("hf:"):
        path = re.sub(r" \S+, record [\d,]+\Z", "", where)
    return prepare_command(path)


def prepare_command(given: str, flags: str = "") -> str:
    """The command that makes shards of an input.

    Args:
        given: The input.
        flags: More of them, each followed by a space.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(given).name.split(".")[0]).strip("-") or "chats"
    command = f"python tools/prepare_data.py {shlex.quote(given)} {flags}"
    return f"{command}--tokenizer auto --out shards/{name}"


def sound(records: Iterable[Record], tally: Tally) -> Iterator[Record]:
    """Records that can be written as UTF-8: no string in them holds a lone surrogate."""
    for record in records:
        bad = _first_bad_string(record.fields)
        if bad is None:
            yield record
        else:
            reason, error = lone_surrogate(bad, record.where)
            tally.reject(reason, record.origin, error)


def _first_bad_string(value: Any) -> str | None:
    """A string in a value of JSON kind that holds a lone surrogate; None where there is none."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if not is_text(one):
                return one
        elif isinstance(one, Mapping):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list):
            left += one
    return None
