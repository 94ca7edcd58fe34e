"""`prepare_data.py info|verify|stats|show FOLDER`: look at shards."""

import json
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from core.cli import Parser, make_parser
from core.data.shards.manifest import Manifest, load_manifest, open_shards
from core.data.shards.stream import TokenStream
from core.data.shards.verify import check_sizes, own_tokenizer, verify_shards
from core.data.show import Row, render_rows
from core.data.split import SPLITS
from core.data.tokenizers.tokenizer import Tokenizer
from core.errors import PippinError
from tools.preparing.statistics import measure, plot

_PICTURES = (".png", ".svg", ".pdf", ".jpg")


def info(argv: list[str]) -> int:
    """Print a manifest."""
    args = _parser("info", "Print what a folder of shards holds.").parse_args(argv)
    manifest = load_manifest(args.folder)
    check_sizes(args.folder, manifest)
    if args.json:
        print(manifest.text(), end="")
    else:
        show_info(Console(highlight=False, soft_wrap=True), args.folder, manifest)
    return 0


def show_info(console: Console, folder: Path, manifest: Manifest) -> None:
    """A table of the splits, and what decided them."""
    source, tokenizer = manifest.source, manifest.tokenizer
    console.print(f" shards     {folder}   {manifest.content}, {manifest.dtype}", markup=False)
    console.print(
        f" text       {source.name}, {source.documents:,} documents, seed {source.seed}, sha "
        f"{source.fingerprint[:12]}",
        markup=False,
    )
    console.print(
        f" tokenizer  {tokenizer.kind} {tokenizer.vocab_size:,} ({tokenizer.file}, sha "
        f"{tokenizer.fingerprint[:12]}), largest id {manifest.max_id:,}",
        markup=False,
    )
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    # Of text all tokens are trained: billions must fit 80 columns.
    trained = ["trained"] if manifest.content != "text" else []
    for name in ("split", "documents", "tokens", *trained, "text MB", "bytes/token", "files", "MB"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for split in SPLITS:
        part = manifest.splits.get(split)
        if part is None:
            continue
        size = sum(f.bytes for f in (*part.files, *part.weights, part.offsets))
        table.add_row(
            split,
            f"{part.documents:,}",
            f"{part.tokens:,}",
            *([f"{part.trained_tokens:,}"] if trained else []),
            f"{part.text_bytes / 1e6:,.1f}",
            f"{part.text_bytes / part.tokens:.2f}" if part.tokens else "",
            f"{len(part.files)}",
            f"{size / 1e6:,.1f}",
        )
    console.print(table)
    for note in source.notes:
        console.print(f" note       {note}", markup=False)


def verify(argv: list[str]) -> int:
    """Read everything and compare sizes and hashes."""
    args = _parser("verify", "Read every file of a folder and compare hashes.").parse_args(argv)
    files, size = verify_shards(args.folder)
    if args.json:
        print(json.dumps({"folder": str(args.folder), "files": files, "bytes": size, "ok": True}))
    else:
        print(f" verified   {args.folder}: {files} files, {size / 1e6:,.1f} MB, all as written")
    return 0


def stats(argv: list[str]) -> int:
    """Token statistics, with a plot."""
    parser = _parser("stats", "Token statistics of shards, with a plot.")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="(stats-<folder>.png)")
    args = parser.parse_args(argv)
    if args.plot is not None and args.plot.suffix.lower() not in _PICTURES:
        parser.error(f"--plot {args.plot} does not end in {', '.join(_PICTURES)}")
    manifest = load_manifest(args.folder)
    tokenizer = own_tokenizer(args.folder, manifest)
    stream = open_shards(args.folder, args.split)
    if stream.num_tokens == 0:
        raise _empty_split(args.folder, args.split, manifest)
    found = measure(stream, tokenizer)
    picture = args.plot or Path(f"stats-{args.folder.resolve().name}.png")
    try:
        plot(found, picture, title=f"{args.folder.resolve().name}, {args.split}")
    except OSError as error:
        raise PippinError(
            "P312",
            f"{picture} cannot be written: {error.strerror or error}",
            remedy="--plot FILE, in a folder that you may write to",
        ) from error
    if args.json:
        print(json.dumps({**found.as_object(), "plot": str(picture)}))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for name, value in found.lines(tokenizer):
        console.print(f" {name:<26} {value}", markup=False)
    console.print(f" plot                       {picture}", markup=False)
    return 0


def show(argv: list[str]) -> int:
    """Rows with their trained tokens in colour."""
    parser = _parser("show", "Print documents with their trained tokens.")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="documents (3)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first document (0)")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="of each (500)")
    parser.add_argument("--split", choices=SPLITS, default="train")
    args = parser.parse_args(argv)
    stream = open_shards(args.folder, args.split)
    manifest = load_manifest(args.folder)
    tokenizer = own_tokenizer(args.folder, manifest)
    if args.rows < 1 or args.start < 0 or args.tokens < 1:
        parser.error("--rows and --tokens must be 1 or more, --start 0 or more")
    rows = []
    last = min(args.start + args.rows, len(stream.offsets) - 1)
    for number in range(args.start, last):
        begin, end = int(stream.offsets[number]), int(stream.offsets[number + 1])
        shown = min(end, begin + args.tokens)
        name = args.split
        if manifest.content == "preference":
            name += ", chosen" if number % 2 == 0 else ", rejected"
        if shown < end:
            name += f", first {shown - begin:,} of {end - begin:,} tokens"
        rows.append(_row(stream, number, begin, shown, name))
    if not rows:
        count = len(stream.offsets) - 1
        raise PippinError(
            "P201",
            f"{args.folder} has no document {args.start} in {args.split}",
            found=f"{count:,} documents, 0 to {count - 1:,}" if count else "0 documents",
        )
    if args.json:
        print(json.dumps([_as_object(row, tokenizer) for row in rows]))
        return 0
    console = Console(highlight=False)
    encoding = (console.encoding or "").lower()
    console.print(
        render_rows(
            rows,
            tokenizer,
            width=console.width,
            colour=console.is_terminal and not console.no_color,
            ascii=not encoding.startswith("utf"),
        )
    )
    return 0


def _empty_split(folder: Path, split: str, manifest: Manifest) -> PippinError:
    full = [name for name in SPLITS if name in manifest.splits and manifest.splits[name].tokens]
    return PippinError(
        "P201",
        f"the split {split} of {folder} is empty",
        found="0 tokens",
        choices=full,
        remedy=f"--split {full[0]}" if full else "",
    )


def _as_object(row: Row, tokenizer: Tokenizer) -> dict[str, object]:
    """A row for programs: `weights` above 0 are trained, symbols have no bytes of text."""
    text = tokenizer.decode(row.ids)
    return {"document": row.number, "text": text, "ids": row.ids, "weights": row.weights}


def _row(stream: TokenStream, number: int, begin: int, end: int, name: str) -> Row:
    weights = stream.gather_weights(np.arange(begin, end)).tolist()
    ids = stream.tokens(begin, end).tolist()
    return Row(number=number, ids=ids, weights=weights, origin=name)


def _parser(verb: str, what: str) -> Parser:
    parser = make_parser(f"tools/prepare_data.py {verb}", what)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder of shards")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
