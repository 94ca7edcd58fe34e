"""Decoding with a cache on every backend: the same logits as a full forward pass."""

import numpy as np
import pytest

from core.errors import PippinError

# Largest |difference| over largest |logit| in float32; 5e-7 was measured.
TOLERANCE = 3e-6


class Texts:
    """Rows of tokens beside a cache: `feed` decodes and compares with the full forward pass."""

    def __init__(self, backend, rows, max_len=32, seed=0):
        self.backend, self.rng = backend, np.random.default_rng(seed)
        self.cache = backend.start(rows, max_len)
        self.rows = [[] for _ in range(rows)]

    def feed(self, lengths):
        width = max(lengths)
        new = [self.rng.integers(0, 61, n).tolist() for n in lengths]
        padded = np.array([x + [60] * (width - len(x)) for x in new], np.int32)
        found = self.backend.decode(padded, np.array(lengths, np.int32), self.cache)
        assert found.dtype == np.float32 and found.shape == (len(lengths), 61)
        self.rows = [row + x for row, x in zip(self.rows, new)]
        assert self.cache.lengths.tolist() == [len(row) for row in self.rows]
        for row, logits in zip(self.rows, found):
            wanted = self.backend.logits(np.array([row], np.int32))[0, -1]
            assert abs(logits - wanted).max() < TOLERANCE * abs(wanted).max()


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_one_token_at_a_time_equals_full_logits(make, mode):
    texts = Texts(make(mode=mode, model__tie_embeddings=False), rows=2)
    texts.feed([6, 6])
    for _ in range(4):
        texts.feed([1, 1])


def test_from_an_empty_cache_one_token_at_a_time(make):
    texts = Texts(make(), rows=1)
    for _ in range(3):
        texts.feed([1])


def test_rows_have_lengths_of_their_own(make):
    texts = Texts(make(), rows=3)
    for lengths in ([5, 2, 7], [1, 1, 1], [3, 1, 2], [1, 1, 1], [2, 2, 2]):
        texts.feed(lengths)


def test_keep_forks_and_reorders_rows(make):
    texts = Texts(make(), rows=3)
    texts.feed([4, 6, 2])
    texts.cache.keep([2, 0, 2, 1])
    texts.rows = [list(texts.rows[i]) for i in (2, 0, 2, 1)]
    texts.feed([1, 1, 1, 1])
    texts.cache.keep([1])
    texts.rows = [texts.rows[1]]
    texts.feed([2])


def test_trim_forgets_tokens(make):
    texts = Texts(make(), rows=2)
    texts.feed([5, 7])
    texts.cache.trim(1, 3)
    texts.rows[1] = texts.rows[1][:-3]
    texts.feed([1, 1])
    texts.feed([2, 4])
    texts.cache.trim(0, len(texts.rows[0]))
    texts.rows[0] = []
    texts.feed([3, 1])


def test_the_whole_context_can_be_used_and_no_more(make):
    backend = make()
    texts = Texts(backend, rows=2, max_len=9)
    texts.feed([7, 8])
    texts.feed([2, 1])
    tokens, ones = np.zeros((2, 1), np.int32), np.ones(2, np.int32)
    with pytest.raises(PippinError) as caught:
        backend.decode(tokens, ones, texts.cache)
    assert caught.value.code == "P601"
    assert texts.cache.lengths.tolist() == [9, 9]
    texts.cache.trim(0, 2)
    texts.cache.trim(1, 2)
    texts.rows = [row[:-2] for row in texts.rows]
    texts.feed([1, 2])


def test_padding_may_pass_the_end_of_the_cache(make):
    texts = Texts(make(), rows=2, max_len=8)
    texts.feed([7, 2])
    texts.feed([1, 5])


def test_as_many_new_tokens_as_the_cache_has_room_for(make):
    """T equals S, and one row holds keys: "as many queries as keys" is not "from the start"."""
    texts = Texts(make(), rows=2, max_len=9)
    texts.feed([1, 6])
    texts.cache.trim(0, 1)
    texts.rows[0] = []
    texts.feed([9, 3])


def test_wrong_calls_are_refused(make):
    backend = make()
    cache = backend.start(2, 8)
    tokens = np.zeros((2, 3), np.int32)
    calls = [
        lambda: backend.decode(tokens, np.array([3], np.int32), cache),
        lambda: backend.decode(tokens, np.array([0, 3], np.int32), cache),
        lambda: backend.decode(tokens, np.array([4, 3], np.int32), cache),
        lambda: cache.trim(0, 1),
        lambda: cache.keep([2]),
    ]
    for call in calls:
        with pytest.raises(PippinError) as caught:
            call()
        assert caught.value.code == "P601"
    assert cache.lengths.tolist() == [0, 0]


def test_half_precision_decodes_what_it_scores(make):
    backend = make(mode="infer", train__precision="bfloat16")
    tokens = np.random.default_rng(0).integers(0, 61, (2, 8), dtype=np.int32)
    cache = backend.start(2, 8)
    backend.decode(tokens[:, :7], np.array([7, 7], np.int32), cache)
    found = backend.decode(tokens[:, 7:], np.ones(2, np.int32), cache)
    wanted = backend.logits(tokens)[:, -1]
    assert abs(found - wanted).max() < 3e-2 * abs(wanted).max()
