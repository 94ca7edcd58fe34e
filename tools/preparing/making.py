"""`prepare_data.py INPUT... --tokenizer T --out FOLDER`: make shards."""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from core.cli import Parser, make_parser
from core.data.building import Amount, BuildOptions, Content
from core.data.chat import ChatSource
from core.data.chat_formats import content_of, detect_format
from core.data.prepare import default_workers, make_shards, wanted_source
from core.data.request import resolve_tokenizer
from core.data.shard_builder import SHARD_TOKENS
from core.data.shards import MANIFEST, Manifest, load_manifest
from core.data.sources import ReadOptions, RecordSource, Source, open_source
from core.data.tokenizer import KINDS
from core.errors import PippinError
from tools.preparing.looking import show_info

PROG = "tools/prepare_data.py"


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
        help="text, or conversations and preferences; auto looks at the first record",
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


def count(text: str) -> int:
    """`1e9`, `2_000_000`, `500` as a number."""
    value = float(text.replace("_", ""))
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(value)


def open_input(args: argparse.Namespace) -> tuple[Source, Content]:
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
        return source, "text"
    kind = _format_of(source)
    content = content_of(kind)
    if content == "text":
        if args.format == "chat":
            raise PippinError(
                "P202",
                f"{source.name} holds no conversations",
                found=f"the first record looks like {kind or 'none that is known'}",
                choices=("messages", "prompt + completion", "prompt + chosen + rejected"),
            )
        return source, "text"
    return ChatSource(source), content


def _format_of(source: RecordSource) -> str:
    """The format of the first record; "" where it is none of chats."""
    first = next(iter(source.records()), None)
    return "" if first is None else detect_format(first.fields)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    verbs = "plan, info, verify, stats, show, import"
    what = f"Make shards of text. Other verbs ({verbs}) come first: prepare_data.py plan --help."
    parser = make_parser(PROG, what)
    add_reading(parser)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help=f"a file, or {KINDS}")
    parser.add_argument("--vocab-size", type=count, metavar="N", help="for a tokenizer to train")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="shards/NAME")
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="X", help="(0.02)")
    parser.add_argument("--test-fraction", type=float, default=0.02, metavar="X", help="(0.02)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the split (1)")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="stop there; 1e9 works")
    parser.add_argument("--tokens-per-shard", type=count, default=SHARD_TOKENS, metavar="N")
    parser.add_argument("--workers", type=count, metavar="N", help="processes (one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--quiet", action="store_true", help="only errors")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= getattr(args, name) < 0.5:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more and below 0.5")
    return args


def main(argv: list[str]) -> int:
    """Make shards."""
    args = parse_args(argv)
    console = Console(quiet=args.quiet, highlight=False)
    source, content = open_input(args)
    request = resolve_tokenizer(source, args.tokenizer, args.vocab_size)
    wanted = wanted_source(
        source, seed=args.seed, val_fraction=args.val_fraction, test_fraction=args.test_fraction
    )
    if args.max_tokens is not None:
        wanted = wanted.model_copy(
            update={"fingerprint": f"{wanted.fingerprint} max_tokens={args.max_tokens}"}
        )
    held = _held(args.out)
    if held is not None:
        same = (held.source.fingerprint, held.source.seed, held.source.val_fraction)
        asked = (wanted.fingerprint, wanted.seed, wanted.val_fraction)
        if same == asked and request.met_by(held.tokenizer) and not args.overwrite:
            console.print(f" shards     {args.out} holds exactly this already")
            show_info(console, args.out, held)
            return 0
        if not args.overwrite:
            raise PippinError(
                "P310",
                f"{args.out} holds other shards",
                found=f"there: {held.source.name}, {held.tokens:,} tokens\nasked: {source.name}",
                remedy="--overwrite, or another --out",
                kept="Nothing was changed.",
            )
    with _Bar(console, source.num_bytes, args.max_tokens) as bar:
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
        )
    show_info(console, folder, load_manifest(folder))
    console.print(f" next       python train.py --input_file {folder}")
    return 0


def _held(folder: Path) -> Manifest | None:
    """What is in the folder already, if shards."""
    if (folder / MANIFEST).is_file():
        return load_manifest(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PippinError(
            "P310",
            f"{folder} exists and holds no shards",
            remedy="another --out",
            kept="Nothing was changed.",
        )
    return None


class _Bar:
    """MB and tokens a second, and the time left where the size is known."""

    def __init__(self, console: Console, num_bytes: int, max_tokens: int | None) -> None:
        self._total, self._max_tokens = num_bytes, max_tokens
        self._progress = Progress(
            TextColumn(" encode    "),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._console = console
        self._task: TaskID | None = None
        self._started = self._told = time.monotonic()
        self._first: Amount | None = None

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, amount: Amount) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if self._first is None:
            # An interrupted build goes on; its speed is that of this part.
            self._first, self._started = amount, now
        seconds = max(now - self._started, 1e-3)
        mb = (amount.text_bytes - self._first.text_bytes) / 1e6
        tokens = amount.tokens - self._first.tokens
        facts = (
            f"{amount.text_bytes / 1e6:,.0f} MB  {amount.tokens / 1e6:,.1f}M tokens  "
            f"{mb / seconds:.1f} MB/s  {tokens / seconds / 1e6:.2f}M tok/s"
        )
        total: float | None = self._total or None
        done: float = amount.text_bytes
        if self._max_tokens is not None:
            total, done = self._max_tokens, amount.tokens
        if self._task is None:
            self._task = self._progress.add_task("encode", total=total, facts=facts)
        self._progress.update(self._task, completed=done, facts=facts)
        if not self._console.is_terminal and now - self._told > 5:
            self._told = now
            self._console.print(f" encode     {facts}")
