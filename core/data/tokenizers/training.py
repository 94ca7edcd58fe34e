"""Choosing a tokenizer for an amount of text, and making it from the text."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.data.tokenizers.tokenizer import (
    CHAT_SYMBOLS,
    KINDS,
    MIN_BPE_VOCAB,
    NUM_FIXED_PIECES,
    SPACE_SIGN,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    code_points,
    cut_text,
    import_sentencepiece,
    num_threads,
    reason_of,
)
from core.errors import PippinError

SMALL_TEXT_BYTES = 500_000
_LINE_CHARS = 4_096
_COUNT_CHARS = 1_000_000
# Each thread adds up its own part of the probabilities: another number gives another model.
_UNIGRAM_THREADS = 8


class TokenizerChoice(NamedTuple):
    """A tokenizer that is to be trained. `vocab_size` is 0 where the text decides it."""

    kind: str
    vocab_size: int
    reason: str


def choose_tokenizer(num_bytes: int, distinct_chars: int) -> TokenizerChoice:
    """Kind and size of the tokenizer for an amount of text.

    A vocabulary row must be seen often to be learned, so the size grows with the square root of the
    text: 1,024 pieces at 1 MB, 2,048 at 20 MB, 4,096 at 100 MB, 32,768 at 4 GB. Below 0.5 MB
    pieces are too rare and single characters (or bytes, where there are many) are learned better.

    Args:
        num_bytes: Bytes of text, about.
        distinct_chars: Distinct characters in it, about; only read for little text.
    """
    size_mb = f"{num_bytes / 1e6:.1f} MB"
    if num_bytes < SMALL_TEXT_BYTES:
        if distinct_chars <= 256:
            return TokenizerChoice("char", 0, f"{size_mb} of text is too little for word pieces")
        return TokenizerChoice(
            "byte", 0, f"{size_mb} of text is too little for {distinct_chars:,} characters"
        )
    wanted = 0.5 * num_bytes**0.5
    vocab_size = 1 << min(15, max(10, round(float(np.log2(wanted)))))
    return TokenizerChoice(
        "bpe", vocab_size, f"{vocab_size:,} pieces are each seen often in {size_mb}"
    )


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 0) -> Tokenizer:
    """Make a tokenizer from texts. The same texts give the same tokenizer.

    Args:
        kind: "bpe", "unigram", "char" or "byte".
        texts: All the text for "char", a sample for the word pieces; "byte" reads none.
        vocab_size: Pieces of "bpe" and "unigram"; fewer come out where the text is short.

    Raises:
        PippinError: P010 for an unknown kind or a size too small, P201 for no usable text.
    """
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        points = np.zeros(0x110000, dtype=bool)
        for text in texts:
            for start in range(0, len(text), _COUNT_CHARS):
                points[code_points(text[start : start + _COUNT_CHARS])] = True
        return char_tokenizer(points)
    if kind not in ("bpe", "unigram"):
        raise PippinError("P010", f"unknown kind of tokenizer: {kind!r}", choices=KINDS)
    if vocab_size < MIN_BPE_VOCAB:
        raise PippinError(
            "P010",
            f"model.vocab_size={vocab_size} is too small for a {kind} tokenizer",
            found=f"256 bytes and the control symbols need at least {MIN_BPE_VOCAB}",
            remedy="data.tokenizer=byte, or a larger model.vocab_size",
        )
    content = _train_pieces(kind, list(_training_lines(texts)), vocab_size)
    try:
        return SentencePieceTokenizer(content)
    except PippinError as error:
        if error.code != "P301":
            raise
        # Its own remedy is for a file that was given: to train one, which was done just now.
        raise _not_trained(kind, error.what) from error


def char_tokenizer(points: NDArray[np.bool_]) -> CharTokenizer:
    """The character tokenizer of a table that is true at the code points in use."""
    if not points.any():
        raise PippinError("P201", "there is no text to make a tokenizer from")
    return CharTokenizer("".join(chr(p) for p in np.flatnonzero(points)))


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends: a newline is a byte of its own in every text."""
    for text in texts:
        for line in text.split("\n"):
            yield from cut_text(line, _LINE_CHARS)


def _train_pieces(kind: str, lines: list[str], vocab_size: int) -> bytes:
    spm = import_sentencepiece()
    model = io.BytesIO()
    kept = _without_rare(lines, (vocab_size - NUM_FIXED_PIECES) // 2)
    if not any(kept):
        raise _not_trained(kind, "it is empty")
    # A space has no bytes to fall back to: it must be a piece. Said only where the text has none, as
    # the model's file holds this setting even where it is empty.
    spaced = any(" " in line or SPACE_SIGN in line for line in kept)
    needed = {} if spaced else {"required_chars": SPACE_SIGN}
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(kept),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            **needed,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            control_symbols=list(CHAT_SYMBOLS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            # Longer lines would be dropped in silence; lines are cut to 4,096 characters.
            max_sentence_length=8 * _LINE_CHARS,
            shuffle_input_sentence=False,
            num_threads=_UNIGRAM_THREADS if kind == "unigram" else num_threads(),
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_trained(kind, reason_of(error)) from error
    return model.getvalue()


def _not_trained(kind: str, why: str) -> PippinError:
    return PippinError(
        "P201",
        f"a {kind} tokenizer cannot be trained on this text{why and f': {why}'}",
        remedy="data.tokenizer=byte",
    )


def _without_rare(lines: Sequence[str], max_chars: int) -> list[str]:
    """Cut the lines at characters that are not among the `max_chars` most frequent ones.

    Those are spelled in bytes; a space is never one of them. sentencepiece refuses a vocabulary that
    cannot hold all characters, and its own setting for this stops at 98% of the text, too much for
    Chinese in 2,048 pieces.
    """
    counts = np.zeros(0x110000, dtype=np.int64)
    for start in range(0, len(lines), 10_000):
        points = code_points("".join(lines[start : start + 10_000]))
        counts += np.bincount(points, minlength=len(counts))
    # Equal counts in code point order, so that the choice does not depend on the sort.
    by_count = np.argsort(-counts, kind="stable")
    rare = {int(point): "\n" for point in by_count[max_chars : np.count_nonzero(counts)]}
    rare.pop(ord(" "), None)
    if not rare:
        return list(lines)
    return [part for line in lines for part in line.translate(rare).split("\n") if part]
