"""Make a tokenizer from text, the same one each time for the same text and seed.

    python tools/train_tokenizer.py my_texts/ --vocab-size 32000 --out tokenizer.model
    python tools/train_tokenizer.py a.jsonl b.txt.gz --text-field body --kind unigram --out tok/
    python tools/train_tokenizer.py book.txt --kind char --out book.json

Reads everything that tools/prepare_data.py reads. Of a large text a sample is kept that its
content decides; memory does not grow with the text. --out is a file that ends in .model (bpe,
unigram) or .json (char, byte), or a folder, which gets tokenizer.model or tokenizer.pippin.json.
"""

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from core.environment import use_environment

    use_environment()

import argparse
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from core.cli import guarded, make_parser
from core.data.split import document_key
from core.data.tokenizers.base import write_atomically
from core.data.tokenizers.text_sample import TextSample, blocks_of
from core.data.tokenizers.tokenizer import BPE_FILE, JSON_FILE, KINDS, MIN_BPE_VOCAB, Tokenizer
from core.data.tokenizers.training import train_tokenizer
from core.errors import PippinError
from tools.preparing.flags import KEYS, in_flags
from tools.preparing.making import add_reading, open_input

PIECE_KINDS = ("bpe", "unigram")
DEFAULT_VOCAB, MAX_VOCAB = 32_000, 1_000_000
_HELD_OUT_SHARE, _HELD_OUT_BYTES = 0.02, 1_000_000
_KEYS = {**KEYS, "data.tokenizer": "--kind"}


@dataclass(frozen=True)
class Made:
    """What came out.

    Attributes:
        file: The tokenizer.
        kind: Its kind.
        vocab_size: Its number of ids.
        asked: Pieces that were asked for; None for char and byte.
        bytes_per_token: Of text that it was not trained on, where there was any.
        held_out_bytes: Amount of that text; 0 where `bytes_per_token` is of the training text.
        text_bytes: Text that was read.
        sample_bytes: Text that it was trained on.
        seconds: Of reading and training.
        fingerprint: sha256 of the file.
        notes: What was left out of the text.
    """

    file: str
    kind: str
    vocab_size: int
    asked: int | None
    bytes_per_token: float | None
    held_out_bytes: int
    text_bytes: int
    sample_bytes: int
    seconds: float
    fingerprint: str
    notes: tuple[str, ...]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; flags take dashes or underscores and no abbreviations.

    Raises:
        PippinError: P012 for a wrong command line.
    """
    parser = make_parser("tools/train_tokenizer.py", __doc__)
    add = parser.add_argument
    add_reading(parser, required=False)
    add("--kind", default="bpe", choices=KINDS, help="bpe (default), unigram, char or byte")
    add("--vocab-size", type=int, metavar="N", help=f"pieces of bpe or unigram ({DEFAULT_VOCAB:,})")
    add("--out", type=Path, required=True, metavar="PATH", help="the file or folder to write")
    add("--seed", type=int, default=1, metavar="N", help="of the sample (1)")
    add("--sample-mb", type=float, default=100.0, metavar="MB", help="text to train on (100)")
    add("--overwrite", action="store_true", help="replace the file that is there")
    add("--json", action="store_true", help="one JSON object on stdout instead of words")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.kind in PIECE_KINDS:
        args.vocab_size = DEFAULT_VOCAB if args.vocab_size is None else args.vocab_size
        if not MIN_BPE_VOCAB <= args.vocab_size <= MAX_VOCAB:
            limits = f"it must be {MIN_BPE_VOCAB} to {MAX_VOCAB:,}"
            parser.error(f"--vocab-size is {args.vocab_size:,}; {limits}")
    elif args.vocab_size is not None:
        parser.error(f"--vocab-size has no effect on --kind {args.kind}")
    if not args.inputs and args.kind != "byte":
        parser.error("an INPUT is missing: a file, a folder or a pattern")
    if not 0.001 <= args.sample_mb <= 100_000:
        parser.error(f"--sample-mb is {args.sample_mb:g}; it must be 0.001 to 100,000")
    if not -(2**63) <= args.seed < 2**63 - 1:
        parser.error("--seed is beyond 64 bits")
    return args


def out_file(out: Path, kind: str, *, overwrite: bool) -> Path:
    """The file to write, in a folder that is there.

    Raises:
        PippinError: P012 for a name that does not fit or a file that is there, P312 for a folder
            that cannot be made.
    """
    name = BPE_FILE if kind in PIECE_KINDS else JSON_FILE
    suffix = Path(name).suffix
    path = out / name if out.is_dir() or not out.suffix else out
    if path.suffix != suffix:
        raise PippinError(
            "P012",
            f"--out {out} does not end in {suffix}, as a {kind} tokenizer must.",
            remedy=f"--out {out.with_suffix(suffix)}",
        )
    if path.exists() and not (overwrite and path.is_file()):
        raise PippinError(
            "P012",
            f"--out {path} is there already.",
            remedy="--overwrite, or another name" if path.is_file() else "another name",
            kept="Nothing was changed.",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from error
    if not os.access(path.parent, os.W_OK):
        raise not_written(path, PermissionError(13, "Permission denied"))
    return path


def not_written(path: Path, error: OSError) -> PippinError:
    """The error for a full disk or a folder that may not be written."""
    return PippinError(
        "P312",
        f"{path} cannot be written: {error.strerror or error}",
        remedy="--out PATH, on a disk with room",
        kept="No file was left half written.",
    )


class Reading:
    """One pass over the text: blocks for training, and a few held out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._source, _, self._note = open_input(args)
        self._seed = args.seed
        self.sample = TextSample(round(args.sample_mb * 1e6), args.seed)
        self.held_out = TextSample(_HELD_OUT_BYTES, args.seed)
        self.text_bytes = 0

    def blocks(self) -> Iterator[str]:
        """Everything, with each block put into the sample or held out."""
        for document in self._source.documents():
            for block in blocks_of(document.text):
                content = block.encode()
                self.text_bytes += len(content)
                # Another seed than the sample's, or the held-out blocks would be its first ones.
                chance = document_key(content, self._seed + 1)
                held_out = chance < _HELD_OUT_SHARE * 2**64
                (self.held_out if held_out else self.sample).add(block)
                yield block

    def notes(self) -> tuple[str, ...]:
        """How the source was taken where there are two ways, and what it left out."""
        return (*((self._note,) if self._note else ()), *self._source.notes())


