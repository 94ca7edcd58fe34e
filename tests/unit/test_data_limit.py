"""A limit of tokens for texts that are cut: each split has its share, whatever is left out is an end.

Run: pytest tests/unit/test_data_limit.py
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.preparing.building import BuildOptions
from core.data.preparing.limit import limited_parts, shares
from core.data.preparing.prepare import make_shards, wanted_source
from core.data.preparing.request import resolve_tokenizer
from core.data.preparing.scan import Item
from core.data.reading.sources import open_source
from core.data.shards.manifest import load_manifest, open_shards
from core.data.split import SPLITS, Split
from core.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer

ITEMS = st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(1, 30_000)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(given_items=ITEMS, limit=st.integers(1, 60_000))
def test_each_split_stops_where_it_has_its_tokens(
    given_items: list[tuple[Split, int]], limit: int
) -> None:
    items = [Item(split, "abcdefghi " * (n // 10) + "x", None) for split, n in given_items]
    limits = {split: limit for split in SPLITS}
    kept = list(limited_parts(iter(items), ByteTokenizer(), limits))
    for split in SPLITS:
        before = [item.text for item in items if item.split == split]
        after = [item.text for item in kept if item.split == split]
        whole = sum(len(text) + 1 for text in before)
        found = sum(len(text) + 1 for text in after)
        assert min(limit, whole) <= found <= min(whole, limit + 8_001)
        # All but the last are whole, and that one is a beginning.
        assert after[:-1] == before[: max(0, len(after) - 1)]
        assert not after or before[len(after) - 1].startswith(after[-1])


def test_a_single_text_keeps_its_validation(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a single book\n" for i in range(40_000))
    (tmp_path / "book.txt").write_text(text)
    source = open_source(tmp_path / "book.txt")
    wanted = wanted_source(source, seed=1, val_fraction=0.1, test_fraction=0.05)
    assert shares(wanted, 100_000) == {"train": 85_000, "val": 10_000, "test": 5_000}
    request = resolve_tokenizer(source, "byte", None)
    texts = {}
    for workers in (1, 2):
        options = BuildOptions(workers=workers, max_tokens=100_000)
        folder = make_shards(source, wanted, request, tmp_path / f"s{workers}", options=options)
        manifest = load_manifest(folder)
        found = {split: manifest.splits[split].tokens for split in SPLITS}
        for split, asked in shares(wanted, 100_000).items():
            assert asked <= found[split] <= asked + 8_001
        streams = {split: open_shards(folder, split) for split in SPLITS}
        tokenizer = load_tokenizer(folder)
        texts[workers] = [
            tokenizer.decode(streams[s].tokens(0, streams[s].num_tokens).tolist()) for s in SPLITS
        ]
    assert texts[1] == texts[2]
    train, val, test = texts[1]
    assert text.startswith(train)
    at, end = text.index(val), text.index(test)
    assert len(train) < at < at + len(val) <= end
    assert at == pytest.approx(0.85 * len(text), rel=0.01)


def test_a_split_without_a_share_gets_nothing() -> None:
    limits: dict[Split, int] = {"train": 5, "val": 5, "test": 0}
    items = iter([Item("test", "x", None), Item("train", "abc", None), Item("train", "d", None)])
    kept = list(limited_parts(items, ByteTokenizer(), limits))
    assert [(item.split, item.text) for item in kept] == [("train", "abc"), ("train", "d")]
