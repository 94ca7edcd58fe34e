"""Reading every file of a folder of shards again, whatever was verified before."""

import hashlib
from pathlib import Path

from core.data.shards import FileInfo, load_manifest
from core.errors import PippinError


def verify_shards(folder: Path) -> tuple[int, int]:
    """Compare sizes and sha256 of all files with the manifest.

    Returns:
        Files and bytes read.

    Raises:
        PippinError: P203 with everything that differs.
    """
    manifest = load_manifest(folder)
    files = [
        info
        for split in manifest.splits.values()
        for info in (*split.files, *split.weights, split.offsets)
    ]
    problems = [problem for info in files if (problem := _problem(folder, info))]
    if problems:
        raise PippinError(
            "P203",
            f"the shards in {folder} are damaged",
            found="\n".join(problems),
            remedy=f"rm -r '{folder}'   (and make it again)",
        )
    return len(files), sum(info.bytes for info in files)


def _problem(folder: Path, info: FileInfo) -> str:
    path = folder / info.name
    try:
        size = path.stat().st_size
        if size != info.bytes:
            return f"{info.name}: {size:,} bytes instead of {info.bytes:,}"
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        return f"{info.name} cannot be read: {error.strerror}"
    return "" if digest.hexdigest() == info.sha256 else f"{info.name}: its sha256 differs"
