"""Which tokenizer is wanted: one that exists, or one to be trained on the text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.data.reading.sources import Source
from core.data.shards.manifest import TokenizerInfo
from core.data.tokenizers.tokenizer import (
    KINDS,
    MIN_BPE_VOCAB,
    Tokenizer,
    code_points,
    load_tokenizer,
)
from core.data.tokenizers.training import SMALL_TEXT_BYTES, choose_tokenizer

_PROBE_CHARS = 1_000_000
_SMALL_TEXT_VOCAB = 1_024
_STREAM_VOCAB = 32_768


@dataclass(frozen=True)
class TokenizerRequest:
    """The tokenizer that is wanted.

    Attributes:
        text: The request in words, as the manifest keeps it: "bpe 2048", "byte", "given <sha256>".
        reason: Why this one.
        kind: "bpe", "unigram", "char" or "byte"; "byte_bpe" where one is given.
        vocab_size: Pieces of "bpe" or "unigram" to ask for; 0 for the others.
        given: The tokenizer where it exists already.
    """

    text: str
    reason: str
    kind: str
    vocab_size: int = 0
    given: Tokenizer | None = None

    def met_by(self, made: TokenizerInfo) -> bool:
        """Whether shards have it.

        A short text gives fewer pieces than were asked for, and a resolved configuration asks for the
        number that came out: that is the same request.
        """
        if self.given is not None:
            return made.fingerprint == self.given.fingerprint
        if made.requested == self.text:
            return True
        trained = not made.requested.startswith("given ")
        return trained and (made.kind, made.vocab_size) == (self.kind, self.vocab_size)


def resolve_tokenizer(source: Source, tokenizer: str, vocab_size: int | None) -> TokenizerRequest:
    """Turn the keys `data.tokenizer` and `model.vocab_size` into a request.

    Args:
        source: The text; its beginning is read where the amount of text decides.
        tokenizer: "auto", a kind that is trained, or the path of a tokenizer (also one of another
            project) or of a folder that holds one.
        vocab_size: Number of pieces asked for; None leaves it to the amount of text.

    Raises:
        PippinError: P301 for a path without a usable tokenizer.
    """
    if tokenizer not in ("auto", *KINDS):
        given = load_tokenizer(Path(tokenizer).expanduser())
        why = f"given: {tokenizer}"
        if given.changes:
            why += f"; {', '.join(given.changes)}, so that text comes back as it was"
        return TokenizerRequest(f"given {given.fingerprint}", why, given.kind, given=given)
    if tokenizer in ("char", "byte"):
        return TokenizerRequest(tokenizer, "asked for", tokenizer)
    pieces = "bpe" if tokenizer == "auto" else tokenizer
    if vocab_size is not None and (tokenizer != "auto" or vocab_size >= MIN_BPE_VOCAB):
        return TokenizerRequest(
            f"{pieces} {vocab_size}", f"{vocab_size:,} asked for", pieces, vocab_size
        )
    if source.streams and source.num_bytes == 0:
        why = "a stream, whose size is not known"
        return TokenizerRequest(f"{pieces} {_STREAM_VOCAB}", why, pieces, _STREAM_VOCAB)
    small = source.num_bytes < SMALL_TEXT_BYTES
    kind, size, reason = choose_tokenizer(source.num_bytes, _distinct_chars(source) if small else 0)
    if tokenizer != "auto" and kind != "bpe":
        kind, size, reason = "bpe", _SMALL_TEXT_VOCAB, "the smallest useful size of word pieces"
    if kind != "bpe":
        return TokenizerRequest(kind, reason, kind, size)
    return TokenizerRequest(f"{pieces} {size}", reason, pieces, size)


def _distinct_chars(source: Source) -> int:
    """Distinct characters at the beginning of the text."""
    points, seen = np.zeros(0x110000, dtype=bool), 0
    for document in source.documents():
        points[code_points(document.text[:_PROBE_CHARS])] = True
        seen += len(document.text)
        if seen >= _PROBE_CHARS:
            break
    return int(np.count_nonzero(points))
