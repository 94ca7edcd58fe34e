"""What one step must be on every backend: splits, clip, dropout, steps that do not count."""

from dataclasses import replace

import numpy as np
import pytest

from core.params import param_specs
from tests.helpers import (
    ArrayCheckpoint,
    assert_same_bits,
    random_batch,
    random_params,
    snapshot,
    split_batch,
    step_hyper,
)
from tests.reference import optim_np

# Error of ten float32 updates over their length; see tests/unit/test_torch_optim.py.
ADAMW_TOLERANCE, MUON_TOLERANCE = 1e-5, 2e-5
# Rounding of the parameters themselves, ten times: 1e-7 was measured.
STORAGE = 2e-7
MUON, ADAMW = {"train__optimizer": "muon"}, {"train__optimizer": "adamw"}


def run(backend, steps, *, first=1, rows=2, **hyper):
    """Train on batches that are functions of the step, and return the last metrics as numbers."""
    metrics = {}
    for step in range(first, first + steps):
        batch = random_batch(backend.config, rows=rows, seed=step, segments=step % 2 == 0)
        metrics = backend.train_step([batch], step_hyper(backend.config, step, [batch], **hyper))
    return {name: float(value) for name, value in metrics.items()}


def distance(a, b, start):
    """Largest difference of the two moves from `start`, relative to the move, over tensors."""
    moves = {n: np.linalg.norm(a[n].astype(float) - start[n]) for n in start}
    assert min(moves.values()) > 0
    return max(np.linalg.norm(a[n].astype(float) - b[n]) / moves[n] for n in start)


@pytest.mark.parametrize("optimizer", [MUON, ADAMW])
def test_loss_falls_and_metrics_are_complete(make, optimizer):
    backend = make(**optimizer)
    batch = random_batch(backend.config)
    losses = []
    for step in range(1, 21):
        metrics = backend.train_step([batch], step_hyper(backend.config, step, [batch]))
        losses.append(float(metrics["loss"]))
    assert set(metrics) == {"loss", "grad_norm", "skipped_total", "skipped_in_a_row"}
    assert float(metrics["grad_norm"]) > 0 and float(metrics["skipped_total"]) == 0
    assert losses[-1] < 0.7 * losses[0]


def test_metrics_keep_the_numbers_of_their_step(make):
    backend = make()
    batch = random_batch(backend.config)
    poison = replace(batch, weights=np.full_like(batch.weights, np.nan))
    hyper = step_hyper(backend.config, 1, [batch])
    first = backend.train_step([poison], hyper)
    second = backend.train_step([poison], hyper)
    assert [float(m["skipped_in_a_row"]) for m in (first, second)] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (ADAMW, ADAMW_TOLERANCE),
        ({**ADAMW, "train__beta1": 0.8, "train__beta2": 0.9}, ADAMW_TOLERANCE),
        (MUON, MUON_TOLERANCE),
        ({**MUON, "train__muon_scale": "spectral", "train__ns_steps": 3}, MUON_TOLERANCE),
    ],
)
def test_ten_updates_equal_the_reference(make, overrides, tolerance):
    """The gradient of each step is read from the first moment of a second backend."""
    backend = make(model__tie_embeddings=False, **overrides)
    probe = make(model__tie_embeddings=False, train__optimizer="adamw", train__beta1=0.5)
    config, specs = backend.config, param_specs(backend.config.model)
    start = random_params(specs)
    reference = optim_np.Optimizer(start, specs, config.train)
    for step in range(1, 11):
        batch = random_batch(config, seed=step)
        now = {n: np.array(v) for n, v in backend.tensors(optimizer=False)}
        probe.load(ArrayCheckpoint(config, now))
        probe.train_step([batch], step_hyper(config, 1, [batch], max_grad_norm=0.0))
        state = snapshot(probe)
        grads = {s.name: 2 * state[f"optim/exp_avg/{s.name}"].astype(float) for s in specs}
        hyper = step_hyper(config, step, [batch], lr_scale=1 / step)
        hyper = replace(hyper, momentum=0.9 + 0.005 * step)
        norm = float(backend.train_step([batch], hyper)["grad_norm"])
        assert norm > hyper.max_grad_norm
        assert abs(norm - reference.step(grads, hyper)) < 1e-6 * norm
    found = snapshot(backend)
    for s in specs:
        wanted = reference.params[s.name]
        bound = tolerance * np.linalg.norm(wanted - start[s.name]) + STORAGE * np.linalg.norm(
            wanted
        )
        assert np.linalg.norm(found[s.name] - wanted) < bound, s.name
    for key, wanted in reference.state.items():
        assert np.linalg.norm(found[key] - wanted) < 1e-5 * np.linalg.norm(wanted), key


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("optimizer", [MUON, ADAMW])
def test_split_into_micro_batches_does_not_matter(make, parts, optimizer):
    """With dropout on, which is a function of the row within the step."""
    whole, split = (make(model__dropout=0.25, **optimizer) for _ in range(2))
    start = {n: np.array(v) for n, v in whole.tensors(optimizer=False)}
    batch = random_batch(whole.config, rows=4, segments=True)
    hyper = step_hyper(whole.config, 1, [batch])
    a = whole.train_step([batch], hyper)
    b = split.train_step(split_batch(batch, parts), hyper)
    for name in ("loss", "grad_norm"):
        assert abs(float(a[name]) - float(b[name])) < 1e-5 * float(a[name])
    # AdamW's first step divides a gradient by its own size, so tiny ones move as far as large ones.
    bound = 1e-5 if optimizer is MUON else 1e-4
    assert distance(snapshot(whole), snapshot(split), start) < bound


