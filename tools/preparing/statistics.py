"""What the tokens of a split are: how often, how long, how many of them spell what has no piece."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.data.shards.stream import TokenStream
from core.data.tokenizers.tokenizer import Tokenizer

_BLOCK = 1 << 22
_SHOWN = 12


@dataclass(frozen=True)
class Statistics:
    """Figures of one split.

    Attributes:
        counts: int64 `[V]`, how often each id occurs.
        token_bytes: int64 `[V]`, bytes of text of each id.
        lengths: int64 `[documents]`, tokens of each document, `</s>` included.
        fallback_ids: bool `[V]`, ids that spell one byte of what has no piece of its own.
        unknown_id: The id of what cannot be spelled, or None.
    """

    counts: NDArray[np.int64]
    token_bytes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    fallback_ids: NDArray[np.bool_]
    unknown_id: int | None

    def as_object(self) -> dict[str, float | int]:
        """The figures by name."""
        total = int(self.counts.sum())
        text = self.token_bytes > 0
        texts = int(self.counts[text].sum())
        ranked = np.sort(self.counts)[::-1].cumsum()
        unknown = 0 if self.unknown_id is None else int(self.counts[self.unknown_id])
        quantiles = np.quantile(self.lengths, [0.05, 0.5, 0.95]) if len(self.lengths) else [0] * 3
        return {
            "tokens": total,
            "documents": len(self.lengths),
            "vocab_size": len(self.counts),
            "ids_used": int(np.count_nonzero(self.counts)),
            "ids_seen_under_100_times": int(np.count_nonzero((self.counts < 100) & text)),
            "ids_for_half_of_the_text": int(np.searchsorted(ranked, total / 2) + 1),
            "bytes_per_token": float((self.counts * self.token_bytes).sum() / max(1, texts)),
            "unknown_rate": unknown / max(1, total),
            "fallback_rate": float(self.counts[self.fallback_ids].sum() / max(1, total)),
            "document_tokens_mean": float(self.lengths.mean()) if len(self.lengths) else 0.0,
            "document_tokens_p05": float(quantiles[0]),
            "document_tokens_median": float(quantiles[1]),
            "document_tokens_p95": float(quantiles[2]),
            "document_tokens_max": int(self.lengths.max()) if len(self.lengths) else 0,
        }

    def lines(self, tokenizer: Tokenizer) -> list[tuple[str, str]]:
        """The figures for people."""
        found = self.as_object()
        rows = [
            (name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
            for name, value in found.items()
        ]
        most = np.argsort(-self.counts, kind="stable")[:_SHOWN].tolist()
        pieces = " ".join(
            ascii(tokenizer.decode([i])) if self.token_bytes[i] else f"<{i}>" for i in most
        )
        return [*rows, ("most frequent", pieces)]


def measure(stream: TokenStream, tokenizer: Tokenizer) -> Statistics:
    """Count the tokens of a split, a few million at a time."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, stream.num_tokens, _BLOCK):
        ids = stream.tokens(start, min(start + _BLOCK, stream.num_tokens))
        counts += np.bincount(ids, minlength=len(counts))
    return Statistics(
        counts=counts,
        token_bytes=tokenizer.token_bytes(),
        lengths=np.diff(stream.offsets),
        fallback_ids=fallback_ids(tokenizer),
        unknown_id=tokenizer.control_ids.get("<unk>"),
    )


def fallback_ids(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Ids of single bytes that are not the id of that character: byte pieces beside real ones.

    Byte-level tokenizers spell everything so, and have none that are a fallback.
    """
    found = np.zeros(tokenizer.vocab_size, bool)
    if tokenizer.kind not in ("bpe", "unigram"):
        return found
    single = np.flatnonzero(tokenizer.token_bytes() == 1).tolist()
    # The 256 byte pieces of a sentencepiece model are neighbours, in the order of their bytes.
    spelled = [tokenizer.decode_bytes([i])[0] for i in single]
    for at in range(len(single) - 255):
        if single[at + 255] - single[at] == 255 and spelled[at : at + 256] == list(range(256)):
            found[single[at] : single[at] + 256] = True
            break
    return found


def plot(found: Statistics, path: Path, *, title: str) -> None:
    """Frequency by rank, document lengths, and the share of the text that the first ids cover."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    ranked = np.sort(found.counts[found.counts > 0])[::-1]
    left.loglog(np.arange(1, len(ranked) + 1), ranked, color="#0072B2")
    left.set(xlabel="rank of the id", ylabel="occurrences", title="frequency")
    if len(found.lengths):
        top = max(2.0, float(np.quantile(found.lengths, 0.995)))
        middle.hist(np.minimum(found.lengths, top), bins=50, range=(0, top), color="#0072B2")
    middle.set(xlabel="tokens of a document", ylabel="documents", title="lengths")
    if len(ranked):
        share = 100 * np.cumsum(ranked) / ranked.sum()
        right.semilogx(np.arange(1, len(ranked) + 1), share, color="#0072B2")
    right.set(xlabel="ids, most frequent first", ylabel="% of the tokens", title="coverage")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path)
