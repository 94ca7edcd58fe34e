"""A mixture of experts on every backend: choices, sums, the balance, splits, and state.

Logits and gradients against float64 are in tests/contract/test_model.py.

Run: python -m pytest tests/contract/test_experts.py
"""

from dataclasses import replace

import numpy as np
import pytest

from core.params import param_specs
from tests.contract.test_decoding import Texts
from tests.helpers import (
    ArrayCheckpoint,
    assert_same_bits,
    random_batch,
    random_params,
    snapshot,
    split_batch,
    step_hyper,
)

EXPERTS = {"model__n_experts": 5, "model__top_k": 2}
# Of the largest logit, in float32.
TOLERANCE = 2e-6
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def run(backend, steps, *, first=1, rows=3):
    metrics = {}
    for step in range(first, first + steps):
        batch = random_batch(backend.config, rows=rows, seed=step, segments=True)
        metrics = backend.train_step([batch], step_hyper(backend.config, step, [batch]))
    return {name: float(value) for name, value in metrics.items()}


def near(found, wanted):
    return abs(found - wanted).max() < TOLERANCE * abs(wanted).max()


def stacked(dense, experts, n_experts):
    """A mixture's parameters of those of a dense model: `experts(matrix)` is the stack."""
    rng = np.random.default_rng(1)
    out = {name: value for name, value in dense.items() if ".mlp." not in name}
    for layer in range(2):
        p = f"layers.{layer}.mlp."
        out[p + "gate.weight"] = rng.standard_normal((n_experts, 24)).astype(np.float32)
        for name in PROJECTIONS:
            out[f"{p}experts.{name}.weight"] = experts(dense[f"{p}{name}.weight"])
    return out


@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (4, 1), (4, 3), (4, 4)])
def test_equal_experts_are_the_dense_model(make, n_experts, top_k):
    """Whatever the router says, since the shares of a token's experts add up to 1."""
    plain = make()
    dense = random_params(param_specs(plain.config.model))
    params = stacked(dense, lambda w: np.stack([w] * n_experts), n_experts)
    mixed = make(params=params, model__n_experts=n_experts, model__top_k=top_k)
    tokens = random_batch(plain.config, rows=3).tokens
    assert near(mixed.logits(tokens), plain.logits(tokens))


def test_all_experts_are_their_sum_weighted_by_probability(make):
    """One layer without attention's part: every expert alone, weighted by hand."""
    names = {"model__n_layers": 1, "model__n_experts": 3, "model__top_k": 3}
    mixed = make(**names)
    params = random_params(param_specs(mixed.config.model))
    params["layers.0.self_attn.o_proj.weight"][:] = 0
    params["norm.weight"][:] = 1
    mixed.load(ArrayCheckpoint(mixed.config, params))
    tokens = random_batch(mixed.config).tokens
    x = params["embed_tokens.weight"][tokens].astype(np.float64)
    eps = mixed.config.model.norm_eps

    def normed(y):
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + eps)

    h = normed(x) * params["layers.0.post_attention_layernorm.weight"]
    p = "layers.0.mlp."
    scores = np.exp(h @ params[p + "gate.weight"].T)
    shares = scores / scores.sum(-1, keepdims=True)
    for e in range(3):
        gate, up, down = (
            params[f"{p}experts.{n}.weight"][e].astype(np.float64) for n in PROJECTIONS
        )
        z = h @ gate.T
        x = x + shares[..., e : e + 1] * ((z / (1 + np.exp(-z)) * (h @ up.T)) @ down.T)
    wanted = normed(x) @ params["embed_tokens.weight"].T.astype(np.float64)
    assert near(mixed.logits(tokens), wanted)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_of_equal_experts_the_first_are_chosen(make, top_k):
    """A router of zeros: every probability is 1/5, bit for bit."""
    backend = make(**EXPERTS | {"model__top_k": top_k})
    params = random_params(param_specs(backend.config.model))
    for layer in range(2):
        params[f"layers.{layer}.mlp.gate.weight"][:] = 0
    backend.load(ArrayCheckpoint(backend.config, params))
    tokens = random_batch(backend.config).tokens
    before = backend.logits(tokens)
    for layer in range(2):
        for name in PROJECTIONS:
            params[f"layers.{layer}.mlp.experts.{name}.weight"][top_k:] = 7.0
    backend.load(ArrayCheckpoint(backend.config, params))
    assert np.array_equal(backend.logits(tokens), before)
    for layer in range(2):
        params[f"layers.{layer}.mlp.experts.up_proj.weight"][top_k - 1] *= -1
    backend.load(ArrayCheckpoint(backend.config, params))
    assert abs(backend.logits(tokens) - before).max() > 1e-2 * abs(before).max()