@pytest.mark.parametrize("optimizer", [MUON, ADAMW])
def test_clip_bounds_the_gradient(make, optimizer):
    free, clipped = make(**optimizer), make(**optimizer)
    norm = run(free, 1, max_grad_norm=0.0)["grad_norm"]
    assert run(clipped, 1, max_grad_norm=norm / 8)["grad_norm"] == norm
    slot = "optim/exp_avg/embed_tokens.weight"
    a, b = snapshot(free)[slot], snapshot(clipped)[slot]
    assert np.allclose(b, a / 8, rtol=1e-5, atol=0) and np.abs(a).max() > 0
    loose = make(**optimizer)
    run(loose, 1, max_grad_norm=norm * 8)
    assert_same_bits(snapshot(loose), snapshot(free))


def test_every_rate_and_decay_is_read(make):
    """Each group moves by its own rate and decay, and by nothing else."""
    backend = make(model__tie_embeddings=False)
    specs = param_specs(backend.config.model)
    batch = random_batch(backend.config)
    hyper = step_hyper(backend.config, 1, [batch])
    for group in ("matrix", "embed", "head", "vector"):
        before = snapshot(backend)
        rates = {**dict.fromkeys(hyper.lr, 0.0), group: 0.01}
        backend.train_step([batch], replace(hyper, lr=rates))
        after = snapshot(backend)
        moved = {s.name for s in specs if not np.array_equal(before[s.name], after[s.name])}
        assert moved == {s.name for s in specs if s.group == group}
    frozen = make(model__tie_embeddings=False)
    start = snapshot(frozen)
    quiet = replace(batch, weights=np.zeros_like(batch.weights))
    decay = {g: 0.5 for g in hyper.lr}
    frozen.train_step([quiet], replace(hyper, lr={g: 0.1 for g in hyper.lr}, weight_decay=decay))
    for s in specs:
        value = {n: np.array(v) for n, v in frozen.tensors(optimizer=False)}[s.name]
        assert np.allclose(value, start[s.name] * np.float32(0.95), rtol=1e-6)


@pytest.mark.parametrize("overrides", [{}, {"train__precision": "bfloat16"}])
def test_gradient_checkpointing_changes_nothing(make, overrides):
    """Dropout is on: a mask drawn again in the backward pass would show."""
    plain = make(model__dropout=0.4, **overrides)
    again = make(model__dropout=0.4, train__gradient_checkpointing=True, **overrides)
    run(plain, 2), run(again, 2)
    assert_same_bits(snapshot(plain), snapshot(again))