def train(args: argparse.Namespace, path: Path) -> Made:
    """Read, train and write.

    Raises:
        PippinError: for everything a user can mend.
    """
    started = time.monotonic()
    reading = None if args.kind == "byte" else Reading(args)
    if reading is None:
        tokenizer = train_tokenizer("byte", ())
    elif args.kind == "char":
        # Every character counts, also those of blocks that are held out.
        tokenizer = train_tokenizer("char", reading.blocks())
    else:
        for _ in reading.blocks():
            pass
        # A text of few blocks, all of them held out, is no reason to fail.
        source = reading.sample if reading.sample.held_bytes else reading.held_out
        tokenizer = train_tokenizer(args.kind, source.blocks(), args.vocab_size)
    seconds = time.monotonic() - started
    held_out = 0 if reading is None else reading.held_out.held_bytes
    write_atomically(path, tokenizer.content)  # type: ignore[attr-defined]
    return Made(
        file=str(path),
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        asked=args.vocab_size,
        bytes_per_token=None if reading is None else _bytes_per_token(tokenizer, reading),
        held_out_bytes=held_out,
        text_bytes=0 if reading is None else reading.text_bytes,
        sample_bytes=0 if reading is None else reading.sample.held_bytes,
        seconds=round(seconds, 3),
        fingerprint=tokenizer.fingerprint,
        notes=() if reading is None else reading.notes(),
    )


def _bytes_per_token(tokenizer: Tokenizer, reading: Reading) -> float | None:
    """On the held-out blocks, or on those of the sample where none are."""
    source = reading.held_out if reading.held_out.held_bytes else reading.sample
    num_bytes = num_tokens = 0
    for block in source.blocks():
        num_bytes += len(block.encode())
        num_tokens += len(tokenizer.encode_batch([block])[0])
        if num_bytes >= _HELD_OUT_BYTES:
            break
    return num_bytes / num_tokens if num_tokens else None


def show(console: Console, made: Made, args: argparse.Namespace) -> None:
    """The result in words."""

    def line(name: str, text: str) -> None:
        console.print(f" {name:<12} {text}", highlight=False, markup=False, soft_wrap=True)

    line("tokenizer", made.file)
    line("kind", made.kind)
    line("pieces", f"{made.vocab_size:,}")
    if made.text_bytes:
        line(
            "text", f"{made.text_bytes / 1e6:,.2f} MB, trained on {made.sample_bytes / 1e6:,.2f} MB"
        )
    if made.bytes_per_token is not None:
        where = f"{made.held_out_bytes / 1e6:,.2f} MB that it was not trained on"
        where = where if made.held_out_bytes else "the text it was trained on"
        line("bytes/token", f"{made.bytes_per_token:.2f} on {where}")
    line("seconds", f"{made.seconds:.1f}")
    line("fingerprint", made.fingerprint)
    for note in made.notes:
        line("note", note)
    if made.asked is not None and made.vocab_size < made.asked:
        line("note", f"{made.asked:,} pieces were asked for, {made.vocab_size:,} came out:")
        line("", "the text does not repeat itself enough for more.")
        line("", f"Give more text or a larger --sample-mb, or ask for {made.vocab_size:,}.")
    words = " ".join(shlex.quote(one) for one in _reading_words(args)) or "TEXT"
    tokenizer = shlex.quote(made.file)
    line("next", f"python tools/prepare_data.py {words} --tokenizer {tokenizer} --out shards/NAME")


def _reading_words(args: argparse.Namespace) -> list[str]:
    """The inputs, and the flags that said how to read them, as they would be typed."""
    parser = make_parser("", "")
    add_reading(parser, required=False)
    words = list(args.inputs)
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if name != "inputs" and value != default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def run(args: argparse.Namespace) -> int:
    """Make the tokenizer; returns the exit code.

    Raises:
        PippinError: for everything a user can mend.
    """
    path = out_file(args.out, args.kind, overwrite=args.overwrite)
    waiting = Console(stderr=True)
    with waiting.status("reading and training") if waiting.is_terminal else nullcontext():
        made = train(args, path)
    if args.json:
        print(json.dumps(asdict(made)))
    else:
        show(Console(), made, args)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return guarded(
        lambda: in_flags(lambda: run(parse_args(given)), _KEYS),
        debug="--debug" in given,
        aborted="stopped; no tokenizer was written.",
    )


if __name__ == "__main__":
    sys.exit(main())