def test_experts_that_no_token_goes_to_are_no_trouble(make):
    """All go to the last one: the tiles of the others are empty, and their gradients zero."""
    names = {"model__n_layers": 1, "model__n_experts": 5, "model__top_k": 1}
    backend = make(train__optimizer="adamw", train__router_aux_loss_coef=0.0, **names)
    config = backend.config
    params = random_params(param_specs(config.model))
    # Column 0 of the stream decides, and its sign is that of the embedding's.
    params["embed_tokens.weight"][:, 0] = 40.0
    params["layers.0.post_attention_layernorm.weight"][0] = 50.0
    params["layers.0.mlp.gate.weight"][:] = 0
    params["layers.0.mlp.gate.weight"][4, 0] = 5.0
    backend.load(ArrayCheckpoint(config, params))
    batch = random_batch(config)
    metrics = backend.train_step([batch], step_hyper(config, 1, [batch], max_grad_norm=0.0))
    assert abs(float(metrics["aux_loss"]) - 5.0) < 1e-4  # 1 is even, E is one expert for all
    state = snapshot(backend)
    for name in PROJECTIONS:
        grad = state[f"optim/exp_avg/layers.0.mlp.experts.{name}.weight"]
        assert not grad[:4].any() and grad[4].any()


def test_the_balance_is_1_where_probabilities_are_even(make):
    backend = make(**EXPERTS | {"model__top_k": 3})
    params = random_params(param_specs(backend.config.model))
    for layer in range(2):
        params[f"layers.{layer}.mlp.gate.weight"][:] = 0
    backend.load(ArrayCheckpoint(backend.config, params))
    assert abs(run(backend, 1)["aux_loss"] - 1) < 1e-6


def test_the_coefficient_spreads_tokens_and_is_not_in_the_loss(make):
    def train(coefficient):
        backend = make(**EXPERTS, train__router_aux_loss_coef=coefficient, train__lr_router=0.02)
        batch = random_batch(backend.config, rows=6)
        first = None
        for step in range(1, 26):
            metrics = backend.train_step([batch], step_hyper(backend.config, step, [batch]))
            first = first or {k: float(v) for k, v in metrics.items()}
        return first, {k: float(v) for k, v in metrics.items()}

    off, on = train(0.0), train(1.0)
    assert off[0]["loss"] == on[0]["loss"] and off[0]["aux_loss"] == on[0]["aux_loss"]
    assert on[1]["aux_loss"] < 1 + 0.5 * (off[1]["aux_loss"] - 1)


@pytest.mark.parametrize("parts", [2, 4])
def test_split_into_micro_batches_does_not_matter(make, parts):
    """The balance is a mean over rows, so it too is that of the whole step; with dropout."""
    names = {**EXPERTS, "model__dropout": 0.25, "train__router_aux_loss_coef": 2.0}
    names["train__optimizer"] = "adamw"
    whole, split = make(**names), make(**names)
    batch = random_batch(whole.config, rows=4, segments=True)
    hyper = step_hyper(whole.config, 1, [batch], max_grad_norm=0.0)
    a = whole.train_step([batch], hyper)
    b = split.train_step(split_batch(batch, parts), hyper)
    for name in ("loss", "grad_norm", "aux_loss"):
        assert abs(float(a[name]) - float(b[name])) < 1e-5 * float(a[name]), name
    first, second = snapshot(whole), snapshot(split)
    for name in (n for n in first if "exp_avg/" in n):
        assert np.abs(first[name] - second[name]).max() < 1e-5 * np.abs(first[name]).max(), name