def test_dropout_depends_on_step_and_row_and_seed(make):
    backend = make(model__dropout=0.4)
    batch = random_batch(backend.config)
    params = random_params(param_specs(backend.config.model))
    losses = []
    for step, row0 in ((1, 0), (1, 0), (2, 0), (1, 2)):
        backend.load(ArrayCheckpoint(backend.config, params))
        hyper = step_hyper(backend.config, step, [batch])
        losses.append(float(backend.train_step([replace(batch, row0=row0)], hyper)["loss"]))
    other = make(model__dropout=0.4, train__seed=8)
    losses.append(float(other.train_step([batch], step_hyper(other.config, 1, [batch]))["loss"]))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 4


def test_score_and_decode_have_no_side_effects(make):
    quiet, asked = make(model__dropout=0.2), make(model__dropout=0.2)
    for step in (1, 2, 3):
        run(quiet, 1, first=step)
        batch = random_batch(asked.config, rows=3, length=9, seed=99)
        first = asked.score(batch)
        asked.logits(batch.tokens)
        cache = asked.start(3, 12)
        asked.decode(batch.tokens, np.array([9, 4, 7], np.int32), cache)
        assert np.array_equal(first.nll, asked.score(batch).nll)
        run(asked, 1, first=step)
    assert_same_bits(snapshot(quiet), snapshot(asked))


@pytest.mark.parametrize("optimizer", [MUON, ADAMW])
def test_step_that_is_not_finite_is_skipped(make, optimizer):
    backend = make(**optimizer)
    run(backend, 1)
    before = snapshot(backend)
    batch = random_batch(backend.config, rows=4, seed=2)
    good, bad = split_batch(batch, 2)
    poison = bad.weights.copy()
    poison[1, 3] = np.nan
    hyper = step_hyper(backend.config, 2, [batch])
    metrics = backend.train_step([good, replace(bad, weights=poison)], hyper)
    assert not np.isfinite(float(metrics["loss"]))
    assert_same_bits(before, snapshot(backend))
    assert [float(metrics[k]) for k in ("skipped_total", "skipped_in_a_row")] == [1, 1]
    after = run(backend, 1, first=3)
    assert [after[k] for k in ("skipped_total", "skipped_in_a_row")] == [1, 0]
    assert backend.backend_state()["skipped_total"] == 1
    assert not np.array_equal(snapshot(backend)["norm.weight"], before["norm.weight"])


@pytest.mark.parametrize(
    "overrides",
    [{}, {"train__precision": "float16"}, {"model__n_experts": 4}, {"train__optimizer": "adamw"}],
)
def test_step_without_weight_changes_nothing_and_is_no_skip(make, overrides):
    backend = make(**overrides)
    run(backend, 2)
    before = snapshot(backend)
    batch = random_batch(backend.config)
    empty = replace(batch, weights=np.zeros_like(batch.weights))
    metrics = backend.train_step([empty], step_hyper(backend.config, 3, [empty]))
    assert_same_bits(before, snapshot(backend))
    assert [float(metrics[k]) for k in ("loss", "skipped_total", "skipped_in_a_row")] == [0, 0, 0]
    assert run(backend, 1, first=4)["skipped_in_a_row"] == 0


def test_loss_scale_halves_on_overflow_and_the_step_is_not_counted(make):
    backend = make(train__precision="float16", backend_state={"loss_scale": 2.0**24})
    before = snapshot(backend)
    metrics = run(backend, 1)
    assert np.isfinite(metrics["loss"])
    assert metrics["loss_scale"] == 2.0**23 and metrics["overflows_total"] == 1
    assert metrics["skipped_total"] == 0 and metrics["skipped_in_a_row"] == 0
    assert_same_bits(before, snapshot(backend))
    for _ in range(20):
        metrics = run(backend, 1)
    assert metrics["loss_scale"] < 2.0**23
    assert metrics["skipped_total"] == 0
    assert not np.array_equal(snapshot(backend)["norm.weight"], before["norm.weight"])


def test_loss_scale_grows_after_2000_good_steps(make):
    backend = make(
        train__precision="float16", backend_state={"loss_scale": 8.0, "good_steps": 1998.0}
    )
    assert run(backend, 1)["loss_scale"] == 8
    assert run(backend, 1, first=2)["loss_scale"] == 16
    state = backend.backend_state()
    assert state["good_steps"] == 0 and state["loss_scale"] == 16
    limit = make(
        train__precision="float16", backend_state={"loss_scale": 64.0, "good_steps": 1999.0}
    )
    run(limit, 1)
    assert limit.backend_state()["loss_scale"] == 128


