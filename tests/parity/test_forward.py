"""Both frameworks compute the same model: logits, gradients, decoding, greedy tokens.

Run: pytest tests/parity
"""

from typing import Any

import numpy as np
import pytest

from tests.parity import tolerances
from tests.parity.compare import (
    decode_difference,
    gradients_difference,
    greedy,
    logits_difference,
    make,
    setting,
)
from tests.parity.faults import DROPOUT, FORWARD, faulty

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tied-qknorm": {},
    "untied-qknorm": {"model__tie_embeddings": False},
    "tied-plain": {"model__qk_norm": False},
    "untied-plain-gelu": {
        "model__tie_embeddings": False,
        "model__qk_norm": False,
        "model__ffn_activation": "gelu",
    },
}
# Logits of a tied head are so far apart that a small error changes no token.
GREEDY = {"model__tie_embeddings": False}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_agree(name: str) -> None:
    mlx, torch = (setting(b, **ARCHITECTURES[name]) for b in ("mlx", "cpu"))
    assert logits_difference(make(mlx), make(torch), torch) <= tolerances.LOGITS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_agree(name: str, checkpointing: bool) -> None:
    """With dropout; recomputing blocks on one side alone."""
    torch = setting("cpu", **ARCHITECTURES[name])
    mlx = setting("mlx", train__gradient_checkpointing=checkpointing, **ARCHITECTURES[name])
    assert gradients_difference(make(mlx), make(torch), torch) <= tolerances.GRADIENTS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_agrees(name: str) -> None:
    mlx, torch = (setting(b, **ARCHITECTURES[name]) for b in ("mlx", "cpu"))
    a, b = make(mlx, mode="infer"), make(torch, mode="infer")
    assert decode_difference(a, b, torch) <= tolerances.LOGITS


def test_greedy_tokens_are_equal() -> None:
    mlx, torch = (setting(b, **GREEDY) for b in ("mlx", "cpu"))
    tokens = greedy(make(torch, mode="infer"), torch)
    assert len(np.unique(tokens)) > 30  # no constant text
    np.testing.assert_array_equal(greedy(make(mlx, mode="infer"), mlx), tokens)


@pytest.mark.parametrize("name", FORWARD)
def test_faults_in_the_forward_pass_are_seen(name: str) -> None:
    torch = setting("cpu")
    with faulty(FORWARD[name]) as mlx:
        healthy = make(torch)
        assert logits_difference(mlx, healthy, torch) > tolerances.LOGITS
        assert decode_difference(mlx, healthy, torch) > tolerances.LOGITS
        assert gradients_difference(mlx, healthy, torch) > tolerances.GRADIENTS


def test_a_fault_in_dropout_is_seen() -> None:
    torch = setting("cpu")
    with faulty(DROPOUT["dropout"]) as mlx:
        assert gradients_difference(mlx, make(torch), torch) > tolerances.GRADIENTS


def test_a_fault_changes_greedy_tokens() -> None:
    torch = setting("cpu", **GREEDY)
    tokens = greedy(make(torch, mode="infer"), torch)
    with faulty(FORWARD["rms"], **GREEDY) as mlx:
        assert (greedy(mlx, torch) != tokens).any()
