"""What is particular to the MLX backend; what every backend must do is in tests/contract.

Run: pytest tests/unit/test_mlx_backend.py
"""

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import backends
from backends.mlx.backend import MlxBackend
from backends.mlx.blocks import DecoderLayer
from core.backend import Batch
from core.errors import PippinError
from core.params import param_specs
from tests.helpers import (
    ArrayCheckpoint,
    assert_same_bits,
    random_batch,
    random_params,
    snapshot,
    split_batch,
    step_hyper,
    tiny_config,
)


def build(mode: str = "train", **overrides: Any) -> MlxBackend:
    config = tiny_config(train__backend="mlx", **overrides)
    specs = param_specs(config.model)
    backend = backends.load("mlx")(config, specs, mode=mode)  # type: ignore[arg-type]
    backend.load(ArrayCheckpoint(config, random_params(specs)))
    assert isinstance(backend, MlxBackend)
    return backend


def step(backend: MlxBackend, number: int, batches: list[Batch], **kw: Any) -> dict[str, float]:
    metrics = backend.train_step(batches, step_hyper(backend.config, number, batches, **kw))
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("segments", [False, True])
def test_checkpointing_changes_no_bit(tied: bool, segments: bool) -> None:
    """With dropout, whose masks are made again in the backward pass (pitfall X37)."""
    kw = {"model__dropout": 0.3, "model__tie_embeddings": tied}
    plain, again = build(**kw), build(train__gradient_checkpointing=True, **kw)
    batch = random_batch(plain.config, rows=3, segments=segments)
    for number in (1, 2):
        assert step(plain, number, [batch]) == step(again, number, [batch])
    assert_same_bits(snapshot(plain), snapshot(again))


def test_checkpointing_runs_each_block_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[DecoderLayer] = []
    forward = DecoderLayer.__call__

    def counting(self: DecoderLayer, *args: Any) -> mx.array:
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", counting)
    for checkpointing, runs in ((False, 1), (True, 2)):
        backend = build(train__gradient_checkpointing=checkpointing)
        batch = random_batch(backend.config)
        calls.clear()
        step(backend, 1, [batch])
        assert len(calls) == runs * backend.config.model.n_layers
        calls.clear()
        backend.score(batch)
        assert len(calls) == backend.config.model.n_layers


def test_a_compiled_step_keeps_no_number() -> None:
    """Rates, momentum, normalizer, clip, step, keys and tokens all enter as arrays (pitfall X7)."""
    kw = {"model__dropout": 0.3, "model__n_layers": 1, "train__gradient_checkpointing": True}
    plain, compiled = build(**kw), build(train__compile=True, **kw)
    for number in range(1, 5):
        batch = replace(random_batch(plain.config, seed=number), row0=3 * number)
        batches = split_batch(batch, 1 + number % 2)  # the whole step, and the split one
        changes: dict[str, Any] = {"lr_scale": 1 / number, "max_grad_norm": 0.3 * (number % 3)}
        hyper = step_hyper(plain.config, number, [batch], **changes)
        hyper = replace(hyper, momentum=0.8 + 0.03 * number)
        for backend in (plain, compiled):
            backend.train_step(batches, hyper)
    a, b = snapshot(plain), snapshot(compiled)
    for name in a:
        np.testing.assert_allclose(b[name], a[name], atol=2e-6 * np.abs(a[name]).max() + 1e-7)
    before = snapshot(compiled)
    assert step(compiled, 5, [batch], normalizer=0.0)["skipped_total"] == 0
    assert_same_bits(snapshot(compiled), before)
    poison = replace(batch, weights=np.full_like(batch.weights, np.nan))
    assert step(compiled, 5, [poison], normalizer=1.0)["skipped_in_a_row"] == 1
    assert_same_bits(snapshot(compiled), before)


def test_steps_leave_nothing_behind() -> None:
    """Graphs that are not evaluated would grow (pitfall X2)."""
    backend = build()
    # Arrays in buffers that were kept count with the size of the buffer.
    kept = mx.set_cache_limit(0)
    parts = split_batch(random_batch(backend.config, rows=4), 4)
    used = []
    for number in range(1, 13):
        backend.train_step(parts, step_hyper(backend.config, number, parts))
        gc.collect()
        used.append(backend.memory().active_bytes)
    mx.set_cache_limit(kept)
    assert used[2] == used[-1]


