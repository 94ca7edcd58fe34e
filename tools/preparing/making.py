"""`prepare_data.py INPUT... --tokenizer T --out FOLDER`: make shards."""

import argparse
import json
import shlex
from pathlib import Path

from rich.console import Console

from core.cli import Parser, make_parser
from core.data.preparing.building import BuildOptions
from core.data.preparing.inputs import LOOKED_AT, Input, read_as
from core.data.preparing.ours import foreign_names, holds_shards
from core.data.preparing.prepare import default_workers, make_shards, wanted_source
from core.data.preparing.request import resolve_tokenizer
from core.data.preparing.shard_builder import SHARD_TOKENS
from core.data.reading.sources import ReadOptions, open_source
from core.data.shards.manifest import MANIFEST, UPDATE, Manifest, SourceInfo, load_manifest
from core.data.shards.verify import verify_shards
from core.data.tokenizers.tokenizer import KINDS
from core.errors import PippinError
from tools.preparing.looking import show_info
from tools.preparing.numbers import (
    check_fractions,
    check_vocab_size,
    count,
    seed_number,
    shard_size,
)
from tools.preparing.progress import Bar

PROG = "tools/prepare_data.py"
_AGAIN = "the same command with --overwrite, which makes them again"


def add_reading(parser: Parser, *, required: bool = True) -> None:
    """Flags that say what is read."""
    parser.add_argument(
        "inputs",
        nargs="+" if required else "*",
        metavar="INPUT",
        help="files, folders, globs, hf:NAME",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of a record")
    parser.add_argument(
        "--format",
        choices=("auto", "text", "chat"),
        default="auto",
        help="text, or conversations and preferences; auto: as the first record (that can be used), "
        "text where another --text-field is given",
    )
    parser.add_argument("--config", metavar="NAME", help="configuration of a hub dataset")
    parser.add_argument("--split", metavar="NAME", help="split of a hub dataset")
    parser.add_argument("--revision", metavar="NAME", help="revision of a hub dataset")
    parser.add_argument("--num-documents", type=count, metavar="N", help="read at most N records")
    parser.add_argument("--score-field", metavar="NAME", help="field with a number")
    parser.add_argument("--score-min", type=float, metavar="X", help="leave out records below X")
    parser.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="what cannot be read stops everything, or is left out and counted",
    )


def add_splitting(parser: Parser) -> None:
    """Flags that say how much is made, and into what it is divided."""
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="X", help="(0.02)")
    parser.add_argument("--test-fraction", type=float, default=0.02, metavar="X", help="(0.02)")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="stop there; 1e9 works")
    parser.add_argument("--tokens-per-shard", type=shard_size, default=SHARD_TOKENS, metavar="N")


