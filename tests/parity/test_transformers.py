"""Logits and the balance are those of Hugging Face's Qwen3-MoE, where `transformers` is installed.

Run: pytest tests/parity/test_transformers.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.params import param_specs
from tests.helpers import ArrayCheckpoint, random_batch, random_params, tiny_config
from tests.parity.compare import difference, make
from tests.reference import model_np

pytest.importorskip("transformers", reason="not a dependency; pip install transformers")
pytest.importorskip("safetensors", reason="comes with transformers")

# Both in float32; 6e-7 was measured, and an error of 1e-3 in one expert is 1e-4.
TOLERANCE = 5e-6
CASES: list[dict[str, Any]] = [
    {"model__n_experts": 5, "model__top_k": 2},
    {"model__n_experts": 4, "model__top_k": 1, "model__tie_embeddings": False},
    {"model__n_experts": 3, "model__top_k": 3},
]


def write_hugging_face(folder: Path, config: Any, params: dict[str, np.ndarray]) -> None:
    """config.json and weights in the layout of published files: one tensor an expert."""
    from safetensors.numpy import save_file

    tensors = {}
    for name, value in params.items():
        target = name if name.startswith("lm_head") else "model." + name
        if ".experts." not in name:
            tensors[target] = value
            continue
        head, tail = target.split(".experts.")
        for e, matrix in enumerate(value):
            tensors[f"{head}.experts.{e}.{tail}"] = np.ascontiguousarray(matrix)
    m = config.model
    described = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.n_kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.d_ff,
        "moe_intermediate_size": m.d_ff,
        "num_experts": m.n_experts,
        "num_experts_per_tok": m.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "max_position_embeddings": m.max_seq_len,
        "tie_word_embeddings": m.tie_embeddings,
        "attention_bias": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
@pytest.mark.parametrize("overrides", CASES)
def test_logits_are_those_of_qwen3_moe(
    overrides: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(train__backend=backend, **overrides)
    params = random_params(param_specs(config.model))
    write_hugging_face(tmp_path, config, params)
    published = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = random_batch(config, rows=3)
    with torch.no_grad():
        out = published(torch.from_numpy(batch.tokens).long(), output_router_logits=True)
    ours = make(config, ArrayCheckpoint(config, params), mode="infer")
    assert difference(ours.logits(batch.tokens), out.logits.numpy()) <= TOLERANCE
    # Theirs is over all layers and rows at once, and k where all is even.
    double = {n: v.astype(np.float64) for n, v in params.items()}
    _, routes = model_np.forward(double, batch.tokens, config.model)
    n_experts, k = config.model.n_experts, config.model.top_k
    probs = np.concatenate([p.reshape(-1, n_experts) for p, _ in routes])[None]
    chosen = np.concatenate([c.reshape(-1, k) for _, c in routes])[None]
    even = model_np.balance_sum(probs, chosen, np.ones(probs.shape[:2])) / probs.shape[1]
    assert abs(float(out.aux_loss) - k * even) < 1e-5 * k * even