def test_closing_gives_the_memory_back() -> None:
    gc.collect()
    before = mx.get_active_memory()
    backend = build(model__d_model=240)
    held = mx.get_active_memory() - before
    backend.close()
    assert mx.get_active_memory() - before < 0.02 * held


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_with_float32_masters(precision: str) -> None:
    backend = build(train__precision=precision)
    batch = random_batch(backend.config)
    losses = [step(backend, number, [batch])["loss"] for number in range(1, 16)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    assert backend.backend_state()["skipped_total"] == 0
    assert all(x.dtype == mx.float32 for x in backend._params.values())
    full = build()
    exact = full.logits(batch.tokens)
    assert 0 < np.abs(build(train__precision=precision).logits(batch.tokens) - exact).max() < 0.5


def test_inference_keeps_matrices_in_the_compute_dtype() -> None:
    kw = {"train__precision": "bfloat16"}
    light, full = build(mode="infer", **kw), build(**kw)
    dtypes = {name: x.dtype for name, x in light._params.items()}
    assert dtypes["layers.0.mlp.up_proj.weight"] == dtypes["embed_tokens.weight"] == mx.bfloat16
    assert dtypes["norm.weight"] == mx.float32
    tokens = random_batch(full.config).tokens
    np.testing.assert_array_equal(light.logits(tokens), full.logits(tokens))
    with pytest.raises(PippinError, match="P001"):
        step(light, 1, [random_batch(full.config)])


def test_every_difference_from_the_table_is_listed() -> None:
    config = tiny_config(train__backend="mlx")
    specs = list(param_specs(config.model))
    specs[1] = replace(specs[1], shape=(25,))
    removed, specs[2] = specs[2], replace(specs[2], name="layers.0.extra.weight")
    with pytest.raises(PippinError) as caught:
        backends.load("mlx")(config, specs, mode="train")
    assert caught.value.code == "P503"
    for name in (specs[1].name, removed.name, "layers.0.extra.weight"):
        assert name in caught.value.found


def test_padding_never_overwrites_a_full_row() -> None:
    """Rows that are padded up to the end of the cache beside one that fills it."""
    backend = build()
    tokens = random_batch(backend.config, rows=2, length=6).tokens
    cache = backend.start(2, 6)
    backend.decode(tokens[:, :2], np.array([2, 1], np.int32), cache)
    found = backend.decode(tokens[:, 2:6], np.array([4, 1], np.int32), cache)
    full = backend.logits(tokens[:1])[0, -1]
    np.testing.assert_allclose(found[0], full, atol=1e-5 * np.abs(full).max())
    other = np.concatenate([tokens[1, :1], tokens[1, 2:3]])[None]
    short = backend.logits(other)[0, -1]
    np.testing.assert_allclose(found[1], short, atol=1e-5 * np.abs(short).max())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_cannot_be_evaluated_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, parts: int
) -> None:
    backend, same = (build(train__compile=compiled) for _ in range(2))
    batches = split_batch(random_batch(backend.config), parts)
    for each in (backend, same):
        step(each, 1, batches)
    before, state = snapshot(backend), backend.backend_state()
    evaluate, calls = mx.eval, []

    def failing(*arrays: Any) -> None:
        calls.append(len(calls))
        if len(calls) == parts + (parts > 1):  # the last of the step
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", failing)
    with pytest.raises(PippinError, match="P101"):
        step(backend, 2, batches)
    monkeypatch.setattr(mx, "eval", evaluate)
    assert_same_bits(before, snapshot(backend))
    assert backend.backend_state() == state
    for each in (backend, same):
        step(each, 2, batches)
    assert_same_bits(snapshot(backend), snapshot(same))


def test_scores_beyond_metals_largest_buffer_are_refused() -> None:
    backend = build()
    batch = random_batch(backend.config, rows=2)
    row_bytes = 4 * backend.config.model.n_heads * batch.tokens.shape[1] ** 2
    backend._largest_buffer = 2 * row_bytes
    step(backend, 1, [batch])
    backend._largest_buffer = 2 * row_bytes - 1
    with pytest.raises(PippinError, match="P101") as caught:
        step(backend, 2, [batch])
    assert "train.micro_batch_size=1" in caught.value.remedy
    backend._largest_buffer = row_bytes - 1
    with pytest.raises(PippinError, match="P101") as caught:
        step(backend, 2, [batch])
    assert "data.seq_len" in caught.value.remedy


def test_what_went_wrong_in_a_step_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build()
    batch = random_batch(backend.config)

    def fail(text: str, kind: type[Exception] = RuntimeError) -> None:
        def raising(*_: Any) -> None:
            raise kind(text)

        monkeypatch.setattr(backend, "_whole", raising)

    for text in (
        "[metal::malloc] Attempting to allocate 9 bytes",
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ):
        fail(text)
        with pytest.raises(PippinError, match="P101"):
            step(backend, 1, [batch])
    fail("std::bad_alloc", MemoryError)
    with pytest.raises(PippinError, match="P101"):
        step(backend, 1, [batch])
    fail("no kernel")
    with pytest.raises(RuntimeError, match="no kernel"):
        step(backend, 1, [batch])


def test_a_compiler_that_fails_at_a_later_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the preflight checks is compiled before the batches of the run."""
    backend = build(train__compile=True)
    row, batch = (random_batch(backend.config, rows=n) for n in (1, 2))
    step(backend, 1, [row])
    whole = backend._whole

    def failing(*args: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(backend, "_whole", failing)
    with pytest.raises(PippinError, match="P502"):
        step(backend, 2, [batch])
    with pytest.raises(RuntimeError, match="no kernel"):
        step(backend, 2, [row])
    monkeypatch.setattr(backend, "_whole", whole)
    step(backend, 2, [batch])
    monkeypatch.setattr(backend, "_whole", failing)
    with pytest.raises(RuntimeError, match="no kernel"):
        step(backend, 3, [batch])