def open_input(args: argparse.Namespace) -> Input:
    """The source, and what its documents are."""
    if args.score_min is not None and not args.score_field:
        raise PippinError("P012", "--score-min needs --score-field.", remedy="--score-field NAME")
    options = ReadOptions(
        text_field=args.text_field,
        on_bad_line=args.on_bad_line,
        num_documents=args.num_documents,
        score_field=args.score_field,
        score_min=args.score_min,
        config=args.config,
        split=args.split,
        revision=args.revision,
    )
    source = open_source(args.inputs, options=options)
    if args.format == "text":
        return Input(source, "text")
    found = read_as(source, "for the text: --format text", chats=args.format == "chat")
    if args.format == "auto":
        return found
    if found.content == "text":
        raise PippinError(
            "P202",
            f"{source.name} holds no conversations",
            found=f"none of its first {LOOKED_AT:,} records looks like one",
            choices=("messages", "prompt + completion", "prompt + chosen + rejected"),
        )
    return found._replace(note="")  # it was asked for


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    verbs = "plan, info, verify, stats, show, import"
    what = f"Make shards of text. Other verbs ({verbs}) come first: prepare_data.py plan --help."
    parser = make_parser(PROG, what)
    add_reading(parser)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help=f"a file, or {KINDS}")
    parser.add_argument("--vocab-size", type=count, metavar="N", help="for a tokenizer to train")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="shards/NAME")
    add_splitting(parser)
    parser.add_argument("--seed", type=seed_number, default=1, metavar="N", help="of the split (1)")
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="processes (one per core that may be used, at most 8)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--quiet", action="store_true", help="only errors")
    parser.add_argument("--json", action="store_true", help="the manifest as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    check_fractions(parser, args.val_fraction, args.test_fraction)
    check_vocab_size(parser, args.tokenizer, args.vocab_size)
    return args


def main(argv: list[str]) -> int:
    """Make shards."""
    args = parse_args(argv)
    # Names of files are no markup, and a path that is wrapped cannot be copied.
    console = Console(
        quiet=args.quiet, highlight=False, markup=False, soft_wrap=True, stderr=args.json
    )
    source, content, note = open_input(args)
    if note:
        console.print(f" data       {note}")
    request = resolve_tokenizer(source, args.tokenizer, args.vocab_size)
    wanted = wanted_source(
        source, seed=args.seed, val_fraction=args.val_fraction, test_fraction=args.test_fraction
    )
    if args.max_tokens is not None:
        wanted = wanted.model_copy(
            update={"fingerprint": f"{wanted.fingerprint} max_tokens={args.max_tokens}"}
        )
    held = _held(args.out, overwrite=args.overwrite)
    if held is not None and not args.overwrite:
        differs = _differences(held, wanted, args.tokens_per_shard)
        if not request.met_by(held.tokenizer):
            differs.append(f"the tokenizer: there {held.tokenizer.requested}, asked {request.text}")
        if not differs:
            _require_whole(args.out)
            console.print(f" shards     {args.out} holds exactly this already")
            return _told(console, args, args.out, held)
        raise PippinError(
            "P311",
            f"{args.out} holds other shards",
            found="\n".join(differs),
            remedy="--overwrite, or another --out",
            kept="Nothing was changed.",
        )
    with Bar(console, source, args.max_tokens) as bar:
        options = BuildOptions(
            workers=args.workers or default_workers(source),
            shard_tokens=args.tokens_per_shard,
            max_tokens=args.max_tokens,
            content=content,
            progress=bar.update,
        )
        folder = make_shards(
            source,
            wanted,
            request,
            args.out,
            options=options,
            replace_target=args.overwrite,
            report=lambda phase, facts, result, seconds: console.print(
                f" {phase:<10} {facts}   {result}   {seconds:.1f} s"
            ),
            counted=bar.expect,
        )
    return _told(console, args, folder, load_manifest(folder))


def _told(console: Console, args: argparse.Namespace, folder: Path, manifest: Manifest) -> int:
    """Say what the folder holds and what can be done with it; returns the exit code."""
    if args.json:
        print(json.dumps({"folder": str(folder), **manifest.model_dump(mode="json")}))
        return 0
    show_info(console, folder, manifest)
    trains = manifest.content != "preference"
    if trains and not manifest.splits["val"].tokens:
        console.print(
            " note       no text for validation, which training needs: --val-fraction, more text"
        )
    verb = "train.py --input_file" if trains else "tools/prepare_data.py show"
    console.print(f" next       python {verb} {shlex.quote(str(folder))}")
    return 0


def _differences(held: Manifest, wanted: SourceInfo, shard_tokens: int) -> list[str]:
    """What was asked for that the shards were not made with, in words."""
    there, found = held.source, []
    if there.fingerprint != wanted.fingerprint:
        found.append(f"the text, or how it is read: there {there.name}, asked {wanted.name}")
    for name in ("seed", "val_fraction", "test_fraction"):
        a, b = getattr(there, name), getattr(wanted, name)
        if a != b:
            found.append(f"{name}: there {a}, asked {b}")
    # Files are full but for the last one of a split.
    splits = held.splits.values()
    full = {file.items for split in splits for file in split.files[:-1]}
    largest = max((file.items for split in splits for file in split.files), default=0)
    if largest > shard_tokens or full - {shard_tokens}:
        found.append(f"tokens per shard: there {largest:,}, asked {shard_tokens:,}")
    return found


def _require_whole(folder: Path) -> None:
    """Raise P203 where what the folder holds is damaged."""
    try:
        verify_shards(folder)
    except PippinError as error:
        error.remedy, error.kept = _AGAIN, "Nothing was changed."
        raise


def _held(folder: Path, *, overwrite: bool) -> Manifest | None:
    """What is in the folder already, if shards; None also for damaged ones that are to be replaced.

    Raises:
        PippinError: P311 for a folder of others, or to be replaced with files of others in it, P203
            for shards whose manifest cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise _not_ours(folder, "holds no shards", "another --out")
        return None
    held = None
    try:
        held = load_manifest(folder)
    except PippinError as error:
        if not holds_shards(folder):
            found = f"holds a {MANIFEST} and no shards"
            raise _not_ours(folder, found, "another --out") from error
        if not overwrite:
            # Shards of a newer version are no damage.
            error.remedy = error.remedy if error.remedy == UPDATE else _AGAIN
            error.kept = "Nothing was changed."
            raise
    foreign = foreign_names(folder) if overwrite else ()
    if foreign:
        names = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        remedy = "move it elsewhere, or another --out"
        raise _not_ours(folder, f"holds what is no part of shards: {names}", remedy)
    return held


def _not_ours(folder: Path, holds: str, remedy: str) -> PippinError:
    kept = "Nothing was changed."
    return PippinError("P311", f"{folder} exists and {holds}", remedy=remedy, kept=kept)