def test_overflow_at_scale_one_counts_as_not_finite(make):
    backend = make(train__precision="float16", backend_state={"loss_scale": 1.0})
    before = snapshot(backend)
    # The loss is finite; its gradient is beyond float16.
    metrics = run(backend, 1, normalizer=1e-7)
    assert np.isfinite(metrics["loss"])
    assert metrics["loss_scale"] == 1 and metrics["overflows_total"] == 0
    assert metrics["skipped_total"] == 1 and metrics["skipped_in_a_row"] == 1
    assert_same_bits(before, snapshot(backend))


def test_float16_update_is_near_the_float32_one(make):
    wide, half = make(**MUON), make(train__precision="float16", **MUON)
    start = {n: np.array(v) for n, v in wide.tensors(optimizer=False)}
    a, b = run(wide, 1), run(half, 1)
    # The scale is divided out: the norm is that of the true gradient.
    assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-2 * a["grad_norm"]
    matrices = [n for n in start if n.endswith("proj.weight")]
    moves = {n: start[n] for n in matrices}
    wide_state, half_state = snapshot(wide), snapshot(half)
    assert distance(wide_state, half_state, moves) < 0.1
    # Updates are normalised, state is not.
    slots = {n: np.zeros_like(v) for n, v in wide_state.items() if n.startswith("optim/")}
    assert distance(wide_state, half_state, slots) < 0.1


@pytest.mark.parametrize("optimizer", [MUON, ADAMW])
def test_a_step_repeats_to_the_bit(make, optimizer):
    """Long rows of few ids: thousands of gradients are added to each row of the embedding."""
    first, second = (make(model__max_seq_len=600, model__vocab_size=5, **optimizer) for _ in "ab")
    for step in (1, 2):
        batch = random_batch(first.config, rows=3, length=600, seed=step, segments=step == 2)
        hyper = step_hyper(first.config, step, [batch])
        a, b = (backend.train_step([batch], hyper) for backend in (first, second))
        assert [float(x) for x in a.values()] == [float(x) for x in b.values()]
    assert_same_bits(snapshot(first), snapshot(second))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_equals_eager(make, checkpointing):
    """Numbers that change from step to step must not be baked into a compiled function."""
    config = {"model__dropout": 0.2, "train__gradient_checkpointing": checkpointing}
    eager, compiled = make(**config), make(train__compile=True, **config)
    start = {n: np.array(v) for n, v in eager.tensors(optimizer=False)}
    for step in range(1, 5):
        run(eager, 1, first=step, lr_scale=1 / step)
        run(compiled, 1, first=step, lr_scale=1 / step)
    assert distance(snapshot(eager), snapshot(compiled), start) < 1e-4


def test_padding_trains_nothing(make):
    """Ends of rows with weight 0 may hold anything, or be cut off: the step is the same."""
    cut = 9
    padded, filled, shorter = make(), make(), make()
    start = snapshot(padded)
    batch = random_batch(padded.config, rows=3)
    weights = np.where(np.arange(batch.tokens.shape[1]) < cut, 1.0, 0.0).astype(np.float32)
    first = replace(batch, weights=np.broadcast_to(weights, batch.tokens.shape).copy())
    other = replace(first, tokens=first.tokens.copy(), targets=first.targets.copy())
    other.tokens[:, cut:], other.targets[:, cut:] = 1, 2
    alone = replace(
        first, **{n: getattr(first, n)[:, :cut].copy() for n in ("tokens", "targets", "weights")}
    )
    hyper = step_hyper(padded.config, 1, [first])
    loss = float(padded.train_step([first], hyper)["loss"])
    assert float(filled.train_step([other], hyper)["loss"]) == loss
    assert_same_bits(snapshot(padded), snapshot(filled))
    assert float(shorter.train_step([alone], hyper)["loss"]) == pytest.approx(loss, rel=1e-6)
    # The first update of AdamW is nearly a sign, which rounding can turn where a gradient is nearly 0.
    assert distance(snapshot(padded), snapshot(shorter), start) < 5e-3
