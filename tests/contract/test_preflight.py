"""A run whose attention sees the future is refused, on every backend and in both modes.

Run: python -m pytest tests/contract/test_preflight.py
"""

import importlib

import numpy as np
import pytest

import backends
from core.backend import Batch
from core.checkpoint import initial_checkpoint
from core.config.load import load
from core.errors import PippinError
from core.params import param_specs
from core.paths import CONFIGS_DIR
from core.training import preflight
from tests.contract.conftest import NAMES
from tests.fake_mps import create_fake_mps, fake_mps_memory
from tests.helpers import tiny_config


@pytest.fixture(autouse=True)
def counters(request, monkeypatch):
    if "fake_mps" in request.node.name:
        fake_mps_memory(monkeypatch)


def make(name, **overrides):
    fake = name == "fake_mps"
    config = tiny_config(train__backend="mps" if fake else name, **overrides)
    specs = param_specs(config.model)
    create = create_fake_mps if fake else backends.load(name)
    backend = create(config, specs, mode="train")
    meta = initial_checkpoint(config, specs).meta
    backend.load(preflight.ProbeCheckpoint(meta, specs))
    rng = np.random.default_rng(3)
    shape = (1, config.data.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
    targets = rng.integers(0, config.model.vocab_size, shape, np.int32)
    return config, specs, backend, Batch(tokens, targets, np.ones(shape, np.float32))


def remove_mask(name, monkeypatch, mode="both"):
    """Let attention see every key: everywhere, or in one mode only."""
    if name == "mlx":
        mx = importlib.import_module("mlx.core")
        real = mx.fast.scaled_dot_product_attention
        monkeypatch.setattr(
            mx.fast,
            "scaled_dot_product_attention",
            lambda q, k, v, *, scale, mask=None: real(q, k, v, scale=scale, mask=None),
        )
        return
    torch = importlib.import_module("torch")
    functional = torch.nn.functional
    fused = functional.scaled_dot_product_attention

    def wrong():
        return mode == "both" or (mode == "training") == torch.is_grad_enabled()

    def unmasked(*args, is_causal=False, attn_mask=None, **kwargs):
        if wrong():
            return fused(*args, **kwargs)
        return fused(*args, is_causal=is_causal, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", unmasked)
    if name in ("mps", "fake_mps"):
        remove_bias(monkeypatch, wrong)


def remove_bias(monkeypatch, wrong):
    """The same for MPS, which has kernels of its own: one block that covers all keys, no mask."""
    policy = importlib.import_module("backends.torch_mps.policy")
    prepare = policy.MpsPolicy.prepare_mask

    def unmasked(self, mask, length):
        bias = prepare(self, mask, length)
        return bias * 0 if wrong() and bias is not None else bias

    monkeypatch.setattr(policy, "MIN_BLOCK", 1 << 20)
    monkeypatch.setattr(policy.MpsPolicy, "prepare_mask", unmasked)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_sound_backend_passes_even_with_outputs_that_start_at_zero(name, tied):
    config, specs, backend, row = make(
        name,
        model__tie_embeddings=tied,
        model__zero_init_outputs=not tied,
        model__embed_init_std=0.02 if tied else 1.0,
    )
    vocab = config.model.vocab_size
    found = preflight.causality(backend, row, vocab_size=vocab, precision="float32")
    assert found.scoring <= 1e-5 and found.training <= 1e-6
    backend.load(initial_checkpoint(config, specs))
    loss = preflight.first_loss(backend, row, vocab_size=vocab, fresh=True)
    assert abs(loss - np.log(vocab)) < 0.1 * np.log(vocab)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_mask_is_refused(name, monkeypatch):
    remove_mask(name, monkeypatch)
    config, _, backend, row = make(name)
    with pytest.raises(PippinError) as info:
        preflight.causality(backend, row, vocab_size=config.model.vocab_size, precision="float32")
    assert info.value.code == "P402" and "sees the future" in info.value.render()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlx"])
@pytest.mark.parametrize("mode", ["training", "scoring"])
def test_a_mask_that_is_missing_in_one_mode_only_is_refused_there(name, monkeypatch, mode):
    remove_mask(name, monkeypatch, mode)
    config, _, backend, row = make(name)
    with pytest.raises(PippinError) as info:
        preflight.causality(backend, row, vocab_size=config.model.vocab_size, precision="float32")
    assert f"in {mode} mode" in info.value.what


def test_a_first_loss_that_cannot_be_is_refused():
    config, specs, backend, row = make("cpu", model__embed_init_std=1.0, model__init_std=1.0)
    backend.load(initial_checkpoint(config, specs))
    for fresh, word in ((True, "within 10 %"), (False, "below 1.5 times")):
        with pytest.raises(PippinError) as info:
            preflight.first_loss(backend, row, vocab_size=config.model.vocab_size, fresh=fresh)
        assert word in info.value.what


@pytest.mark.parametrize("length", [2, 3, 13, 33, 34, 64, 257])
def test_the_changed_tokens_lie_inside_and_past_a_blocks_edge(length):
    where = preflight.positions(length)
    assert where and all(0 < p < length for p in where)
    if length > preflight.BLOCK + 1:
        assert preflight.BLOCK + 1 in where and length // 2 in where and length - 2 in where


def _preset_settings():
    """Each combination of settings that presets have, by one preset that has it."""
    found = {}
    for path in sorted(CONFIGS_DIR.glob("*.yaml")):
        values = load(config=path.stem).values
        keys = ("model.tie_embeddings", "model.qk_norm", "model.rope_theta")
        found.setdefault(tuple(values[k] for k in keys), path.stem)
    return sorted(found.values())


@pytest.mark.parametrize("preset", _preset_settings())
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_passes(preset, name):
    """Each preset's own architecture settings, at a small size."""
    values = load(config=preset).values
    tied = bool(values["model.tie_embeddings"])
    config, specs, backend, row = make(
        name,
        model__tie_embeddings=tied,
        model__qk_norm=values["model.qk_norm"],
        model__embed_init_std=0.02 if tied else 1.0,
        model__zero_init_outputs=not tied,
        model__rope_theta=values["model.rope_theta"],
    )
    vocab = config.model.vocab_size
    preflight.causality(backend, row, vocab_size=vocab, precision="float32")
    backend.load(initial_checkpoint(config, specs))
    preflight.first_loss(backend, row, vocab_size=vocab, fresh=True)
