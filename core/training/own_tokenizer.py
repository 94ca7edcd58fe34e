"""The tokenizer in a run's folder against its checkpoint, before any text is read with it."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from core.data.tokenizers.tokenizer import load_tokenizer
from core.errors import PippinError
from core.paths import TOKENIZER_FILES
from core.training.resume import ResumePoint
from core.training.runfolder import RUNS_DIR


def check_own_tokenizer(start: ResumePoint) -> None:
    """Refuse a run whose tokenizer is damaged, missing or another one.

    Args:
        start: A checkpoint in its run folder; nothing is checked for one outside any.

    Raises:
        PippinError: P301, with the command that puts an intact copy back where one is found.
    """
    wanted = start.meta.tokenizer.get("sha256")
    if start.folder is None or wanted is None:
        return
    found = _fingerprint(start.folder)
    if found == wanted:
        return
    size = start.meta.tokenizer.get("vocab_size", "?")
    there = [start.folder / name for name in TOKENIZER_FILES if (start.folder / name).exists()]
    state = f"has sha256 {found[:12]}..." if found else "is missing or damaged"
    shown = " and ".join(map(str, there)) or f"{start.folder}/tokenizer.*"
    raise PippinError(
        "P301",
        f"the tokenizer in {start.folder} is not the one of {start.path.name}.",
        found=f"the run was trained with sha256 {str(wanted)[:12]}... ({size} ids)\n{shown} {state}",
        remedy=_mend(start.folder, there, _intact(start, str(wanted))),
        kept="nothing was changed.",
    )


def _mend(folder: Path, there: list[Path], good: Path | None) -> str:
    if good is None:
        return (
            f"put the run's own tokenizer back into {folder}, from a copy of the run "
            "(none is in the prepared texts or in other runs here)"
        )
    copy = shlex.join(["cp", str(good), str(folder / good.name)])
    stray = [str(path) for path in there if path.name != good.name]
    return f"{shlex.join(['rm', *stray])} && {copy}" if stray else copy


def _intact(start: ResumePoint, wanted: str) -> Path | None:
    """A file with the run's tokenizer, among the prepared texts and the other runs."""
    data = start.meta.config.get("data", {})
    given = data.get("input_file")  # it can be a folder of shards itself
    text = (Path(given),) if given is not None and Path(given).is_dir() else ()
    shards = Path(str(data.get("shards_dir", "shards")))
    for folder in (*text, *_folders(shards), *_folders(RUNS_DIR)):
        if folder == start.folder or _fingerprint(folder) != wanted:
            continue
        return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    return None


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(p for p in parent.iterdir() if p.is_dir())


def _fingerprint(folder: Path) -> str:
    """Of the tokenizer in a folder; empty where there is none that can be read."""
    try:
        return load_tokenizer(folder).fingerprint
    except PippinError:
        return ""
