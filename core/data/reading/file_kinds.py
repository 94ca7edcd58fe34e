"""What a file holds and how it is packed, by its name."""

from pathlib import Path

_FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
PACKED = (".gz", ".zst")
# Parquet is packed inside: around it, .gz would only hide the index at its end.
FILE_KINDS = (*_FORMATS, *(f"{s}{p}" for s in _FORMATS if s != ".parquet" for p in PACKED))
KINDS_IN_WORDS = f"{' '.join(_FORMATS)}, and all but parquet also with {' or '.join(PACKED)}"


def file_format(path: Path) -> tuple[str, str]:
    """Format and packing of a file by its name.

    Returns:
        "text", "jsonl", "json", "csv" or "parquet", and "", ".gz" or ".zst". What is unknown is text.
    """
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    inner = Path(path.stem) if packed else path
    return _FORMATS.get(inner.suffix.lower(), "text"), packed
