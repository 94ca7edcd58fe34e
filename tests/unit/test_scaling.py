"""Tiers, the ladder, epochs, and that any machine gets a model that fits, with reasons.

Run: python -m pytest tests/unit/test_scaling.py
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.backend import OutOfMemory
from core.config.load import build, load
from core.machine.autoconfig import (
    STEP_SHARE,
    TOKENS_PER_PARAMETER,
    DataFacts,
    DeviceFacts,
    resolve_auto,
    resolve_early,
)
from core.machine.memory import predict_training_memory
from core.machine.scaling import (
    LADDER,
    TIERS,
    corpus_bytes,
    corpus_bytes_for,
    sizes_of,
    tier_of,
    worth_of_tokens,
)
from core.machine.speed import flops_per_token
from core.params import num_parameters, param_specs

MIB, GIB = 1 << 20, 1 << 30


def resolved(flops, *, memory=16 * GIB, minutes=5.0, data=None, overrides=(), is_gpu=False):
    """Configuration, draft, and the sizes that were measured, on a machine of `flops` FLOP/s."""
    draft = load(config="quickstart", overrides=[f"train.minutes={minutes}", *overrides])
    device = DeviceFacts("mlx" if is_gpu else "cpu", "as told", is_gpu, is_gpu, memory, memory)
    resolve_early(draft, device)
    draft.resolve("data.tokenizer", "bpe", "the stories'")
    probed = []

    def measure(config):
        probed.append((config.model.d_model, config.model.n_layers))
        return flops / flops_per_token(config.model, param_specs(config.model), config.data.seq_len)

    tokens = int(draft.values["data.corpus_bytes"] / 4.4)
    facts = data or DataFacts(4096, tokens, "x", True)
    resolve_auto(draft, facts, device, measure)
    draft.resolve("train.save_dir", "x", "next free name")
    return build(draft), draft, probed


# Tiers


@pytest.mark.parametrize(
    ("name", "memory", "tier"),
    [
        ("8 GB Mac", 8 * GIB, "Small"),
        ("RTX 3060, 12 GB", 12_288 * MIB, "Small"),
        ("T4, 16 GB, as nvidia-smi says", 15_360 * MIB, "Medium"),
        ("T4, 16 GB, as CUDA says", 15_109 * MIB, "Medium"),
        ("RTX 4080, 16 GB", 16_376 * MIB, "Medium"),
        ("16 GB Mac", 16 * GIB, "Medium"),
        ("16 GB PC, 2 GB for graphics", int(13.9 * GIB), "Medium"),
        ("RTX 4090, 24 GB", 24_564 * MIB, "Medium"),
        ("48 GB Mac", 48 * GIB, "Medium"),
        ("64 GB Mac", 64 * GIB, "Large"),
        ("64 GB PC", int(62.6 * GIB), "Large"),
        ("H100, 80 GB", 81_559 * MIB, "Large"),
        ("192 GB Mac", 192 * GIB, "Large"),
        ("B200, 180 GB", 183_359 * MIB, "Large"),
        ("256 GB Mac", 256 * GIB, "XL"),
        ("512 GB Mac", 512 * GIB, "XL"),
        ("nothing", 0, "Small"),
    ],
)
def test_devices_have_the_tier_they_are_sold_as(name, memory, tier):
    assert tier_of(memory).name == tier


def test_the_tiers_are_those_of_the_guide():
    shapes = [(t.name, t.memory_gb, t.d_model, t.n_layers, t.n_heads) for t in TIERS]
    assert shapes == [
        ("Small", 0, 256, 4, 4),
        ("Medium", 16, 384, 6, 8),
        ("Large", 64, 768, 12, 12),
        ("XL", 256, 1536, 24, 24),
    ]


@pytest.mark.parametrize("tier", TIERS, ids=lambda t: t.name)
def test_a_tier_is_the_ceiling_and_is_reached_with_its_heads(tier):
    sizes = sizes_of(tier)
    assert sizes[-1] == (tier.d_model, tier.n_layers) and len(set(sizes)) == len(sizes)
    assert all(w <= tier.d_model and n <= tier.n_layers for w, n in sizes)
    memory = max(tier.memory_gb, 8) * GIB
    config, draft, _ = resolved(1e17, memory=memory, minutes=10_000, is_gpu=True)
    m = config.model
    assert (m.d_model, m.n_layers, m.n_heads) == (tier.d_model, tier.n_layers, tier.n_heads)
    assert tier.name in draft.sources["model.n_layers"].reason


def test_the_ladder_rises():
    sizes = [w * w * n for w, n in LADDER]
    assert sizes == sorted(sizes) and LADDER[0] == (96, 4)


# Time


def test_eight_hours_on_two_cores_are_worth_a_larger_model_and_more_stories():
    """85 GFLOP/s, as a quiet two-core machine made with the quick start."""
    short, _, _ = resolved(8.5e10)
    config, _, _ = resolved(8.5e10, minutes=480, memory=24 * GIB)
    size = num_parameters(param_specs(config.model))
    t = config.train
    tokens = t.total_steps * t.micro_batch_size * t.grad_accum_steps * config.data.seq_len
    assert (short.model.d_model, short.model.n_layers) == LADDER[0]
    assert size > 3 * num_parameters(param_specs(short.model))
    assert tokens >= TOKENS_PER_PARAMETER * size
    assert tokens <= 4 * config.data.corpus_bytes / 4.4
    # The time is used: within a step of what the speed allows.
    speed = 8.5e10 / flops_per_token(config.model, param_specs(config.model), 224)
    assert tokens == pytest.approx(speed * 480 * 60 * STEP_SHARE, rel=0.01)


def test_more_time_never_gives_a_smaller_model():
    sizes = []
    for minutes in (1, 5, 30, 120, 480, 1440, 10_000):
        config, _, probed = resolved(3e11, minutes=minutes, memory=80 * GIB)
        sizes.append(num_parameters(param_specs(config.model)))
        assert probed[-1] == (config.model.d_model, config.model.n_layers) or len(probed) > 1
        assert len(probed) <= 4
    assert sizes == sorted(sizes) and sizes[-1] > 10 * sizes[0]


def test_a_machine_that_is_faster_at_larger_sizes_is_not_sold_short():
    """GPUs reach more FLOP/s with wider matrices; judged by the smallest, all would be too slow."""
    facts = DeviceFacts("mlx", "", True, True, 80 * GIB, 80 * GIB)
    draft = load(config="quickstart", overrides=["train.minutes=60"])
    resolve_early(draft, facts)
    draft.resolve("data.tokenizer", "bpe", "x")

    def measure(config):
        rate = 2e12 * (config.model.d_model / 128) ** 1.5
        return rate / flops_per_token(config.model, param_specs(config.model), 224)

    resolve_auto(draft, DataFacts(4096, 10**9, "x", True), facts, measure)
    width, layers = draft.values["model.d_model"], draft.values["model.n_layers"]

    def tokens_per_parameter(size):
        draft_ = load(
            config="quickstart",
            overrides=[f"model.d_model={size[0]}", f"model.n_layers={size[1]}"],
        )
        resolve_early(draft_, facts)
        draft_.resolve("data.tokenizer", "bpe", "x")
        resolve_auto(draft_, DataFacts(4096, 10**9, "x", True), facts, None)
        draft_.resolve("train.save_dir", "x", "")
        config = build(draft_)
        return measure(config) * 3600 * STEP_SHARE / num_parameters(param_specs(config.model))

    sizes = sizes_of(facts.tier)
    best = max(s for s in sizes if tokens_per_parameter(s) >= TOKENS_PER_PARAMETER)
    assert (width, layers) == best


def test_a_size_that_runs_out_of_memory_in_the_probe_is_passed_over_and_told():
    facts = DeviceFacts("mlx", "", True, True, 80 * GIB, 80 * GIB)
    draft = load(config="quickstart", overrides=["train.minutes=600"])
    resolve_early(draft, facts)
    draft.resolve("data.tokenizer", "bpe", "x")

    def measure(config):
        if config.model.d_model > 400:
            raise OutOfMemory("the device ran out of memory")
        return 1e14 / flops_per_token(config.model, param_specs(config.model), 224)

    resolve_auto(draft, DataFacts(4096, 10**9, "x", True), facts, measure)
    assert (draft.values["model.d_model"], draft.values["model.n_layers"]) == (384, 6)
    assert "ran out of memory when it was tried" in draft.sources["model.n_layers"].reason


def test_a_small_text_holds_the_model_down():
    """A quarter of a million tokens teach no 100 M parameters, however much time there is."""
    small = DataFacts(4096, 250_000, "x", False)
    config, _, _ = resolved(1e15, memory=80 * GIB, minutes=600, data=small)
    assert (config.model.d_model, config.model.n_layers) == LADDER[0]
    rich, _, _ = resolved(1e15, memory=80 * GIB, minutes=600)
    assert rich.model.d_model == 768


# Epochs and the corpus


def test_repetition_is_worth_less_and_less():
    assert worth_of_tokens(50, 100) == 50 and worth_of_tokens(100, 100) == 100
    assert worth_of_tokens(0, 0) == 0
    # By hand: 4 epochs are 3 repetitions: 1 + 15.39 (1 - e^(-3/15.39)).
    assert worth_of_tokens(400, 100) == pytest.approx(
        100 * (1 + 15.39 * (1 - math.exp(-3 / 15.39)))
    )
    assert worth_of_tokens(400, 100) > 0.9 * 400  # "nearly as good as new"
    assert worth_of_tokens(1e9, 100) == pytest.approx(100 * 16.39)
    # Its slope against a second way: the worth of one more repetition decays as e^(-R/R*).
    step = (worth_of_tokens(1001, 100) - worth_of_tokens(1000, 100)) / 1
    assert step == pytest.approx(math.exp(-9.005 / 15.39), rel=1e-3)


def test_the_corpus_follows_the_time():
    assert corpus_bytes(5, is_gpu=False) == 20_000_000  # the quick start's
    assert corpus_bytes(5, is_gpu=True) == 80_000_000
    assert corpus_bytes(0.1, is_gpu=False) == 4_000_000
    sizes = [corpus_bytes(m, is_gpu=True) for m in (1, 5, 20, 60, 480, 10**5)]
    assert sizes == sorted(sizes) and sizes[-1] == 4_000_000_000
    # Four times the time: twice the stories, once it is long.
    assert corpus_bytes(320, is_gpu=False) == pytest.approx(2 * corpus_bytes(80, is_gpu=False))


def test_the_corpus_of_a_horizon_is_read_at_most_four_times():
    for tokens in (1e7, 94e6, 1.5e9):
        size = corpus_bytes_for(tokens)
        assert size >= 4_000_000 and tokens <= 4.001 * size / 4.4
        # Nearly the same plan finds the same stories.
        assert corpus_bytes_for(tokens * 1.001) in (size, corpus_bytes_for(tokens * 1.01))


# Any machine


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    memory=st.floats(math.log(1.5e9), math.log(6e11)).map(lambda x: int(math.exp(x))),
    flops=st.floats(math.log(1e8), math.log(1e16)).map(math.exp),
    minutes=st.floats(0.25, 100_000),
    tokens=st.floats(math.log(1e3), math.log(1e11)).map(lambda x: int(math.exp(x))),
    vocab=st.sampled_from([260, 4096, 50_304]),
    is_gpu=st.booleans(),
)
def test_any_machine_gets_a_model_that_fits_with_reasons(
    memory, flops, minutes, tokens, vocab, is_gpu
):
    data = DataFacts(vocab, tokens, "x", False)
    config, draft, _ = resolved(flops, memory=memory, minutes=minutes, data=data, is_gpu=is_gpu)
    t = config.train
    assert predict_training_memory(config, param_specs(config.model)).total <= 0.8 * memory
    assert config.model.d_model <= tier_of(memory).d_model
    assert config.model.n_layers <= tier_of(memory).n_layers
    assert t.warmup_steps < t.total_steps
    step = t.micro_batch_size * t.grad_accum_steps * config.data.seq_len
    assert t.total_steps * step <= max(20 * tokens, 20 * step)
    assert 1000 < step < 40_000
    silent = [k for k, s in draft.sources.items() if s.kind == "auto" and not s.reason]
    assert not silent


def test_a_step_that_does_not_fit_is_split_and_stays_the_same_step():
    size = ["model.d_model=256", "model.n_layers=4"]
    rich, _, _ = resolved(1e12, overrides=size)
    memory = int(0.9 * predict_training_memory(rich, param_specs(rich.model)).total)
    poor, draft, _ = resolved(1e12, memory=memory, overrides=size)
    rows = rich.train.micro_batch_size
    assert rich.train.grad_accum_steps == 1 < poor.train.grad_accum_steps
    split = poor.train.micro_batch_size * poor.train.grad_accum_steps
    assert abs(split - rows) <= poor.train.grad_accum_steps / 2
    assert predict_training_memory(poor, param_specs(poor.model)).total <= 0.8 * memory
    budget = f"{0.8 * memory / 1e9:.1f} GB"
    assert f"do not fit {budget} at once" in draft.sources["train.grad_accum_steps"].reason
    # What the user says stays.
    asked, _, _ = resolved(1e12, memory=memory, overrides=[*size, f"train.micro_batch_size={rows}"])
    assert (asked.train.micro_batch_size, asked.train.grad_accum_steps) == (rows, 1)


def test_what_does_not_fit_is_not_measured():
    """A probe of a model larger than memory would take the machine down before it is refused."""
    _, _, probed = resolved(
        1e12, memory=4 * GIB, overrides=["model.d_model=4096", "model.n_layers=32"]
    )
    assert probed == []
