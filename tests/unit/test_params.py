"""The parameter table: shapes, groups, counts, and initial values that never change.

Run: python -m pytest tests/unit/test_params.py
"""

import hashlib

import numpy as np
import pytest

from core.params import (
    Init,
    ParamSpec,
    initial_values,
    num_active_parameters,
    num_matmul_parameters,
    num_parameters,
    param_specs,
    slot_specs,
    uses_muon,
)
from tests.helpers import tiny_config


def model(**kwargs):
    return tiny_config(**{f"model__{k}": v for k, v in kwargs.items()}).model


def test_counts_of_a_known_architecture():
    # Qwen3-like, d 768, 12 layers, tied, d_ff 3072, V 32000: counted by hand.
    m = model(
        vocab_size=32000,
        d_model=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        head_dim=64,
        d_ff=3072,
        tie_embeddings=True,
        qk_norm=False,
        embed_init_std=0.02,
        zero_init_outputs=False,
    )
    assert num_parameters(param_specs(m)) == 137_841_408  # the seed project's own figure
    untied = m.model_copy(update={"tie_embeddings": False})
    assert num_parameters(param_specs(untied)) == 137_841_408 + 32000 * 768
    assert num_matmul_parameters(param_specs(m)) == num_matmul_parameters(param_specs(untied))


def test_names_are_those_of_hugging_face_without_the_prefix():
    names = [s.name for s in param_specs(model(n_layers=1, tie_embeddings=False, qk_norm=True))]
    assert names == [
        "embed_tokens.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight",
        "layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.k_norm.weight",
        "layers.0.self_attn.o_proj.weight",
        "layers.0.post_attention_layernorm.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "norm.weight",
        "lm_head.weight",
    ]


def test_a_tied_head_is_one_row_and_says_so():
    tied = param_specs(model(tie_embeddings=True))
    assert tied[0].tied_to == "lm_head.weight" and tied[-1].name == "norm.weight"
    assert param_specs(model(tie_embeddings=False))[0].tied_to is None


def test_slots_follow_the_optimizer():
    specs = param_specs(model(n_layers=1))
    muon = {s.key for s in slot_specs("muon", specs)}
    assert "optim/momentum/layers.0.mlp.up_proj.weight" in muon
    assert "optim/exp_avg_sq/embed_tokens.weight" in muon
    assert "optim/momentum/embed_tokens.weight" not in muon
    adamw = slot_specs("adamw", specs)
    assert len(adamw) == 2 * len(specs) and {s.slot for s in adamw} == {"exp_avg", "exp_avg_sq"}


def test_initial_values_are_a_normal_of_the_asked_width():
    x = initial_values(ParamSpec("a", (600, 500), "matrix", Init("normal", 0.02)), 1) / 0.02
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((np.abs(x) < sigmas).mean() - share) < 0.006  # twelve uniforms: a little flat


def test_initial_values_depend_on_name_and_seed_and_not_on_the_block_size(monkeypatch):
    spec = ParamSpec("a", (37, 11), "matrix", Init("normal", 1.0))
    base = initial_values(spec, 1)
    assert not np.array_equal(base, initial_values(spec, 2))
    other = ParamSpec("b", (37, 11), "matrix", Init("normal", 1.0))
    assert not np.array_equal(base, initial_values(other, 1))
    monkeypatch.setattr("core.params._BLOCK", 13)
    assert np.array_equal(base, initial_values(spec, 1))


@pytest.mark.parametrize(
    ("seed", "digest"),
    [
        (1, "897b5d6eff9fc761"),
        (2, "652924a60b6f8d4e"),
    ],
)
def test_golden_initial_values(seed, digest):
    """The same bits on every machine, numpy and Python: never update this hash."""
    spec = ParamSpec("layers.0.mlp.up_proj.weight", (96, 64), "matrix", Init("normal", 0.02))
    raw = initial_values(spec, seed).astype("<f4").tobytes()
    assert hashlib.sha256(raw).hexdigest()[:16] == digest


def test_outputs_start_at_zero_where_asked():
    specs = {s.name: s for s in param_specs(model(zero_init_outputs=True, tie_embeddings=False))}
    for name in ("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj", "lm_head"):
        assert not initial_values(specs[name + ".weight"], 1).any()
    scaled = {s.name: s for s in param_specs(model(zero_init_outputs=False, n_layers=2))}
    assert scaled["layers.0.self_attn.o_proj.weight"].init.std == pytest.approx(0.01)


QWEN3_30B_A3B = {
    "vocab_size": 151_936,
    "n_layers": 48,
    "d_model": 2048,
    "n_heads": 32,
    "n_kv_heads": 4,
    "head_dim": 128,
    "d_ff": 768,
    "n_experts": 128,
    "top_k": 8,
    "tie_embeddings": False,
    "qk_norm": True,
}


def test_counts_of_experts_are_those_of_a_published_model():
    """Its card: 30.5 B in total, 29.9 B without embeddings, 3.3 B activated, of 128 experts 8."""
    specs = param_specs(model(**QWEN3_30B_A3B))
    embeddings = 151_936 * 2048
    assert round(num_parameters(specs) / 1e9, 1) == 30.5
    assert round((num_parameters(specs) - 2 * embeddings) / 1e9, 1) == 29.9
    assert int(num_active_parameters(specs) / 1e8) == 33


def test_counts_of_experts_by_hand():
    m = model(n_layers=1, n_experts=4, top_k=3)
    dense, mixed = param_specs(model(n_layers=1)), param_specs(m)
    mlp, router = 3 * m.d_ff * m.d_model, 4 * m.d_model
    assert num_parameters(mixed) == num_parameters(dense) + 3 * mlp + router
    assert num_active_parameters(mixed) == num_parameters(dense) + 2 * mlp + router
    assert num_matmul_parameters(mixed) == num_matmul_parameters(dense) + 2 * mlp + router
    assert num_active_parameters(dense) == num_parameters(dense)


def test_rows_of_experts():
    m = model(n_layers=2, n_experts=4, top_k=2)
    specs = {s.name: s for s in param_specs(m)}
    router = specs["layers.1.mlp.gate.weight"]
    assert router.shape == (4, m.d_model) and router.group == "router"
    assert not uses_muon(router, "muon")
    down = specs["layers.1.mlp.experts.down_proj.weight"]
    assert down.shape == (4, m.d_model, m.d_ff) and uses_muon(down, "muon")
    # Each expert starts as something else; the router is never zero.
    values = initial_values(down, 1)
    assert not np.array_equal(values[0], values[1])
    assert abs(values.std() - 0.02 / 2) < 1e-3
    untied = param_specs(model(n_experts=4, zero_init_outputs=True, tie_embeddings=False))
    assert {s.init.kind for s in untied if s.group == "router"} == {"normal"}
    assert {s.init.kind for s in untied if "down_proj" in s.name} == {"zeros"}
    slots = {s.key: s.shape for s in slot_specs("muon", tuple(specs.values()))}
    assert slots["optim/momentum/" + down.name] == down.shape
    assert slots["optim/exp_avg_sq/" + router.name] == router.shape
