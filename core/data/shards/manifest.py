"""Shards: flat files of token ids, with a manifest that lets every damage be found.

The format is docs/data-format.md. A folder is written under a temporary name and renamed when it is
complete, and never changed afterwards. Reading checks sizes and sha256 first: a truncated file
under a memory map would be a bus error, and a flipped bit would be trained on.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.data.shards.stream import TokenStream
from core.data.split import Split
from core.errors import PippinError
from core.paths import is_safe_name

__all__ = [
    "FORMAT",
    "MANIFEST",
    "UPDATE",
    "VERIFIED",
    "VERSION",
    "Content",
    "FileInfo",
    "Manifest",
    "SourceInfo",
    "SplitInfo",
    "TokenStream",
    "TokenizerInfo",
    "check_tokenizer",
    "document_offsets",
    "is_current",
    "load_manifest",
    "open_shards",
    "other_tokenizer",
]

FORMAT: Literal["pippin-shards"] = "pippin-shards"
VERSION = 2
MANIFEST = "manifest.json"
VERIFIED = ".verified.json"
# What helps with shards of a newer version, which may be a week's work.
UPDATE = "update Pippin (git pull), then run the same command"

Content = Literal["text", "chat", "preference"]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class FileInfo(_Record):
    """One file: `items` are tokens, weights or offsets."""

    name: str
    items: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class SplitInfo(_Record):
    """One split.

    Attributes:
        files: Token ids, in order.
        weights: The weight of each token as a target, a file for each file of ids; none where every
            weight is 1.
        offsets: Where documents begin.
        tokens: Tokens in all files.
        trained_tokens: Those with a weight above 0.
        documents: Documents; of preferences two a pair, the chosen one first.
        text_bytes: Bytes of their text.
        entropy_bits: Upper bound of the information of the text where it was generated.
    """

    files: tuple[FileInfo, ...]
    weights: tuple[FileInfo, ...] = ()
    offsets: FileInfo
    tokens: int = Field(ge=0)
    trained_tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    entropy_bits: float | None

    @property
    def entropy_bits_per_byte(self) -> float | None:
        """The least bits per byte that any model can reach, about; None where not known."""
        if self.entropy_bits is None or self.text_bytes == 0:
            return None
        return self.entropy_bits / self.text_bytes


class TokenizerInfo(_Record):
    """The tokenizer of the ids; its file lies in the same folder."""

    kind: str
    file: str
    fingerprint: str
    vocab_size: int = Field(ge=1)
    requested: str


class SourceInfo(_Record):
    """The text, and everything but the tokenizer that decided the shards."""

    name: str
    fingerprint: str
    seed: int
    val_fraction: float
    test_fraction: float
    documents: int
    whole_documents: bool
    notes: tuple[str, ...]


class Manifest(_Record):
    """What a folder of shards holds. `digest` is the sha256 of all the rest.

    `content` says what a document is: text, a chat, or one side of a preference.
    """

    format: Literal["pippin-shards"]
    version: int
    content: Content = "text"
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerInfo
    source: SourceInfo
    max_id: int = Field(ge=0)
    splits: dict[str, SplitInfo]
    digest: str = ""

    def content_digest(self) -> str:
        """sha256 of the manifest without its digest, as canonical JSON, in hex."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        """The file's content, for people to read too."""
        signed = self.model_copy(update={"digest": self.content_digest()})
        return json.dumps(signed.model_dump(mode="json"), indent=1) + "\n"

    def content_sha256(self) -> str:
        """sha256 over the tokenizer and every token: the data's identity in a checkpoint, in hex.

        Unlike the digest it does not depend on how the shards were asked for, so shards that were
        deleted and made again from the same text are the same data.
        """
        hashes = [self.tokenizer.fingerprint]
        if self.content != "text":  # the identity of text stays what it was in version 1
            hashes.append(self.content)
        for name, info in sorted(self.splits.items()):
            files = (*info.files, *info.weights, info.offsets)
            hashes += [name, *(file.sha256 for file in files)]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens in all splits."""
        return sum(info.tokens for info in self.splits.values())

    @property
    def text_bytes(self) -> int:
        """Bytes of text in all splits."""
        return sum(info.text_bytes for info in self.splits.values())


def load_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        PippinError: P203 where it is missing, broken, changed, or of another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise PippinError(
            "P203",
            f"there are no shards in {folder}",
            found=_why_no_manifest(folder),
            remedy="python tools/prepare_data.py INPUT --tokenizer bpe --out "
            + ("FOLDER" if folder.is_file() else shlex.quote(str(folder))),
        )
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("version", 0)
        if version != VERSION:
            raise _other_version(folder, version)
        manifest = Manifest.model_validate_json(text)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read: {_first_line(error)}") from error
    if manifest.digest != manifest.content_digest():
        raise _damaged(folder, f"{MANIFEST} was changed after it was written")
    for name in (manifest.tokenizer.file, *(info.name for info in manifest_files(manifest))):
        if not is_safe_name(name):
            raise _damaged(folder, f"{MANIFEST} names the file {name!r}")
    return manifest


def _why_no_manifest(folder: Path) -> str:
    if folder.is_dir():
        return f"{MANIFEST} is missing"
    return "it is a file, not a folder" if folder.exists() else "there is no such folder"


def is_current(path: Path) -> bool:
    """Whether a folder's manifest is of this version; only format and version are looked at.

    A manifest that is no JSON is not of another version but damaged: it counts as current, so that
    `load_manifest` tells of it.

    Args:
        path: The folder, or its manifest.
    """
    try:
        text = (path if path.name == MANIFEST else path / MANIFEST).read_bytes()
    except OSError:
        return False
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return True
    if not isinstance(data, dict):
        return True
    return data.get("format") == FORMAT and data.get("version") == VERSION


def open_shards(
    folder: Path,
    split: Split,
    *,
    verify: bool = True,
    tokenizer: str | None = None,
) -> TokenStream:
    """Open one split of a folder of shards.

    Args:
        folder: Holds `manifest.json`.
        split: "train", "val" or "test".
        verify: Compare sha256; sizes are always compared. What was verified once is remembered by
            size and time of change.
        tokenizer: Fingerprint of the tokenizer that the ids must be of.

    Raises:
        PippinError: P203 for damage, P301 for shards of another tokenizer, P204 for ids beyond the
            vocabulary.
    """
    manifest = load_manifest(folder)
    check_tokenizer(manifest, folder, tokenizer)
    if manifest.max_id >= manifest.tokenizer.vocab_size:
        raise PippinError(
            "P204",
            f"the shards in {folder} hold token id {manifest.max_id}",
            found=f"their tokenizer has {manifest.tokenizer.vocab_size:,} ids",
        )
    info = manifest.splits.get(split)
    if info is None:
        raise _damaged(folder, f"there is no split {split!r}")
    if info.weights and [f.items for f in info.weights] != [f.items for f in info.files]:
        raise _damaged(folder, f"the weights of {split!r} are not as many as its tokens")
    _check_files(folder, (*info.files, *info.weights, info.offsets), verify=verify)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    return TokenStream(
        [_mapped(folder, file, dtype) for file in info.files],
        weights=[_mapped(folder, file, np.dtype(np.uint8)) for file in info.weights],
        trained_tokens=info.trained_tokens,
        vocab_size=manifest.tokenizer.vocab_size,
        text_bytes=info.text_bytes,
        entropy_bits_per_byte=info.entropy_bits_per_byte,
        offsets=_read_offsets(folder, info.offsets),
    )


def document_offsets(folder: Path, split: Split) -> NDArray[np.int64]:
    """Where documents begin, int64 `[documents + 1]`; the last is the number of tokens."""
    info = load_manifest(folder).splits[split].offsets
    _check_files(folder, (info,), verify=True)
    return _read_offsets(folder, info)


def _mapped(folder: Path, info: FileInfo, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(folder / info.name, dtype=dtype, mode="r", shape=(info.items,))


def _read_offsets(folder: Path, info: FileInfo) -> NDArray[np.int64]:
    return np.fromfile(folder / info.name, dtype="<i8").astype(np.int64)


def check_tokenizer(manifest: Manifest, folder: Path, fingerprint: str | None) -> None:
    """Raise P301 where the shards were made with another tokenizer."""
    if fingerprint is not None and fingerprint != manifest.tokenizer.fingerprint:
        raise other_tokenizer(manifest, folder, f"sha {fingerprint[:8]}")


def other_tokenizer(manifest: Manifest, folder: Path, given: str) -> PippinError:
    """P301: the shards were made with another tokenizer.

    Args:
        manifest: Of the shards.
        folder: Of the shards.
        given: The other one in words.
    """
    made_with = manifest.tokenizer
    return PippinError(
        "P301",
        f"the shards in {folder} were made with another tokenizer",
        found=f"shards: sha {made_with.fingerprint[:8]} ({made_with.kind}, "
        f"{made_with.vocab_size:,} ids)\ngiven:  {given}",
        remedy="train without data.tokenizer, or let the shards be made again",
    )


def _check_files(folder: Path, files: Sequence[FileInfo], *, verify: bool) -> None:
    verified = _read_verified(folder)
    problems = []
    for info in files:
        path = folder / info.name
        try:
            stat = path.stat()
        except OSError:
            problems.append(f"{info.name} is missing")
            continue
        if stat.st_size != info.bytes:
            problems.append(f"{info.name}: {stat.st_size:,} bytes instead of {info.bytes:,}")
            continue
        seen = [stat.st_size, stat.st_mtime_ns, info.sha256]
        if verify and verified.get(info.name) != seen:
            if file_sha256(path) != info.sha256:
                problems.append(f"{info.name}: its sha256 differs from the manifest's")
            else:
                verified[info.name] = seen
    if problems:
        raise _damaged(folder, "\n".join(problems))
    if verify:
        _write_verified(folder, verified)


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_verified(folder: Path) -> dict[str, list[object]]:
    try:
        seen = json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return seen if isinstance(seen, dict) else {}


def _write_verified(folder: Path, verified: dict[str, list[object]]) -> None:
    """Remember what was verified; a folder that cannot be written is verified each time."""
    if verified == _read_verified(folder):
        return
    partial = folder / f"{VERIFIED}.{os.getpid()}"
    try:
        partial.write_text(json.dumps(verified))
        partial.replace(folder / VERIFIED)
    except OSError:
        return


def manifest_files(manifest: Manifest) -> list[FileInfo]:
    """Every file of every split."""
    splits = manifest.splits.values()
    return [f for split in splits for f in (*split.files, *split.weights, split.offsets)]


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _other_version(folder: Path, found: object) -> PippinError:
    newer = is_newer(found)
    return PippinError(
        "P203",
        f"the shards in {folder} cannot be read",
        found=f"they were written by {'a newer' if newer else 'an older'} version of Pippin: "
        f"shards of version {found}, needed {VERSION}",
        remedy=UPDATE if newer else _make_again(folder),
        kept="Nothing was changed." if newer else "",
    )


def is_newer(version: object) -> bool:
    """Whether shards of a version are of a Pippin that is yet to come."""
    return type(version) is int and version > VERSION


def _damaged(folder: Path, found: str) -> PippinError:
    return PippinError(
        "P203",
        f"the shards in {folder} are damaged",
        found=found,
        remedy=_make_again(folder),
    )


def _make_again(folder: Path) -> str:
    return f"rm -r {shlex.quote(str(folder))}   (then make it again)"
