"""A limit of tokens for documents that are cut into their splits.

Whole documents are taken until the limit is reached. A single book would be taken whole so, and the
text for validation, its end, not at all: of documents that are cut each split has its share.
"""

from collections.abc import Iterator, Mapping

from core.data.preparing.scan import Item
from core.data.shards.manifest import SourceInfo
from core.data.split import Split
from core.data.tokenizers.tokenizer import Tokenizer

# The shortest parts whose ids, joined, are those of the text for every text.
_PART_CHARS = 8_000


def shares(source: SourceInfo, max_tokens: int) -> dict[Split, int]:
    """Tokens of each split; a share above 0 is at least one token."""
    fractions: dict[Split, float] = {"val": source.val_fraction, "test": source.test_fraction}
    fractions["train"] = 1.0 - sum(fractions.values())
    return {s: max(1, round(f * max_tokens)) if f > 0 else 0 for s, f in fractions.items()}


def limited_parts(
    items: Iterator[Item], tokenizer: Tokenizer, limits: Mapping[Split, int]
) -> Iterator[Item]:
    """The parts of documents until each split has its tokens.

    Args:
        items: Parts of documents, without segments.
        tokenizer: Counts the tokens.
        limits: Tokens of each split, `</s>` included; one is exceeded by 8,000 characters at most.
    """
    left = dict(limits)
    for item in items:
        if left[item.split] > 0:
            kept = ""
            left[item.split] -= 1
            for part in tokenizer.cut(item.text, _PART_CHARS):
                if left[item.split] <= 0 and kept:
                    break
                kept += part
                left[item.split] -= len(tokenizer.encode_batch([part])[0])
            yield Item(item.split, kept, None)
        if all(tokens <= 0 for tokens in left.values()):
            return
