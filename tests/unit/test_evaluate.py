"""Evaluation against sums done by hand, and probes against a model whose preferences are known.

Run: pytest tests/unit/test_evaluate.py
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from core.backend import Batch, Scores
from core.data.tokenizers.tokenizer import ByteTokenizer
from core.errors import PippinError
from core.inference.evaluate import evaluate, probe_skills


@dataclass(frozen=True)
class Probe:
    context: str
    answer: str
    distractors: tuple[str, ...]
    skill: str


class FakeBackend:
    """nll of a target is a function of its prefix; `cost` gives it, in nats."""

    def __init__(self, cost, *, ranks=1):
        self.cost = cost
        self.ranks = ranks
        self.shapes = []

    def score(self, batch):
        self.shapes.append(batch.tokens.shape)
        nll = np.zeros(batch.tokens.shape, np.float32)
        for b, row in enumerate(batch.tokens.tolist()):
            for t in range(len(row)):
                nll[b, t] = self.cost(row[: t + 1], int(batch.targets[b, t]))
        return Scores(nll, batch.targets % 3 == 0)

    def sum_across(self, values):
        return values * self.ranks


def batch_of(targets, weights):
    targets = np.array(targets, np.int32)
    return Batch(np.zeros_like(targets), targets, np.array(weights, np.float32))


def test_evaluate_equals_sums_by_hand():
    batches = [
        batch_of([[3, 5, 6], [7, 9, 2]], [[1, 0.5, 0], [1, 1, 0]]),
        batch_of([[9, 9, 4]], [[0, 1, 0.25]]),
    ]
    token_bytes = np.array([0, 1, 2, 3, 4, 0, 6, 1, 1, 5])
    found = evaluate(FakeBackend(lambda _, t: t / 7), batches, token_bytes=token_bytes)
    nats = (1 * 3 + 0.5 * 5 + 7 + 9 + 9 + 0.25 * 4) / 7
    weight = 1 + 0.5 + 1 + 1 + 1 + 0.25
    num_bytes = 1 * 3 + 0.5 * 0 + 1 + 5 + 5 + 0.25 * 4
    assert found.loss == pytest.approx(nats / weight, rel=1e-7)
    assert found.perplexity == pytest.approx(math.exp(nats / weight), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-7)
    assert found.accuracy == pytest.approx((1 + 1 + 1) / weight)
    assert found.tokens == 6


def test_what_has_no_weight_cannot_spoil_the_loss():
    found = evaluate(
        FakeBackend(lambda _, t: math.nan if t == 8 else 2.0), [batch_of([[8, 1]], [[0, 1]])]
    )
    assert found.loss == 2.0 and found.bits_per_byte is None


def test_sums_are_float64():
    """2^24 + 1 in float32 is 2^24: a float32 sum of the losses would lose every second target."""
    batches = [batch_of([[1]], [[1]]) for _ in range(3)]
    costs = iter([2.0**24, 1.0, 1.0])
    assert evaluate(FakeBackend(lambda *_: next(costs)), batches).loss == (2**24 + 2) / 3


def test_ranks_are_summed_before_the_division():
    batch = batch_of([[3, 4]], [[1, 1]])
    one = evaluate(FakeBackend(lambda _, t: t), [batch])
    four = evaluate(FakeBackend(lambda _, t: t, ranks=4), [batch])
    assert four.loss == one.loss == 3.5 and four.tokens == 4 * one.tokens


def test_a_huge_loss_has_an_infinite_perplexity():
    assert evaluate(FakeBackend(lambda *_: 900.0), [batch_of([[1]], [[1]])]).perplexity == math.inf


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(PippinError) as caught:
        evaluate(FakeBackend(lambda *_: 1.0), [batch_of([[1]], [[0]])])
    assert caught.value.code == "P201"


def prefers(*texts):
    """A model to which the bytes of these texts cost little, wherever they stand."""

    def cost(prefix, target):
        text = bytes(t for t in [*prefix, target] if 0 < t < 256).decode()
        return 0.1 if any(text.endswith(t[: i + 1]) for t in texts for i in range(len(t))) else 5.0

    return cost


PROBES = [
    Probe("Mia had a kite. Her name was ", "Mia", ("Otto", "Finn"), "names"),
    Probe("Otto had a cat. His name was ", "Otto", ("Mia", "Finn"), "names"),
    Probe("The kite was ", "red", ("blue", "green"), "colours"),
]


def test_probes_count_answers_likelier_than_every_distractor():
    found = probe_skills(
        FakeBackend(prefers("Mia", "red")), ByteTokenizer(), PROBES, max_seq_len=64
    )
    assert found == {"names": (1, 2), "colours": (1, 1)}


def test_one_better_distractor_is_enough_to_fail():
    found = probe_skills(
        FakeBackend(prefers("red", "blue")), ByteTokenizer(), PROBES[2:], max_seq_len=64
    )
    assert found == {"colours": (1, 1)}  # "red" has 3 cheap bytes, "blue" has 4
    found = probe_skills(
        FakeBackend(lambda _, t: 1.0),
        ByteTokenizer(),
        [Probe("a ", "xyz", ("xy",), "s")],
        max_seq_len=9,
    )
    assert found == {"s": (0, 1)}


def test_a_tie_is_not_correct():
    probes = [Probe("a ", "red", ("tan",), "colours")]
    found = probe_skills(FakeBackend(lambda *_: 1.0), ByteTokenizer(), probes, max_seq_len=64)
    assert found == {"colours": (0, 1)}


def test_only_the_continuation_is_scored():
    """A context that costs as much as it likes changes nothing; every token of the answer counts."""
    scored = []

    def cost(prefix, target):
        scored.append((len(prefix), target))
        return float(len(prefix))

    backend = FakeBackend(cost)
    probes = [Probe("ab", "cd", ("ce",), "s")]
    batches = []
    score = backend.score
    backend.score = lambda batch: (batches.append(batch), score(batch))[1]
    probe_skills(backend, ByteTokenizer(), probes, max_seq_len=8, batch_size=3)
    (batch,) = batches
    assert batch.weights[:, :].tolist() == [[0, 0, 1, 1, *[0] * 4]] * 2 + [[0] * 8]
    assert batch.tokens[0].tolist() == [256, *b"abc", 0, 0, 0, 0]
    assert batch.targets[1].tolist() == [*b"abce", 0, 0, 0, 0]


def test_all_calls_have_one_shape_and_the_split_does_not_matter():
    model = prefers("Mia", "red")
    results = []
    for batch_size in (1, 4, 50):
        backend = FakeBackend(model)
        results.append(
            probe_skills(backend, ByteTokenizer(), PROBES, max_seq_len=64, batch_size=batch_size)
        )
        assert len(set(backend.shapes)) == 1 and backend.shapes[0][0] == batch_size
    assert results[0] == results[1] == results[2]


def test_a_long_context_loses_its_beginning():
    probes = [Probe("x" * 100 + "Mia was ", "Mia", ("Otto",), "names")]
    backend = FakeBackend(prefers("Mia"))
    assert probe_skills(backend, ByteTokenizer(), probes, max_seq_len=16) == {"names": (1, 1)}
    assert backend.shapes[0][1] == 16


def test_a_tokenizer_that_merges_across_the_cut_is_measured_from_the_same_text():
    """ "ki" + "te" becomes one token: the shared prefix ends before it, for every candidate."""

    class Merging(ByteTokenizer):
        def encode(self, text):
            ids = list(text.encode())
            out = []
            while ids:
                if bytes(ids[:4]) == b"kite":
                    out.append(200)
                    ids = ids[4:]
                else:
                    out.append(ids.pop(0))
            return out

    backend = FakeBackend(lambda prefix, target: 1.5 if target == 200 else 1.0)
    found = probe_skills(backend, Merging(), [Probe("a ki", "te", ("ss",), "s")], max_seq_len=16)
    # "kite" costs 1.5, "kiss" 4.0; scored from "ss" alone it would cost 2.0 against an empty answer.
    assert found == {"s": (1, 1)}


def test_an_empty_context_begins_a_document():
    backend = FakeBackend(lambda prefix, target: 0.5 if prefix[0] == 256 and target == 97 else 3.0)
    found = probe_skills(backend, ByteTokenizer(), [Probe("", "a", ("b",), "s")], max_seq_len=8)
    assert found == {"s": (1, 1)}


@pytest.mark.parametrize("answer", ["", "y" * 9])
def test_answers_that_cannot_be_scored_are_refused(answer):
    with pytest.raises(PippinError, match="skill 's'") as caught:
        probe_skills(
            FakeBackend(lambda *_: 1.0),
            ByteTokenizer(),
            [Probe("ab", answer, ("z",), "s")],
            max_seq_len=8,
        )
    assert caught.value.code == "P601"
