"""Parameters, logits, scores and gradients of every backend against the table and the reference."""

from dataclasses import replace

import numpy as np
import pytest

import backends
from core.errors import PippinError
from core.params import Init, ParamSpec, param_specs, slot_specs
from tests.contract.conftest import make_config
from tests.helpers import (
    ArrayCheckpoint,
    assert_same_bits,
    random_batch,
    random_params,
    snapshot,
    step_hyper,
)
from tests.reference import model_np

# Largest |difference| over largest |logit|: 4e-7 was measured; a 1e-3 fault gives 1e-4 and more.
LOGITS_TOLERANCE = 2e-6
# Of a directional derivative, over the norm of the gradient: 2e-6 was measured in float32.
GRADIENT_TOLERANCE = 1e-5
VARIANTS = [
    {},
    {"model__tie_embeddings": False},
    {"model__qk_norm": False, "model__ffn_activation": "gelu", "model__rope_theta": 500.0},
    {"model__n_kv_heads": 4, "model__norm_eps": 1e-2},
    {"model__n_kv_heads": 1, "train__gradient_checkpointing": True},
    {"model__n_experts": 5, "train__router_aux_loss_coef": 3.0},
    {
        "model__n_experts": 3,
        "model__top_k": 3,
        "model__ffn_activation": "gelu",
        "train__gradient_checkpointing": True,
        "train__router_aux_loss_coef": 3.0,
    },
    {"model__n_experts": 4, "model__top_k": 1, "model__tie_embeddings": False},
]


def double(params):
    return {name: value.astype(np.float64) for name, value in params.items()}


def test_tensors_are_the_table(make):
    for optimizer in ("muon", "adamw"):
        backend = make(train__optimizer=optimizer, model__tie_embeddings=False)
        specs = param_specs(backend.config.model)
        wanted = {s.name: s.shape for s in specs}
        assert {n: v.shape for n, v in backend.tensors(optimizer=False)} == wanted
        wanted |= {s.key: s.shape for s in slot_specs(optimizer, specs)}
        found = snapshot(backend)
        assert {n: v.shape for n, v in found.items()} == wanted
        assert {v.dtype for v in found.values()} == {np.dtype(np.float32)}
        assert {n for n, _ in make(mode="infer").tensors()} < set(wanted)


def test_differing_table_is_refused(backend_name):
    config = make_config(backend_name)
    specs = list(param_specs(config.model))
    specs[3] = replace(specs[3], shape=(7, 24))
    specs.append(ParamSpec("extra.weight", (3,), "vector", Init("ones")))
    with pytest.raises(PippinError) as caught:
        backends.load(backend_name)(config, specs, mode="train")
    assert caught.value.code == "P503"
    assert specs[3].name in caught.value.found and "extra.weight" in caught.value.found


def test_load_restores_bits_and_refuses_other_shapes(make):
    backend = make()
    params = random_params(param_specs(backend.config.model), seed=5)
    backend.load(ArrayCheckpoint(backend.config, params))
    assert_same_bits(params, {n: np.array(v) for n, v in backend.tensors(optimizer=False)})
    params["norm.weight"] = np.ones(3, np.float32)
    with pytest.raises(PippinError) as caught:
        backend.load(ArrayCheckpoint(backend.config, params))
    assert caught.value.code == "P304"


