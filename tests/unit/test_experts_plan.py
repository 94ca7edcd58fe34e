"""Choices and tiles of both frameworks against plain counting.

Run: python -m pytest tests/unit/test_experts_plan.py
"""

import importlib

import numpy as np
import pytest

CASES = [
    # tokens, top_k, experts, rows of a tile
    (1, 2, 4, 1),
    (13, 2, 5, 1),
    (13, 2, 5, 4),
    (40, 3, 3, 16),
    (7, 1, 8, 2),
]


class Torch:
    """`experts` of torch, with numpy in and out."""

    def __init__(self):
        self.torch = importlib.import_module("torch")
        self.module = importlib.import_module("backends.torch_common.experts")

    def array(self, value):
        return self.torch.from_numpy(np.ascontiguousarray(value))

    def numpy(self, value):
        return value.numpy()


class Mlx(Torch):
    """The same of MLX."""

    def __init__(self):
        self.module = importlib.import_module("backends.mlx.experts")
        self.mx = importlib.import_module("mlx.core")

    def array(self, value):
        return self.mx.array(value)

    def numpy(self, value):
        return np.array(value)


@pytest.fixture(params=[Torch, Mlx], ids=["torch", "mlx"])
def framework(request):
    return request.param()


def distributions(tokens, top_k, n_experts):
    """Even choices, random ones, all the same, and those of a last expert alone."""
    rng = np.random.default_rng(tokens)
    yield np.stack([(np.arange(top_k) + i) % n_experts for i in range(tokens)])
    yield np.stack([rng.permutation(n_experts)[:top_k] for _ in range(tokens)])
    yield np.tile(np.arange(top_k), (tokens, 1))
    yield np.full((tokens, top_k), n_experts - 1)


@pytest.mark.parametrize("case", CASES)
def test_every_choice_has_a_row_of_its_expert(framework, case):
    tokens, top_k, n_experts, rows = case
    for chosen in distributions(tokens, top_k, n_experts):
        chosen = chosen.astype(np.int32)
        plan = framework.module.make_plan(framework.array(chosen), n_experts, rows)
        slots, choices, token, experts = (
            framework.numpy(x) for x in (plan.slots, plan.choices, plan.tokens, plan.experts)
        )
        size = framework.module.num_tiles(chosen.size, n_experts, rows)
        assert experts.shape == (size,) and choices.shape == token.shape == (size * rows,)
        assert slots.shape == chosen.shape
        assert len(set(slots.flatten().tolist())) == chosen.size
        assert np.array_equal(experts[slots // rows], chosen)
        held = np.full(size * rows, chosen.size)
        held[slots.flatten()] = np.arange(chosen.size)
        assert np.array_equal(choices, held)
        full = held < chosen.size
        assert np.array_equal(token[full], held[full] // top_k)
        assert token.min() >= 0 and token.max() < tokens
        for e in range(n_experts):  # in order of tokens, so that sums have an order
            mine = slots.flatten()[chosen.flatten() == e]
            assert np.array_equal(mine, np.sort(mine))
            if hasattr(plan, "segments") and len(mine):
                assert framework.numpy(plan.segments)[e].tolist() == [mine[0], mine[-1] + 1]


def test_the_number_of_tiles_is_the_least_that_always_suffices(framework):
    for tokens, top_k, n_experts, rows in CASES:
        count = tokens * top_k
        worst = 0
        for used in range(1, min(n_experts, count) + 1):  # one choice in all but one expert
            worst = max(worst, used - 1 + -(-(count - used + 1) // rows))
        found = framework.module.num_tiles(count, n_experts, rows)
        assert worst <= found <= count // rows + n_experts


@pytest.mark.parametrize("cost", [4, 24, 128])
def test_rows_of_a_tile_are_near_the_best(framework, cost):
    def price(count, n_experts, rows):
        return framework.module.num_tiles(count, n_experts, rows) * (cost + rows)

    for count in (1, 2, 6, 100, 8192, 65_536):
        for n_experts in (2, 8, 64):
            rows = framework.module.tile_rows(count, n_experts, cost)
            assert 1 <= rows <= count and rows & (rows - 1) == 0
            best = min(price(count, n_experts, 1 << i) for i in range(count.bit_length()))
            assert price(count, n_experts, rows) <= 1.3 * best


def test_of_equal_probabilities_the_first_is_taken(framework):
    probs = np.array(
        [[0.2, 0.3, 0.3, 0.2], [0.25] * 4, [0.1, 0.1, 0.4, 0.4], [np.nan] * 4], np.float32
    )
    found = framework.numpy(framework.module.largest(framework.array(probs), 3))
    assert found[:3].tolist() == [[1, 2, 0], [0, 1, 2], [2, 3, 0]]
    assert ((found >= 0) & (found < 4)).all()
    rng = np.random.default_rng(0)
    many = rng.integers(0, 4, (500, 7)).astype(np.float32) / 4
    wanted = np.argsort(-many, axis=-1, kind="stable")[:, :3]
    assert np.array_equal(
        framework.numpy(framework.module.largest(framework.array(many), 3)), wanted
    )


def test_both_frameworks_plan_alike():
    rng = np.random.default_rng(3)
    chosen = np.stack([rng.permutation(6)[:2] for _ in range(50)]).astype(np.int32)
    torch, mlx = Torch(), Mlx()
    a = torch.module.make_plan(torch.array(chosen), 6, 8)
    b = mlx.module.make_plan(mlx.array(chosen), 6, 8)
    for name in ("slots", "choices", "experts"):
        assert np.array_equal(torch.numpy(getattr(a, name)), mlx.numpy(getattr(b, name)))
