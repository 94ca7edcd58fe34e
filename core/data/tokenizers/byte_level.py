"""What a byte-level BPE tokenizer is made of, and its saved form.

Byte-level BPE (GPT-2, Llama 3, Qwen, GPT-4) works on the bytes of UTF-8. Its files spell each byte
as a printable character: a space is "\u0120". The saved form is one JSON with everything that
decides the ids; its sha256 is the tokenizer's fingerprint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.tokenizers.base import CHAT_SYMBOLS, bad_tokenizer

KIND = "byte_bpe"
SAVED_FILE = "tokenizer.json"
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<|eot_id|>")
MAX_FILE_BYTES = 64_000_000
MAX_IDS = 1_000_000
# What may stand between text and pieces: each only cuts, and the last one spells bytes.
CUTTING = ("Sequence", "Split", "ByteLevel", "Digits")


def _byte_characters() -> tuple[str, ...]:
    """The character that spells each byte, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def spelled(piece: bytes) -> str:
    """Bytes as byte-level characters."""
    return "".join(BYTE_CHARACTERS[byte] for byte in piece)


def unspelled(piece: str) -> bytes | None:
    """The bytes that byte-level characters spell; None where one of them spells none."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return None


@dataclass(frozen=True)
class ByteLevelSpec:
    """Everything that decides the ids.

    Attributes:
        vocab: Id of each piece of text, spelled in byte-level characters.
        merges: "left right" in the order of their rank; None where the ids are the ranks and any
            two neighbours that make a piece merge, as in rank files.
        pre_tokenizer: How text is cut before pieces are found, as Hugging Face writes it.
        ignore_merges: Whether a cut that is a piece is taken as one before merging.
        controls: Id of each symbol that text can never become.
        eos: Name of the symbol that follows a document.
    """

    vocab: Mapping[str, int]
    merges: tuple[str, ...] | None
    pre_tokenizer: Mapping[str, Any]
    ignore_merges: bool
    controls: Mapping[str, int]
    eos: str

    def content(self) -> bytes:
        """The saved form."""
        data = {
            "format": "pippin-tokenizer",
            "version": 1,
            "kind": KIND,
            "eos": self.eos,
            "controls": _by_id(self.controls),
            "pre_tokenizer": self.pre_tokenizer,
            "ignore_merges": self.ignore_merges,
            "merges": None if self.merges is None else list(self.merges),
            "vocab": _by_id(self.vocab),
        }
        return (json.dumps(data, indent=0, sort_keys=False) + "\n").encode()


def _by_id(ids: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def checked_spec(spec: ByteLevelSpec, name: str) -> ByteLevelSpec:
    """The spec with the chat symbols that it lacks, after the last id.

    Raises:
        PippinError: P301 where ids or pieces contradict, or where text would be lost.
    """
    ids = [*spec.vocab.values(), *spec.controls.values()]
    if len(set(ids)) != len(ids):
        raise bad_tokenizer(f"{name} gives one id to two pieces")
    if min(ids) < 0 or max(ids) >= MAX_IDS:
        raise bad_tokenizer(
            f"{name} has ids from {min(ids):,} to {max(ids):,}, not 0 to {MAX_IDS:,}"
        )
    lacking = [byte for byte, char in enumerate(BYTE_CHARACTERS) if char not in spec.vocab]
    if lacking:
        raise bad_tokenizer(
            f"{name} is not lossless: {len(lacking)} of the 256 bytes have no piece",
            found="first: " + ", ".join(f"0x{byte:02X}" for byte in lacking[:8]),
        )
    for merge in spec.merges or ():
        left, _, right = merge.partition(" ")
        if not (left in spec.vocab and right in spec.vocab and left + right in spec.vocab):
            raise bad_tokenizer(
                f"{name}: the merge {merge!r} is of pieces that the vocabulary lacks"
            )
    if spec.eos not in spec.controls:
        raise bad_tokenizer(
            f"{name}: the end-of-document symbol {spec.eos!r} is none of its symbols"
        )
    check_cutting(spec.pre_tokenizer, name)
    new = [symbol for symbol in CHAT_SYMBOLS if symbol not in spec.controls]
    controls = {**spec.controls, **{symbol: max(ids) + 1 + i for i, symbol in enumerate(new)}}
    return ByteLevelSpec(
        spec.vocab, spec.merges, spec.pre_tokenizer, spec.ignore_merges, controls, spec.eos
    )


def check_cutting(pre_tokenizer: Any, name: str) -> None:
    """Refuse what does more than cut, and what does not end in bytes.

    Raises:
        PippinError: P301.
    """
    kinds = [step.get("type") for step in cutting_steps(pre_tokenizer)]
    unknown = [str(kind) for kind in kinds if kind not in CUTTING]
    if unknown or kinds[-1:] != ["ByteLevel"]:
        raise bad_tokenizer(
            f"{name} is no byte-level tokenizer: its text is cut by {kinds or 'nothing'}",
            found=f"read are {', '.join(CUTTING[1:])}, the last one ByteLevel",
        )


def cutting_steps(pre_tokenizer: Any) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer in order, sequences resolved."""
    if not isinstance(pre_tokenizer, Mapping):
        return []
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    inner = pre_tokenizer.get("pretokenizers")
    # Of sequences in sequences there is no honest case; they would be steps of unknown kind.
    return [step for step in inner if isinstance(step, Mapping)] if isinstance(inner, list) else []


def spec_from_saved(data: Mapping[str, Any], name: str) -> ByteLevelSpec:
    """Read the saved form.

    Raises:
        PippinError: P301 where it is not of this form.
    """
    merges, eos = data.get("merges"), data.get("eos")
    if not isinstance(eos, str) or not (merges is None or is_list_of_str(merges)):
        raise bad_tokenizer(f"{name} is damaged: eos or merges are not what they must be")
    spec = ByteLevelSpec(
        vocab=ids_of(data.get("vocab"), f"{name}: vocab"),
        merges=None if merges is None else tuple(merges),
        pre_tokenizer=data.get("pre_tokenizer") or {},
        ignore_merges=data.get("ignore_merges") is True,
        controls=ids_of(data.get("controls"), f"{name}: controls"),
        eos=eos,
    )
    return checked_spec(spec, name)


def ids_of(value: Any, name: str) -> dict[str, int]:
    """A JSON object of ids.

    Raises:
        PippinError: P301 where it is none.
    """
    if not isinstance(value, dict) or not value:
        raise bad_tokenizer(f"{name} is no object of ids")
    if not all(type(v) is int for v in value.values()):
        raise bad_tokenizer(f"{name} holds ids that are no whole numbers")
    return value


def is_list_of_str(value: Any) -> bool:
    """Whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read_bounded(path: Path) -> bytes:
    """The content of a file that is not unreasonably large.

    Raises:
        PippinError: P301 for a file beyond 64 MB or one that cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise bad_tokenizer(
                f"{path} has {size:,} bytes; a tokenizer has at most {MAX_FILE_BYTES:,}"
            )
        return path.read_bytes()
    except OSError as error:
        raise bad_tokenizer(f"{path} cannot be read: {error.strerror}") from error


def first_eos(names: Sequence[str]) -> str | None:
    """The first usual end-of-document symbol among names."""
    return next((name for name in EOS_NAMES if name in names), None)