def test_load_reads_bfloat16_bits(backend_name):
    config = make_config(backend_name)
    name = "layers.1.mlp.up_proj.weight"
    specs = [
        replace(s, dtype="bfloat16") if s.name == name else s for s in param_specs(config.model)
    ]
    params = random_params(specs)
    bits = (params[name].view(np.uint32) >> 16).astype(np.uint16)
    backend = backends.load(backend_name)(config, specs, mode="infer")
    backend.load(ArrayCheckpoint(config, {**params, name: bits}))
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    assert_same_bits({name: rounded}, {name: snapshot(backend)[name]})


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize("segments", [False, True])
def test_logits_and_scores_equal_the_reference(make, overrides, segments):
    backend = make(mode="infer", **overrides)
    config = backend.config
    params = random_params(param_specs(config.model))
    batch = random_batch(config, segments=segments)
    wanted = model_np.logits(double(params), batch.tokens, config.model, segments=batch.segments)
    found = backend.logits(batch.tokens, batch.segments)
    assert found.dtype == np.float32 and found.shape == (2, 13, 61)
    assert abs(found - wanted).max() < LOGITS_TOLERANCE * abs(wanted).max()
    scores = backend.score(batch)
    assert scores.nll.dtype == np.float32 and scores.hit.dtype == np.bool_
    nll = model_np.token_nll(wanted, batch.targets)
    assert abs(scores.nll - nll).max() < LOGITS_TOLERANCE * abs(wanted).max()
    assert np.array_equal(scores.hit, wanted.argmax(-1) == batch.targets)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_gradients_equal_the_reference(make, overrides):
    """AdamW's first moment after one step from zero is (1 - beta1) times the gradient."""
    backend = make(train__optimizer="adamw", model__dropout=0.3, **overrides)
    config = backend.config
    params = double(random_params(param_specs(config.model)))
    batch = random_batch(config, segments=True, row0=3)
    hyper = step_hyper(config, 1, [batch], max_grad_norm=0.0)
    metrics = backend.train_step([batch], hyper)
    total = hyper.normalizer

    def losses(p):
        return model_np.losses(p, batch, config.model, normalizer=total, seed=config.train.seed)

    def loss(p):
        nll, aux = losses(p)
        return nll + config.train.router_aux_loss_coef * aux

    nll, aux = losses(params)
    assert abs(float(metrics["loss"]) - nll) < 2e-6 * nll
    assert abs(float(metrics.get("aux_loss", 0.0)) - aux) <= 2e-6 * aux
    state = snapshot(backend)
    rng = np.random.default_rng(2)
    for name, value in params.items():
        grad = state[f"optim/exp_avg/{name}"].astype(np.float64) / (1 - config.train.beta1)
        for _ in range(2):
            way = rng.standard_normal(value.shape)
            h = 1e-5 / np.linalg.norm(way)
            high, low = ({**params, name: value + s * h * way} for s in (1, -1))
            slope = (loss(high) - loss(low)) / (2 * h)
            bound = GRADIENT_TOLERANCE * np.linalg.norm(grad) * np.linalg.norm(way)
            assert np.linalg.norm(grad) > 0, name
            assert abs((grad * way).sum() - slope) < bound, name


def test_no_token_sees_a_later_one(make):
    for precision in ("float32", "bfloat16", "float16"):
        backend = make(train__precision=precision)
        tokens = random_batch(backend.config).tokens
        changed = tokens.copy()
        changed[:, 8] = (changed[:, 8] + 1) % 61
        before, after = backend.logits(tokens), backend.logits(changed)
        assert np.array_equal(before[:, :8], after[:, :8])
        assert not np.array_equal(before[:, 8:], after[:, 8:])


def test_segments_are_isolated(make):
    backend = make()
    tokens = random_batch(backend.config).tokens
    segments = np.repeat(np.array([[0] * 5 + [1] * 8], np.int32), 2, axis=0)
    changed = tokens.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 61
    before, after = backend.logits(tokens, segments), backend.logits(changed, segments)
    assert np.array_equal(before[:, 5:], after[:, 5:])
    alone = backend.logits(tokens[:, 5:])
    # Rotary positions are relative, so the second document is what it is alone.
    assert abs(before[:, 5:] - alone).max() < 1e-5 * abs(alone).max()
    assert abs(before - backend.logits(tokens)).max() > 1e-3


@pytest.mark.parametrize("bad", [-1, 61])
def test_token_out_of_range_is_refused(make, bad):
    backend = make()
    batch = random_batch(backend.config)
    tokens = batch.tokens.copy()
    tokens[1, 4] = bad
    hyper = step_hyper(backend.config, 1, [batch])
    cache = backend.start(2, 20)
    calls = [
        lambda: backend.train_step([batch, replace(batch, tokens=tokens)], hyper),
        lambda: backend.train_step([replace(batch, targets=tokens)], hyper),
        lambda: backend.score(replace(batch, tokens=tokens)),
        lambda: backend.logits(tokens),
        lambda: backend.decode(tokens, np.array([13, 13], np.int32), cache),
    ]
    before = snapshot(backend)
    for call in calls:
        with pytest.raises(PippinError) as caught:
            call()
        assert caught.value.code == "P204"
    assert_same_bits(before, snapshot(backend))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(make, precision):
    batch = random_batch(make().config)
    wide = make().logits(batch.tokens)
    for mode in ("train", "infer"):
        half = make(mode=mode, train__precision=precision).logits(batch.tokens)
        assert half.dtype == np.float32
        # bfloat16 keeps 8 bits: 1.2e-2 of the largest logit was measured.
        assert 0 < abs(half - wide).max() < 4e-2 * abs(wide).max()


def test_device_info_and_memory(make, backend_name):
    backend = make()
    info, memory = backend.device_info(), backend.memory(reset_peak=True)
    assert info.backend == backend.name == backend_name
    assert info.framework.split()[0] in ("torch", "mlx") and info.device
    for value in (memory.active_bytes, memory.peak_bytes, memory.cached_bytes):
        assert value is None or value >= 0
    values = np.arange(3.0)
    assert np.array_equal(backend.sum_across(values), values)
    backend.synchronize()
    backend.close()
