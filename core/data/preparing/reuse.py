"""Which folder of shards a text has: its name, and whether it is there already.

The name says the text and the tokenizer to people; the key in it is the content, so that a changed
text never finds the shards of the old one.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from core.data.preparing.request import TokenizerRequest
from core.data.shards.manifest import MANIFEST, VERSION, SourceInfo, is_current, load_manifest

# Phase, facts, what was done, seconds: one line for the user each.
Report = Callable[[str, str, str, float], None]


def find_folder(
    shards_dir: Path, wanted: SourceInfo, request: TokenizerRequest, report: Report
) -> Path | None:
    """The folder that holds what is wanted already; says where only the text has changed."""
    changed = False
    for path in sorted(shards_dir.glob(f"*/{MANIFEST}")):
        # Cheap first: a damaged folder of another text is none of this run's business.
        if path.parent.name.startswith(".") or not is_current(path.parent):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if wanted.fingerprint not in text:
            changed = changed or path.parent.name.startswith(_name_and_kind(wanted, request))
            continue
        manifest = load_manifest(path.parent)
        if _same_text(manifest.source, wanted) and request.met_by(manifest.tokenizer):
            return path.parent
    if changed:
        report("data", f"{wanted.name} is not the text its last shards were made from", "again", 0)
    return None


def _same_text(a: SourceInfo, b: SourceInfo) -> bool:
    def decided(info: SourceInfo) -> tuple[object, ...]:
        return (info.fingerprint, info.seed, info.val_fraction, info.test_fraction)

    return decided(a) == decided(b)


def folder_name(wanted: SourceInfo, request: TokenizerRequest) -> str:
    """A name for people, and a key of everything that decides the content."""
    return f"{_name_and_kind(wanted, request)}-{content_key(wanted, request)[:12]}"


def _name_and_kind(wanted: SourceInfo, request: TokenizerRequest) -> str:
    return f"{safe_name(wanted.name)}-{request.text.replace(' ', '')[:12]}"


def content_key(wanted: SourceInfo, request: TokenizerRequest) -> str:
    """Hash of everything that decides the tokens, hexadecimal."""
    content = [VERSION, wanted.fingerprint, wanted.seed, wanted.val_fraction, wanted.test_fraction]
    return hashlib.sha256(json.dumps([*content, request.text]).encode()).hexdigest()


def safe_name(name: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:32].strip("-_") or "text"
