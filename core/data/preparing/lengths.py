"""Whether a text is long enough to be trained on, and what helps where it is not."""

from core.data.shards.manifest import Manifest
from core.errors import PippinError

# A window of fewer tokens holds nothing that could be learned.
_MIN_SEQ_LEN = 8


def check_lengths(manifest: Manifest, seq_len: int, *, fixed_splits: bool) -> None:
    """Raise P201 where train or val holds less than one window.

    Args:
        manifest: What the text has become.
        seq_len: T; a window needs T + 1 tokens.
        fixed_splits: Whether the shares of the splits cannot be asked for: they were made before, or
            the names of the files decide them.
    """
    needed = seq_len + 1
    tokens = {split: manifest.splits[split].tokens for split in ("train", "val")}
    short = [split for split, count in tokens.items() if count < needed]
    if not short:
        return
    splits = "split is" if len(short) == 1 else "splits are"
    held = ", ".join(f"{split}: {count:,} tokens" for split, count in tokens.items())
    raise PippinError(
        "P201",
        f"{manifest.source.name} is too short: its {' and '.join(short)} {splits} less than a window",
        found=f"{held}; a window of data.seq_len={seq_len:,} needs {needed:,}",
        remedy=_what_helps(manifest, tokens["train"], tokens["val"], needed, fixed_splits),
    )


def _what_helps(manifest: Manifest, train: int, val: int, needed: int, fixed_splits: bool) -> str:
    """A larger share for validation, else shorter windows, else more text."""
    total, source = manifest.tokens, manifest.source
    documents = sum(info.documents for info in manifest.splits.values())
    if not val and not fixed_splits:
        share = documents if source.whole_documents else total / needed
        if source.val_fraction * share >= 1:
            return "more documents that differ, or longer ones: none could be put aside"
    # Documents are not cut to measure: half as much again.
    fraction = max(0.01, 1.5 * needed / max(1, total))
    if val:
        fraction = max(fraction, 1.5 * needed * source.val_fraction / val)
    elif source.whole_documents:
        fraction = max(fraction, 3 / max(1, documents))
    left = total * (1 - fraction - source.test_fraction)
    if not fixed_splits and train >= needed and fraction < 0.3 and left >= 1.1 * needed:
        return f"data.val_fraction={fraction:.2g}"
    fits = min(train, val) - 1
    if fits >= _MIN_SEQ_LEN:
        return f"data.seq_len={fits}"
    if fixed_splits:
        return f"prepare it again with {needed:,} tokens or more in each of train and val"
    share = min(source.val_fraction or 0.1, 1 - source.val_fraction - source.test_fraction)
    num_bytes = 1.5 * needed / share * max(1.0, manifest.text_bytes / max(1, total))
    share_too = "" if source.val_fraction else " and data.val_fraction=0.1"
    return f"more text: about {_amount(num_bytes)} in all{share_too}"


def _amount(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"
