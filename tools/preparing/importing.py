"""`prepare_data.py import PATH --tokenizer T --out FOLDER`: token files of other projects."""

import json
from pathlib import Path

from rich.console import Console

from core.cli import make_parser
from core.data.foreign.formats import FORMATS
from core.data.foreign.importing import import_foreign
from core.data.preparing.shard_builder import SHARD_TOKENS
from core.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from core.errors import PippinError
from tools.preparing.looking import show_info
from tools.preparing.numbers import seed_number, shard_size


def main(argv: list[str]) -> int:
    """Import."""
    parser = make_parser("tools/prepare_data.py import", "Import token files of other projects.")
    parser.add_argument("path", type=Path, metavar="PATH", help="a file or folder")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="PATH")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--format", choices=FORMATS, help="instead of what the files look like")
    parser.add_argument("--eos-id", type=int, metavar="N", help="the files' end-of-document id")
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="X", help="(0.02)")
    parser.add_argument("--seed", type=seed_number, default=1, metavar="N", help="of the split (1)")
    parser.add_argument("--tokens-per-shard", type=shard_size, default=SHARD_TOKENS, metavar="N")
    parser.add_argument("--quiet", action="store_true", help="only errors")
    parser.add_argument("--json", action="store_true", help="the manifest as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise PippinError("P311", f"{args.out} exists already", remedy="another --out")
    console = Console(
        quiet=args.quiet, highlight=False, markup=False, soft_wrap=True, stderr=args.json
    )
    manifest = import_foreign(
        args.path,
        tokenizer=_tokenizer(args.tokenizer.expanduser()),
        out=args.out,
        format=args.format,
        eos_id=args.eos_id,
        val_fraction=args.val_fraction,
        seed=args.seed,
        shard_tokens=args.tokens_per_shard,
        report=lambda phase, facts, result, seconds: console.print(
            f" {phase:<10} {facts}   {result}   {seconds:.1f} s"
        ),
    )
    if args.json:
        print(json.dumps({"folder": str(args.out), **manifest.model_dump(mode="json")}))
    else:
        show_info(console, args.out, manifest)
    return 0


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except PippinError as error:
        # Ids that are there already are of one tokenizer; training another would not help.
        error.remedy = "--tokenizer PATH, the one that the ids were made with"
        raise
