"""Generation: what is fed, what stops it, and that a text does not depend on its batch.

The backend is a fake whose logits are a function of everything a row was fed, so that a wrong offset,
a lost token or a mixed-up row changes the text. Run: pytest tests/unit/test_generate.py
"""

import hashlib

import numpy as np
import pytest

from core.data.tokenizers.tokenizer import ByteTokenizer
from core.errors import PippinError
from core.inference.generate import generate
from core.inference.sampling import Sampling
from core.inference.text import StreamDecoder, decode_tokens, printable

VOCAB = 300  # more than the tokenizer's 261: ids beyond it must never be written


class FakeCache:
    def __init__(self, batch_size, max_len):
        self.rows = [[] for _ in range(batch_size)]
        self.max_len = max_len

    @property
    def lengths(self):
        return np.array([len(r) for r in self.rows], np.int32)

    def keep(self, rows):
        self.rows = [list(self.rows[r]) for r in rows]


def next_logits(fed):
    digest = hashlib.sha256(repr(fed).encode()).digest()
    logits = np.random.default_rng(list(digest)).normal(0, 2, VOCAB).astype(np.float32)
    logits[261:] = 50.0
    return logits


class FakeBackend:
    def __init__(self, script=None):
        self.batch_sizes = []
        self.max_lens = []
        self.script = script  # (tokens fed to a row) -> the id that is certain

    def start(self, batch_size, max_len):
        self.max_lens.append(max_len)
        return FakeCache(batch_size, max_len)

    def decode(self, tokens, lengths, cache):
        assert tokens.dtype == np.int32 and lengths.dtype == np.int32
        assert tokens.shape[0] == len(lengths) == len(cache.rows)
        self.batch_sizes.append(len(lengths))
        out = []
        for row, ids, n in zip(cache.rows, tokens.tolist(), lengths.tolist(), strict=True):
            assert 1 <= n <= len(ids)
            row += ids[:n]
            if len(row) > cache.max_len:
                raise PippinError("P601", "the context is full")
            logits = next_logits(row)
            if self.script is not None:
                logits[:] = -50
                logits[self.script(row)] = 50
            out.append(logits)
        return np.stack(out)


def run(prompts, *, backend=None, **changes):
    settings = {"max_seq_len": 32, "max_new_tokens": 8, "sampling": Sampling(1.0, seed=3)}
    tokenizer = ByteTokenizer()
    return generate(backend or FakeBackend(), tokenizer, prompts, **{**settings, **changes})


def by_hand(prompt, row, steps, *, seed=3):
    """One row, one token at a time, without cache or batch: the whole prefix every time."""
    from core.inference.sampling import sample

    fed = [256, *ByteTokenizer().encode(prompt)]
    start = len(fed)
    for _ in range(steps):
        logits = next_logits(fed)[None, :261]
        token = int(sample(logits, Sampling(1.0, seed=seed), [row], [len(fed)])[0])
        if token == 256:
            break
        fed.append(token)
    return tuple(fed[start:])


def test_batched_texts_equal_one_by_one_without_a_cache():
    prompts = ["Once", "A much longer one", "x", "It"]
    texts = run(prompts)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert text.tokens == by_hand(prompt, row, 8)
        assert text.prompt_tokens == (256, *prompt.encode())
        assert text.text == bytes(t for t in text.tokens if t < 256).decode(errors="replace")
        assert text.seconds >= 0


def test_the_batch_size_and_the_neighbours_do_not_change_a_text():
    prompts = ["Once", "A much longer one", "x", "It", "Otto"]
    together = [t.tokens for t in run(prompts)]
    assert [t.tokens for t in run(prompts, batch_size=2)] == together
    assert run(["x"], row_ids=[2])[0].tokens == together[2]
    assert run(["x"], row_ids=[1])[0].tokens != together[2]


def test_equal_prompts_give_different_samples_and_a_seed_repeats_them():
    first = [t.tokens for t in run(["Once"] * 3)]
    assert len(set(first)) == 3
    assert [t.tokens for t in run(["Once"] * 3)] == first
    assert [t.tokens for t in run(["Once"] * 3, sampling=Sampling(1.0, seed=4))] != first


def test_a_text_continued_later_is_the_same_text():
    class Letters(FakeBackend):
        def decode(self, tokens, lengths, cache):
            logits = super().decode(tokens, lengths, cache)
            logits[:, 128:] = -50
            return logits

    whole = run(["Once"], backend=Letters())[0].text
    half = run(["Once"], backend=Letters(), max_new_tokens=3)[0].text
    rest = run(["Once" + half], backend=Letters(), max_new_tokens=5)[0].text
    assert len(whole) == 8 and half + rest == whole


def test_ids_beyond_the_tokenizer_are_never_written():
    assert all(max(t.tokens) < 261 for t in run(["Once", "It"], max_new_tokens=20))


