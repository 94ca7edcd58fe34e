"""Reading every file of a folder of shards again, whatever was verified before."""

from pathlib import Path

from core.data.shards.manifest import FileInfo, file_sha256, load_manifest, manifest_files
from core.errors import PippinError


def verify_shards(folder: Path) -> tuple[int, int]:
    """Compare sizes and sha256 of all files with the manifest.

    Returns:
        Files and bytes read.

    Raises:
        PippinError: P203 with everything that differs.
    """
    files = manifest_files(load_manifest(folder))
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
        return "" if file_sha256(path) == info.sha256 else f"{info.name}: its sha256 differs"
    except OSError as error:
        return f"{info.name} cannot be read: {error.strerror}"
