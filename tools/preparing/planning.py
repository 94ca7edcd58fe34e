"""`prepare_data.py plan`: tokens, shards and bytes before anything is made."""

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console

from core.cli import make_parser
from core.config.load import load
from core.data.preparing.building import ids_dtype
from core.data.preparing.request import resolve_tokenizer
from tools.preparing.estimating import Limits, estimate, split_shares
from tools.preparing.making import add_reading, add_splitting, open_input
from tools.preparing.numbers import check_fractions, check_vocab_size, count


def main(argv: list[str]) -> int:
    """Estimate what an input gives, and what a config needs."""
    parser = make_parser("tools/prepare_data.py plan", "Tokens, shards and bytes, in advance.")
    add_reading(parser, required=False)
    parser.add_argument("--tokenizer", default="auto", metavar="PATH", help="(auto)")
    parser.add_argument("--vocab-size", type=count, metavar="N")
    add_splitting(parser)
    parser.add_argument("--for", dest="run", metavar="CONFIG", help="a config of train.py")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if not args.inputs and not args.run:
        parser.error("an input, --for CONFIG, or both are needed")
    check_fractions(parser, args.val_fraction, args.test_fraction)
    check_vocab_size(parser, args.tokenizer, args.vocab_size)
    found: dict[str, Any] = {}
    if args.inputs:
        found["text"] = _estimate(args)
    if args.run:
        found["run"] = _needs(args.run, found.get("text", {}).get("tokens"), args.tokens_per_shard)
    if args.json:
        print(json.dumps(found))
    else:
        _print(found, args)
    return 0


def _estimate(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens, shards and bytes of the input, from its first megabytes."""
    source, content, _ = open_input(args)
    request = resolve_tokenizer(source, args.tokenizer, args.vocab_size)
    limits = Limits(
        num_documents=args.num_documents,
        max_tokens=args.max_tokens,
        shares=split_shares(source, args.val_fraction, args.test_fraction),
        shard_tokens=args.tokens_per_shard,
    )
    return asdict(estimate(source, content, request, limits))


def _id_bytes(vocab_size: int) -> int:
    return np.dtype(ids_dtype(vocab_size)).itemsize


def _print(found: dict[str, Any], args: argparse.Namespace) -> None:
    console = Console(highlight=False)
    text, run = found.get("text"), found.get("run")
    if text:
        about = "about " if text["estimated"] else ""
        about = "at least " if text["at_least"] else about
        console.print(f" text       {about}{text['text_bytes'] / 1e6:,.1f} MB")
        console.print(
            f" tokenizer  {text['tokenizer']}, {text['bytes_per_token']:.2f} bytes per token "
            f"(on {text['sample_bytes'] / 1e6:,.1f} MB)"
        )
        console.print(f" tokens     {about}{text['tokens']:,}")
        console.print(
            f" shards     {text['shards']:,} of {args.tokens_per_shard:,} tokens, "
            f"{about}{text['disk_bytes'] / 1e6:,.1f} MB on disk"
        )
    if run is None:
        return
    if run["tokens"] is None:
        console.print(f" run        {args.run} leaves its length to the machine")
        return
    epochs = "" if run["epochs"] is None else f", {run['epochs']:.2g} epochs of this text"
    console.print(f" run        {args.run} reads {run['tokens']:,} tokens{epochs}")
    console.print(
        f"            fresh ones would be {run['shards']:,} shards, {run['disk_bytes'] / 1e6:,.1f} MB"
    )


def _needs(name: str, tokens: int | None, shard_tokens: int) -> dict[str, Any]:
    """Tokens that a run reads, where its configuration says so."""
    values = load(config=name, command="python tools/prepare_data.py plan --for").values
    keys = ("train.total_steps", "train.micro_batch_size", "train.grad_accum_steps", "data.seq_len")
    numbers = [values.get(key) for key in keys]
    known = [number for number in numbers if isinstance(number, int)]
    if len(known) < len(keys):
        return {"tokens": None, "epochs": None, "shards": None, "disk_bytes": None}
    wanted = math.prod(known)
    vocab_size = values.get("model.vocab_size")
    width = _id_bytes(vocab_size if isinstance(vocab_size, int) else 0)
    return {
        "tokens": wanted,
        "epochs": None if tokens is None else wanted / max(1, tokens),
        "shards": math.ceil(wanted / shard_tokens),
        "disk_bytes": wanted * width,
    }
