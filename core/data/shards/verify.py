"""Reading every file of a folder of shards again, whatever was verified before."""

import shlex
from pathlib import Path

from core.data.shards.manifest import (
    FileInfo,
    Manifest,
    file_sha256,
    load_manifest,
    manifest_files,
)
from core.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from core.errors import PippinError


def verify_shards(folder: Path) -> tuple[int, int]:
    """Compare sizes and sha256 of all files and of the tokenizer with the manifest.

    Returns:
        Files of tokens, weights and offsets, and bytes read of them.

    Raises:
        PippinError: P203 with everything that differs.
    """
    manifest = load_manifest(folder)
    files = manifest_files(manifest)
    problems = [_problem(folder, info, hashes=True) for info in files]
    _refuse(folder, [*problems, _tokenizer_problem(folder, manifest, hashes=True)])
    return len(files), sum(info.bytes for info in files)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the sizes of all files with the manifest, without reading them.

    Raises:
        PippinError: P203 with everything that differs.
    """
    problems = [_problem(folder, info, hashes=False) for info in manifest_files(manifest)]
    _refuse(folder, [*problems, _tokenizer_problem(folder, manifest, hashes=False)])


def check_tokenizer_file(folder: Path, manifest: Manifest) -> None:
    """Compare the tokenizer's file with the manifest.

    Raises:
        PippinError: P203 where it is missing or another one.
    """
    _refuse(folder, [_tokenizer_problem(folder, manifest, hashes=True)])


def own_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of shards, from their folder.

    Raises:
        PippinError: P203 where its file is missing or another one.
    """
    check_tokenizer_file(folder, manifest)
    return load_tokenizer(folder / manifest.tokenizer.file)


def _refuse(folder: Path, problems: list[str]) -> None:
    found = "\n".join(problem for problem in problems if problem)
    if found:
        raise PippinError(
            "P203",
            f"the shards in {folder} are damaged",
            found=found,
            remedy=f"rm -r {shlex.quote(str(folder))}   (and make it again)",
        )


def _problem(folder: Path, info: FileInfo, *, hashes: bool) -> str:
    """What is wrong with a file, in words; "" where nothing is."""
    path = folder / info.name
    try:
        if _leads_out(folder, path):
            return f"{info.name} is a link out of the folder"
        size = path.stat().st_size
        if size != info.bytes:
            return f"{info.name}: {size:,} bytes instead of {info.bytes:,}"
        if hashes and file_sha256(path) != info.sha256:
            return f"{info.name}: its sha256 differs"
    except OSError as error:
        return f"{info.name} cannot be read: {error.strerror}"
    return ""


def _tokenizer_problem(folder: Path, manifest: Manifest, *, hashes: bool) -> str:
    name = manifest.tokenizer.file
    path = folder / name
    try:
        if not path.is_file():
            return f"{name}, the tokenizer, is missing"
        if _leads_out(folder, path):
            return f"{name} is a link out of the folder"
        if hashes and file_sha256(path) != manifest.tokenizer.fingerprint:
            return f"{name} is not the tokenizer that the shards were made with"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return ""


def _leads_out(folder: Path, path: Path) -> bool:
    """Whether a file is a link that leaves its folder, as no file of Pippin does."""
    return path.is_symlink() and path.resolve().parent != folder.resolve()
