"""A sample of a text of any size, drawn by content in bounded memory."""

import heapq
from collections.abc import Iterator

from core.data.split import document_key
from core.data.tokenizers.base import cut_text

BLOCK_CHARS = 20_000


class TextSample:
    """The blocks with the smallest keys that fit a number of bytes.

    A block's key is a hash of its text and the seed. What is held at the end depends on the blocks
    and the seed, not on their order or number of readers; it is given in the order of the text.
    """

    def __init__(self, max_bytes: int, seed: int) -> None:
        """Make an empty sample.

        Args:
            max_bytes: UTF-8 bytes to hold at most.
            seed: Of the keys.
        """
        self._max_bytes = max_bytes
        self._seed = seed
        self._bound = 1 << 64
        self._heap: list[tuple[int, int, int, str]] = []
        self._number = 0
        self.held_bytes = 0
        self.seen_bytes = 0

    def add(self, block: str) -> None:
        """Offer a block, which may push out others."""
        content = block.encode()
        key = document_key(content, self._seed)
        self._number += 1
        self.seen_bytes += len(content)
        if key >= self._bound:
            return
        heapq.heappush(self._heap, (-key, self._number, len(content), block))
        self.held_bytes += len(content)
        if self.held_bytes > self._max_bytes:
            self._shrink()

    def _shrink(self) -> None:
        # Equal blocks have equal keys and go together: which ones stay must not depend on order.
        while self._heap and (
            self.held_bytes > self._max_bytes or -self._heap[0][0] >= self._bound
        ):
            key, _, size, _ = heapq.heappop(self._heap)
            self._bound = -key
            self.held_bytes -= size

    def blocks(self) -> Iterator[str]:
        """What is held, in the order of the text."""
        for _, _, _, block in sorted(self._heap, key=lambda item: item[1]):
            yield block


def blocks_of(text: str) -> list[str]:
    """A text in blocks of at most 20,000 characters."""
    return cut_text(text, BLOCK_CHARS)
