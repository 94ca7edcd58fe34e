"""What the file of a sentencepiece model says of how text is changed before pieces are found.

A model is a protobuf message: https://github.com/google/sentencepiece, src/sentencepiece_model.proto.
Only the encoding of https://protobuf.dev/programming-guides/encoding is needed, not the package.
"""

from collections.abc import Iterator
from typing import NamedTuple

UNIGRAM, BPE, WORD = 1, 2, 3

# Fields of the model and of its normalizer; self-test data are texts with their pieces.
_TRAINER, _NORMALIZER, _SELF_TEST = 2, 3, 4
_MODEL_TYPE = 3
_NAME, _CHARSMAP, _PREFIX, _EXTRA_SPACES, _RULES = 1, 2, 3, 4, 6
_VARINT, _BYTES = 0, 2


class _Field(NamedTuple):
    """One field of a message: its number and value, and all of it as it is written."""

    number: int
    value: int | bytes | None
    raw: bytes


def model_type(content: bytes) -> int:
    """How a model was trained; sentencepiece does not tell."""
    values = [f.value for f in _fields(_joined(content, _TRAINER)) if f.number == _MODEL_TYPE]
    last = values[-1] if values else UNIGRAM
    return last if isinstance(last, int) else UNIGRAM


def keeping_text(content: bytes) -> tuple[bytes, tuple[str, ...]]:
    """A model that changes no text before it looks for pieces, with the same pieces and ids.

    Args:
        content: The bytes of a model that sentencepiece reads.

    Returns:
        The bytes of the model, those given where nothing was to be changed; and what was switched off,
        by sentencepiece's names.
    """
    normalizer = _joined(content, _NORMALIZER)
    given = {field.number: field.value for field in _fields(normalizer)}
    changes = []
    if given.get(_CHARSMAP):
        name = given.get(_NAME)
        rule = name.decode("utf-8", errors="replace") if isinstance(name, bytes) else ""
        changes.append(f"normalization {rule}".strip())
    # Both are on where the file does not say otherwise.
    if given.get(_PREFIX, 1):
        changes.append("add_dummy_prefix")
    if given.get(_EXTRA_SPACES, 1):
        changes.append("remove_extra_whitespaces")
    if not changes:
        return content, ()
    replaced = (_NAME, _CHARSMAP, _PREFIX, _EXTRA_SPACES, _RULES)
    kept = b"".join(f.raw for f in _fields(normalizer) if f.number not in replaced)
    identity = _written(_NAME, b"identity") + _written(_PREFIX, 0) + _written(_EXTRA_SPACES, 0)
    # Self-tests are of the model before the change, and a model that fails them is not loaded.
    rest = [f.raw for f in _fields(content) if f.number not in (_NORMALIZER, _SELF_TEST)]
    return b"".join([*rest, _written(_NORMALIZER, identity + kept)]), tuple(changes)


def _joined(message: bytes, number: int) -> bytes:
    """A message in a message; one that is written in several parts is the parts in a row."""
    values = (field.value for field in _fields(message) if field.number == number)
    return b"".join(value for value in values if isinstance(value, bytes))


def _fields(message: bytes) -> Iterator[_Field]:
    """The fields of a message in their order."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        value: int | bytes | None = None
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
        elif wire == _BYTES:
            size, at = _varint(message, at)
            value = message[at : at + size]
            at += size
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            return
        yield _Field(key >> 3, value, message[start:at])


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, at


def _written(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3 | _VARINT) + _number(value)
    return _number(number << 3 | _BYTES) + _number(len(value)) + value


def _number(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
