"""Which folder of shards a text has: its name, and whether it is there already.

The name says the text and the tokenizer to people; the key in it is the content, so that a changed
text never finds the shards of the old one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from core.data.preparing.request import TokenizerRequest
from core.data.shards.manifest import (
    MANIFEST,
    VERSION,
    Manifest,
    SourceInfo,
    check_tokenizer,
    is_current,
    load_manifest,
    open_shards,
)
from core.data.shards.verify import own_tokenizer
from core.errors import PippinError

# Phase, facts, what was done, seconds: one line for the user each.
Report = Callable[[str, str, str, float], None]
# Damage of shards, ids, and of the tokenizer beside them.
_DAMAGE = ("P203", "P204", "P301")


def find_folder(
    shards_dir: Path,
    wanted: SourceInfo,
    request: TokenizerRequest,
    report: Report,
    readings: Callable[[], Mapping[str, str]] = dict,
) -> Path | None:
    """The first intact folder that holds what is wanted.

    Says which damaged ones are passed over, and where there is none, what differs from shards that
    were made from this text or under its name.

    Args:
        shards_dir: Holds the folders.
        wanted: The text, and how it is split.
        request: The tokenizer.
        report: Called with what is to be said.
        readings: Gives fingerprints of the same text read otherwise, and in words what is other.
    """
    others: list[Manifest] = []
    for path in sorted(shards_dir.glob(f"*/{MANIFEST}")):
        folder = path.parent
        if folder.name.startswith(".") or not is_current(folder):
            continue
        # Cheap first: a damaged folder of another text is none of this run's business.
        text = path.read_text(encoding="utf-8", errors="replace")
        same_text = wanted.fingerprint in text
        if not same_text and json.dumps(wanted.name) not in text:
            continue
        try:
            manifest = load_manifest(folder)
            if _same_text(manifest.source, wanted) and request.met_by(manifest.tokenizer):
                _check_intact(folder, manifest)
                return folder
        except PippinError as error:
            if error.code not in _DAMAGE:
                raise
            if same_text:
                why = (error.found or error.what).splitlines()[0]
                report("data", f"{folder} is damaged ({why})", "passed over", 0)
            continue
        others.append(manifest)
    what = _what_differs(others, wanted, request, readings)
    if what:
        report("data", what, "again", 0)
    return None


def _check_intact(folder: Path, manifest: Manifest) -> None:
    """Raise what is wrong with the files of a folder."""
    for split in ("train", "val", "test"):
        open_shards(folder, split)
    check_tokenizer(manifest, folder, own_tokenizer(folder, manifest).fingerprint)


def _same_text(a: SourceInfo, b: SourceInfo) -> bool:
    def decided(info: SourceInfo) -> tuple[object, ...]:
        return (info.fingerprint, info.seed, info.val_fraction, info.test_fraction)

    return decided(a) == decided(b)


def _what_differs(
    others: list[Manifest],
    wanted: SourceInfo,
    request: TokenizerRequest,
    readings: Callable[[], Mapping[str, str]],
) -> str:
    """In words, against the shards that are the most alike; "" where none were there before."""
    named = [manifest for manifest in others if manifest.source.name == wanted.name]
    same = {wanted.fingerprint: ""}
    known = [m for m in others if _reading(m.source)[0] in same]
    if named and not known:  # only then is the text read once more
        same |= readings()
        known = [m for m in named if _reading(m.source)[0] in same]
    if known:
        found = [_differences(manifest, wanted, request, same) for manifest in known]
        fewest = sorted(found, key=len)[0]
        return f"{wanted.name} was prepared otherwise: {'; '.join(fewest)}"
    if named:
        return f"{wanted.name} is not the text its last shards were made from, or is read otherwise"
    return ""


def _reading(source: SourceInfo) -> tuple[str, str]:
    """The fingerprint of the text, and a limit that stands behind it."""
    fingerprint, _, limit = source.fingerprint.partition(" ")
    return fingerprint, limit


def _differences(
    manifest: Manifest, wanted: SourceInfo, request: TokenizerRequest, same: Mapping[str, str]
) -> list[str]:
    there = manifest.source
    fingerprint, limit = _reading(there)
    found = [same[fingerprint]] if same[fingerprint] else []
    found += [f"it was cut at {limit}"] if limit else []
    for name in ("seed", "val_fraction", "test_fraction"):
        was, now = getattr(there, name), getattr(wanted, name)
        if was != now:
            found.append(f"data.{name} was {was}, is {now}")
    if not request.met_by(manifest.tokenizer):
        was, now = (_shown(one) for one in (manifest.tokenizer.requested, request.text))
        found.append(f"the tokenizer was {was}, is {now}")
    return found


def _shown(requested: str) -> str:
    """A tokenizer for people: of a hash the beginning."""
    return " ".join(word[:12] if len(word) == 64 else word for word in requested.split())


def folder_name(wanted: SourceInfo, request: TokenizerRequest) -> str:
    """A name for people, and a key of everything that decides the content."""
    kind = request.text.replace(" ", "")[:12]
    return f"{safe_name(wanted.name)}-{kind}-{content_key(wanted, request)[:12]}"


def content_key(wanted: SourceInfo, request: TokenizerRequest) -> str:
    """Hash of everything that decides the tokens, hexadecimal."""
    content = [VERSION, wanted.fingerprint, wanted.seed, wanted.val_fraction, wanted.test_fraction]
    return hashlib.sha256(json.dumps([*content, request.text]).encode()).hexdigest()


def safe_name(name: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:32].strip("-_") or "text"