def test_tokens_without_weight_do_not_count_in_the_balance(make):
    """Ends of rows with weight 0 may hold anything; a row without any weight adds nothing."""
    backends = [make(**EXPERTS) for _ in range(3)]
    config = backends[0].config
    batch = random_batch(config, rows=3)
    weights = np.where(np.arange(13) < 9, 1.0, 0.0).astype(np.float32)
    first = replace(batch, weights=np.tile(weights, (3, 1)))
    other = replace(first, tokens=first.tokens.copy())
    other.tokens[:, 9:] = 1
    more = replace(
        first,
        tokens=np.concatenate([first.tokens, other.tokens[:1]]),
        targets=np.concatenate([first.targets, other.targets[:1]]),
        weights=np.concatenate([first.weights, np.zeros((1, 13), np.float32)]),
    )
    hyper = step_hyper(config, 1, [first])
    found = [be.train_step([x], hyper) for be, x in zip(backends, (first, other, more))]
    values = [float(m["aux_loss"]) for m in found]
    assert values[0] > 1.01
    assert max(values) - min(values) < 1e-5


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_repeats_and_resumes_to_the_bit(make, optimizer, checkpointing):
    names = {**EXPERTS, "model__dropout": 0.2, "train__optimizer": optimizer}
    whole = make(**names)
    run(whole, 4)
    half = make(train__gradient_checkpointing=checkpointing, **names)
    run(half, 2)
    state = ArrayCheckpoint(half.config, snapshot(half), step=2)
    again = make(train__gradient_checkpointing=checkpointing, **names)
    again.load(state)
    run(again, 2, first=3)
    assert_same_bits(snapshot(whole), snapshot(again))


def test_decoding_chooses_as_scoring_does(make):
    texts = Texts(make(mode="infer", model__tie_embeddings=False, **EXPERTS), rows=3)
    for lengths in ([5, 2, 7], [1, 1, 1], [3, 1, 2], [1, 1, 1]):
        texts.feed(lengths)


def test_no_token_sees_a_later_one(make):
    """Rows change places where a later token chooses otherwise: rounding, and no more."""
    backend = make(**EXPERTS)
    tokens = random_batch(backend.config).tokens
    changed = tokens.copy()
    changed[:, 8] = (changed[:, 8] + 1) % 61
    before, after = backend.logits(tokens), backend.logits(changed)
    assert near(after[:, :8], before[:, :8])
    assert not near(after[:, 8:], before[:, 8:])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_float32_and_the_router_stays_exact(make, precision):
    """All experts, so that a choice that is close cannot fall otherwise."""
    names = {"model__n_experts": 3, "model__top_k": 3}
    wide, batch = make(**names), random_batch(make().config)
    params = random_params(param_specs(wide.config.model))
    half = make(mode="infer", train__precision=precision, **names)
    exact = wide.logits(batch.tokens)
    assert 0 < abs(half.logits(batch.tokens) - exact).max() < 4e-2 * abs(exact).max()
    kept = snapshot(half)
    router, expert = "layers.0.mlp.gate.weight", "layers.0.mlp.experts.up_proj.weight"
    assert np.array_equal(kept[router], params[router])
    assert not np.array_equal(kept[expert], params[expert])
    trained = make(train__precision=precision, **EXPERTS)
    start = {n: np.array(v) for n, v in trained.tensors(optimizer=False)}
    metrics = run(trained, 2)
    assert metrics["skipped_total"] == 0 and np.isfinite(metrics["aux_loss"])
    end = snapshot(trained)
    assert all(not np.array_equal(start[n], end[n]) for n in start)


def test_a_step_that_is_not_finite_is_skipped(make):
    """A router of NaN has no largest probability; the indices are valid still."""
    backend = make(**EXPERTS)
    params = random_params(param_specs(backend.config.model))
    params["layers.0.mlp.gate.weight"][:] = np.nan
    backend.load(ArrayCheckpoint(backend.config, params))
    before = snapshot(backend)
    assert run(backend, 1)["skipped_total"] == 1
    assert_same_bits(before, snapshot(backend))


@pytest.mark.slow
def test_compiled_training_equals_eager(make):
    eager, compiled = make(**EXPERTS), make(train__compile=True, **EXPERTS)
    start = snapshot(eager)
    run(eager, 3), run(compiled, 3)
    first, second = snapshot(eager), snapshot(compiled)
    for name in start:
        move = np.linalg.norm(first[name].astype(float) - start[name])
        assert np.linalg.norm(first[name].astype(float) - second[name]) < 1e-4 * move, name
