"""Self-tests of what a model computes: nothing sees the future, and the numbers are float64's."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from core.backend import Backend, Batch
from core.config.schema import RunConfig
from core.errors import PippinError
from core.params import param_specs
from core.training.verification import reference
from core.training.verification.bench import (
    LENGTH,
    Bench,
    batch_of,
    gradients,
    hyper_of,
    relative,
    running,
    setting,
    weighted,
    weights_of,
    with_token,
)
from core.training.verification.report import Check, measured, worst

PRECISIONS = ("float32", "bfloat16", "float16")
# A leak moves logits by their own size; rounding of another path by far less.
LEAK = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
# A mean over positions hides most of a leak.
LEAK_IN_LOSS = {name: value / 100 for name, value in LEAK.items()}
# Of logits over the largest logit. Measured on a 2-core x86-64 in November 2026 (torch 2.13 and MLX
# 0.32, CPU): 4e-7, 8e-3, 1e-3; other hardware gets several times that.
FORWARD = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 6e-3}
# A loss of about 5 nats in float32.
LOSS = 2e-5
# A gradient of float32 against central differences.
GRADIENT = 1e-4
# Gradients of float32 against each other.
GROUPED = 1e-5
POSITIONS = (33, 48, LENGTH - 2)
BROKEN = "this backend computes something else here: train with --backend cpu, and report it"
LEAKS = (
    "attention sees the future here, and a validation loss would be too good: update torch or MLX, "
    "or train with --backend cpu or train.precision=float32"
)


def causal(bench: Bench) -> Iterator[Check]:
    """A changed token moves nothing before it: without gradients, decoding, and in training."""
    for precision in PRECISIONS[:1] if bench.quick else PRECISIONS:
        config = setting(bench, train__precision=precision)
        try:
            with running(bench, config) as backend:
                scoring, training = _leaks(backend, config)
        except PippinError as error:
            if error.code != "P502" or precision == "float32":
                raise
            yield Check(bench.group, f"{precision}", "skipped", error.what)
            continue
        yield measured(
            bench.group,
            f"no leak without gradients, {precision}",
            scoring,
            LEAK[precision],
            remedy=LEAKS,
        )
        yield measured(
            bench.group,
            f"no leak in training, {precision}",
            training,
            LEAK_IN_LOSS[precision],
            remedy=LEAKS,
        )


def _leaks(backend: Backend, config: RunConfig) -> tuple[float, float]:
    batch, vocab = batch_of(config), config.model.vocab_size
    scoring, training = [], []
    logits, nll = backend.logits(batch.tokens), backend.score(batch).nll
    for position in POSITIONS:
        tokens = with_token(batch.tokens, position, vocab)
        changed = Batch(tokens, batch.targets, batch.weights)
        scoring.append(relative(backend.logits(tokens)[:, :position], logits[:, :position]))
        scoring.append(relative(backend.score(changed).nll[:, :position], nll[:, :position]))
        before = [weighted(b, position) for b in (batch, changed)]
        losses = [float(backend.train_step([b], hyper_of(b))["loss"]) for b in before]
        training.append(relative(losses[1], losses[0]))
    return worst(scoring), worst(training)


def against_float64(bench: Bench) -> Iterator[Check]:
    """Logits, plain, of packed rows and of decoding with a cache, against numpy."""
    for precision in PRECISIONS[:1] if bench.quick else PRECISIONS:
        config = setting(bench, train__precision=precision)
        batch = batch_of(config, packed=True)
        exact = _exact(config)
        plain = reference.logits(exact, batch.tokens, config.model)
        packed = reference.logits(exact, batch.tokens, config.model, segments=batch.segments)
        try:
            with running(bench, config) as backend:
                found = {
                    "attention": relative(backend.logits(batch.tokens), plain),
                    "attention of packed rows": relative(
                        backend.logits(batch.tokens, batch.segments), packed
                    ),
                    "decoding with a cache": relative(_decoded(backend, batch), plain),
                }
        except PippinError as error:
            if error.code != "P502" or precision == "float32":
                raise
            continue  # said by `causal`
        for name, value in found.items():
            yield measured(
                bench.group, f"{name}, {precision}", value, FORWARD[precision], remedy=BROKEN
            )


def _exact(config: RunConfig) -> dict[str, NDArray[np.float64]]:
    tensors = weights_of(param_specs(config.model))
    return {name: value.astype(np.float64) for name, value in tensors.items()}


def _decoded(backend: Backend, batch: Batch) -> NDArray[np.float32]:
    """The logits of all positions, computed in pieces: a prompt that is short, then few and single."""
    rows, length = batch.tokens.shape
    out = []
    for end in (1, 2, 35, length):  # the last token of prompts of several lengths
        cache = backend.start(rows, length)
        lengths = np.full(rows, end, np.int32)
        out.append((end - 1, backend.decode(batch.tokens[:, :end].copy(), lengths, cache)))
    cache = backend.start(rows, length)
    backend.decode(batch.tokens[:, :30].copy(), np.full(rows, 30, np.int32), cache)
    for at in range(30, length):
        one = batch.tokens[:, at : at + 1].copy()
        out.append((at, backend.decode(one, np.ones(rows, np.int32), cache)))
    # Positions that are not decoded are those of the plain pass, which has its own check.
    found: NDArray[np.float32] = backend.logits(batch.tokens).copy()
    for at, logits in out:
        found[:, at] = logits
    return found


def grouped_heads(bench: Bench) -> Iterator[Check]:
    """Two key/value heads for four query heads equal four heads of which two are copies."""
    few = setting(bench)
    many = setting(bench, model__n_kv_heads=few.model.n_heads)
    grouped = weights_of(param_specs(few.model))
    copies, width = few.model.n_heads // few.model.n_kv_heads, few.model.head_dim
    expanded = dict(grouped)
    names = [n for n in grouped if n.endswith(("k_proj.weight", "v_proj.weight"))]
    for name in names:
        heads = grouped[name].reshape(few.model.n_kv_heads, width, -1)
        expanded[name] = np.repeat(heads, copies, axis=0).reshape(-1, heads.shape[-1])
    batch = batch_of(few)
    with running(bench, few, grouped) as a, running(bench, many, expanded) as b:
        forward = relative(a.logits(batch.tokens), b.logits(batch.tokens))
    ga, _ = gradients(bench, few, batch, grouped)
    gb, _ = gradients(bench, many, batch, expanded)
    backward = []
    for name, g in ga.items():
        other = gb[name]
        if name in names:
            parts = other.reshape(few.model.n_kv_heads, copies, width, -1)
            other = parts.sum(1).reshape(g.shape)
        backward.append(relative(g, other))
    name = "grouped heads equal expanded"
    yield measured(bench.group, f"{name}, forward", forward, GROUPED, remedy=BROKEN)
    yield measured(bench.group, f"{name}, gradients", worst(backward), GROUPED, remedy=BROKEN)


def large_vocabulary(bench: Bench) -> Iterator[Check]:
    """The loss in chunks equals the whole one, and rows of a large table are found and trained."""
    vocab, rows, length = (131_072, 8, 512) if bench.is_gpu else (32_003, 3, 64)
    config = setting(
        bench,
        model__vocab_size=vocab,
        model__n_layers=1,
        model__d_model=16,
        model__n_heads=1,
        model__n_kv_heads=1,
        model__head_dim=16,
        model__d_ff=16,
        model__max_seq_len=length,
        data__seq_len=length,
    )
    batch = batch_of(config, rows=rows, length=length)
    batch.tokens[:, :4] = [0, vocab - 1, vocab - 1, vocab // 2]  # the edges, and one twice
    with running(bench, config) as backend:
        scores = backend.score(batch).nll.astype(np.float64)
        weights = batch.weights.astype(np.float64)
        chunked = float(backend.train_step([batch], hyper_of(batch))["loss"])
        edges = batch.tokens[:1, :4].copy()
        whole = backend.logits(edges)
    exact = _exact(config)
    expected = reference.logits(exact, edges, config.model)
    mean = float((weights * scores).sum() / weights.sum())
    group = bench.group
    yield measured(
        group, "loss in chunks against scores", relative(chunked, mean), LOSS, remedy=BROKEN
    )
    if not bench.is_gpu:  # 0.5 G logits in float64 are too many there
        z = reference.logits(exact, batch.tokens, config.model)
        error = relative(scores, reference.token_nll(z, batch.targets))
        yield measured(group, "loss in chunks against float64", error, LOSS, remedy=BROKEN)
    name, error = f"lookup in {vocab:,} rows", relative(whole, expected)
    yield measured(group, name, error, FORWARD["float32"], remedy=BROKEN)
    few = batch_of(config, rows=3, length=64)
    few.tokens[:, :4] = batch.tokens[:3, :4]
    grads, _ = gradients(bench, config, few)
    error = _lookup_gradient(config, few, grads["embed_tokens.weight"])
    yield measured(group, f"{name}, gradient", error, GRADIENT, remedy=BROKEN)


def _lookup_gradient(config: RunConfig, batch: Batch, grad: NDArray[np.float64]) -> float:
    """Rows that were not looked up have no gradient; the last one, looked up often, float64's."""
    absent = np.setdiff1d(np.arange(config.model.vocab_size), batch.tokens)
    stray = float(np.abs(grad[absent]).max())
    row = config.model.vocab_size - 1
    return max(stray, _row_error(config, batch, row, grad[row]))


def _row_error(config: RunConfig, batch: Batch, row: int, grad: NDArray[np.float64]) -> float:
    exact, size = _exact(config), 1e-4
    table = exact["embed_tokens.weight"]
    direction = grad / max(float(np.sqrt((grad * grad).sum())), 1e-30)
    losses = []
    for sign in (1.0, -1.0):
        moved = table.copy()
        moved[row] += sign * size * direction
        losses.append(reference.loss(exact | {"embed_tokens.weight": moved}, batch, config.model))
    slope = (losses[0] - losses[1]) / (2 * size)
    return relative(float((grad * direction).sum()), slope)
