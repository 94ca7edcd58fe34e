"""Numbers and the tokenizer of the command line, refused where they could have no effect."""

import argparse

from core.cli import Parser
from core.data.tokenizers.tokenizer import MIN_BPE_VOCAB

MIN_SHARD_TOKENS = 1_000
_TRAINED_IN_PIECES = ("auto", "bpe", "unigram")


def count(text: str) -> int:
    """`1e9`, `2_000_000`, `500` as a number."""
    value = float(text.replace("_", ""))
    if not 1 <= value < 2**53 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(value)


def shard_size(text: str) -> int:
    """Tokens of a file: a disk has room for a few files only, whatever their size."""
    value = count(text)
    if value < MIN_SHARD_TOKENS:
        least = f"{MIN_SHARD_TOKENS:,}"
        raise argparse.ArgumentTypeError(f"{value:,} tokens a file are too few; {least} or more")
    return value


def seed_number(text: str) -> int:
    """A seed, which is hashed as 64 bits."""
    value = int(text)
    if not -(2**63) <= value < 2**63 - 1:
        raise argparse.ArgumentTypeError(f"{text} is beyond 64 bits")
    return value


def check_vocab_size(parser: Parser, tokenizer: str, vocab_size: int | None) -> None:
    """Refuse a number of pieces that has no effect.

    Raises:
        PippinError: P012.
    """
    if vocab_size is None:
        return
    if tokenizer not in _TRAINED_IN_PIECES:
        parser.error(f"--vocab-size has no effect on --tokenizer {tokenizer}")
    if vocab_size < MIN_BPE_VOCAB:
        parser.error(f"--vocab-size is {vocab_size:,}; it must be {MIN_BPE_VOCAB} or more")


def check_fractions(parser: Parser, val_fraction: float, test_fraction: float) -> None:
    """Refuse shares of half the text or more.

    Raises:
        PippinError: P012.
    """
    for name, value in (("--val-fraction", val_fraction), ("--test-fraction", test_fraction)):
        if not 0 <= value < 0.5:
            parser.error(f"{name} must be 0 or more and below 0.5")