def test_rows_that_stopped_leave_the_batch():
    """Row 0 stops after 1 token, row 2 after 3; the others run to the length."""
    ends = {ord("a"): 2, ord("b"): 99, ord("c"): 4}
    backend = FakeBackend(lambda fed: 256 if len(fed) > ends[fed[1]] else ord("z"))
    texts = run(["a", "b", "c"], backend=backend, max_new_tokens=5)
    assert [t.text for t in texts] == ["z", "zzzzz", "zzz"]
    assert [t.stop_reason for t in texts] == ["stop", "length", "stop"]
    assert backend.batch_sizes == [3, 3, 2, 2, 1]


def test_the_stop_id_is_not_part_of_the_text_and_can_be_chosen():
    backend = FakeBackend(lambda fed: 256 if len(fed) == 4 else ord("z"))
    assert run(["a"], backend=backend)[0].tokens == (122, 122)
    late = run(["a"], backend=backend, stop_ids=[9])[0]
    assert late.tokens == (122, 122, 256, 122, 122, 122, 122, 122) and late.text == "z" * 7


def test_a_full_context_stops_the_text():
    """The model is never given more than its context; the token after the last place is kept."""
    backend = FakeBackend(lambda fed: ord("z"))
    short, long = run(["a" * 5, "a" * 7], backend=backend, max_seq_len=8, max_new_tokens=30)
    assert (len(short.tokens), short.stop_reason) == (3, "context")
    assert (len(long.tokens), long.stop_reason) == (1, "context")
    assert backend.max_lens == [8]
    exact = run(["a" * 8], backend=backend, max_seq_len=8, max_new_tokens=30)[0]
    assert (len(exact.tokens), exact.stop_reason) == (1, "context")
    assert exact.prompt_tokens == tuple(b"a" * 8)  # no room for the id that begins a document


def test_the_cache_is_no_longer_than_needed():
    backend = FakeBackend()
    run(["abc", "a"], backend=backend, max_seq_len=1000, max_new_tokens=4)
    assert backend.max_lens == [8]


def test_a_prompt_longer_than_the_context_names_both_numbers():
    with pytest.raises(PippinError, match=r"33 tokens.*context is 32") as caught:
        run(["ok", "a" * 33])
    assert caught.value.code == "P601"


def test_a_prompt_begins_a_document_even_if_empty():
    assert [t.prompt_tokens for t in run(["", "a"])] == [(256,), (256, 97)]


def test_no_prompts_give_no_texts():
    assert run([]) == []


def test_no_new_tokens_is_refused():
    with pytest.raises(PippinError, match="max_new_tokens is 0"):
        run(["a"], max_new_tokens=0)


def test_on_token_sees_every_token_in_order_with_its_prompt():
    seen = {}
    texts = run(
        ["Once", "It", "x"],
        batch_size=2,
        on_token=lambda row, token: seen.setdefault(row, []).append(token),
    )
    assert seen == {i: list(t.tokens) for i, t in enumerate(texts)}


SMILE = "a\u00e9\u6f22\U0001f600b"


def test_a_stream_never_breaks_a_character():
    tokenizer = ByteTokenizer()
    stream = StreamDecoder(tokenizer)
    pieces = [stream.feed(t) for t in SMILE.encode()]
    assert pieces == ["a", "", "\u00e9", "", "", "\u6f22", "", "", "", "\U0001f600", "b"]
    assert stream.flush() == ""


@pytest.mark.parametrize("data", [b"a\xf0\x9f\x98", b"\xff\xfea", b"\xe6\xbc", b"\xf0\x9fab\x80"])
def test_a_stream_of_broken_bytes_equals_decoding_at_once(data):
    tokenizer = ByteTokenizer()
    stream = StreamDecoder(tokenizer)
    pieces = "".join(stream.feed(t) for t in data) + stream.flush()
    assert pieces == data.decode("utf-8", errors="replace") == decode_tokens(tokenizer, list(data))


def test_printable_leaves_text_alone():
    text = "Once,\n\tMia said: \u00ab na\u00efve \u6f22\u5b57 \U0001f600 \u05d0\u05d1 \u00bb"
    assert printable(text) == text


def test_printable_shows_controls_instead_of_sending_them():
    attack = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\b\x7f\x00\u202egnp.exe\u2066\u200f\ud800"
    shown = printable(attack)
    assert shown.startswith("\u241b]0;owned\u2407\u241b[2J\ufffd31m\u240d\u2408\u2421\u2400gnp.exe")
    assert shown.endswith("gnp.exe\ufffd")


def test_printable_output_has_no_control_at_all():
    """Every code point: none that a terminal obeys, and none that reorders, gets through."""
    import unicodedata

    for code in range(0x3000):
        for char in printable(chr(code)):
            assert char in "\n\t" or unicodedata.category(char) != "Cc"
            assert unicodedata.bidirectional(char) not in {
                "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI",
            }  # fmt: skip
