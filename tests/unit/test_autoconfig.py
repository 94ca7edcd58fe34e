"""Automatic values: sized by memory and a measured speed, each with a reason, and never over a user's.

Run: python -m pytest tests/unit/test_autoconfig.py
"""

from dataclasses import replace

import pytest

from core.config.load import build, load
from core.errors import PippinError
from core.machine.autoconfig import (
    STEP_SHARE,
    STORY_TOKENS,
    TOKENS_PER_PARAMETER,
    DataFacts,
    DeviceFacts,
    resolve_auto,
    resolve_early,
)
from core.machine.memory import predict_training_memory
from core.machine.scaling import MAX_EPOCHS, sizes_of
from core.machine.speed import flops_per_token, measure_tokens_per_s, peak_flops
from core.params import num_parameters, param_specs
from tests.helpers import tiny_config

DATA = DataFacts(vocab_size=2048, train_tokens=10**9, name="x", is_stories=True)


def device(gigabytes=16.0, **kwargs):
    facts = {"backend": "cpu", "reason": "", "is_gpu": False, "native_bf16": False}
    return DeviceFacts(**{**facts, **kwargs}, budget_bytes=int(gigabytes * 1e9))


def resolved(flops_per_s, *, overrides=(), gigabytes=16.0, data=DATA, **kwargs):
    """The resolved configuration on a machine of this many FLOP/s, and its speed."""
    draft = load(config="quickstart", overrides=list(overrides))
    facts = device(gigabytes, **kwargs)
    resolve_early(draft, facts)
    draft.resolve("data.tokenizer", "bpe", "")

    def measure(config):
        return flops_per_s / flops_per_token(
            config.model, param_specs(config.model), config.data.seq_len
        )

    speed = resolve_auto(draft, data, facts, measure)
    draft.resolve("train.save_dir", "x", "")
    return build(draft), speed, draft


def test_stories_are_read_whole_and_text_as_it_comes():
    config, _, _ = resolved(9e10)
    assert (config.data.sampling, config.data.seq_len) == ("document", STORY_TOKENS)
    for override in ("data.input_file=x.txt", "data.tokenizer=byte", "data.seq_len=64"):
        config, _, _ = resolved(9e10, overrides=[override])
        assert config.data.sampling == "contiguous"
    config, _, _ = resolved(9e10, overrides=["data.sampling=packed"])
    assert (config.data.sampling, config.data.seq_len) == ("packed", 256)


def test_padding_costs_time_and_trains_nothing():
    whole, _, _ = resolved(9e10)
    half, _, _ = resolved(9e10, data=replace(DATA, fill=0.5))
    rows = whole.train.micro_batch_size
    assert abs(half.train.micro_batch_size - 2 * rows) <= 1
    # As many tokens a step, so half the steps in the time.
    assert half.train.total_steps == pytest.approx(whole.train.total_steps / 2, rel=0.1)


def test_the_heads_rate_falls_with_the_width():
    def head(width):
        return resolved(9e10, overrides=[f"model.d_model={width}"])[0].train.lr_head

    assert head(128) == head(64) == pytest.approx(0.05)
    assert head(512) == pytest.approx(0.05 / 4)


@pytest.mark.parametrize("flops", [1e9, 3e10, 9e10, 1e12, 1e13, 1e15])
def test_the_size_sees_ten_tokens_per_parameter_in_the_time_and_the_next_one_would_not(flops):
    config, speed, _ = resolved(flops)
    sizes = sizes_of(device().tier)
    rung = sizes.index((config.model.d_model, config.model.n_layers))
    size = num_parameters(param_specs(config.model))
    seconds = 300 * STEP_SHARE
    if rung > 0:
        assert speed * seconds >= TOKENS_PER_PARAMETER * size
    if rung + 1 < len(sizes):
        width, layers = sizes[rung + 1]
        larger, faster, _ = resolved(
            flops, overrides=[f"model.d_model={width}", f"model.n_layers={layers}"]
        )
        bigger = num_parameters(param_specs(larger.model))
        assert faster * seconds < TOKENS_PER_PARAMETER * bigger


def test_two_slow_cores_get_a_model_of_one_to_two_million_parameters():
    config, _, _ = resolved(8.5e10, data=DataFacts(4096, 10**9, "x", True))
    assert 1e6 < num_parameters(param_specs(config.model)) < 2e6


def test_sizes_that_do_not_go_with_what_was_set_are_left_out():
    """A sixth of 128 is odd, and rotary positions need an even width."""
    config, _, _ = resolved(8.5e10, overrides=("model.n_heads=6",))
    assert config.model.n_heads == 6 and config.model.head_dim % 2 == 0
    with pytest.raises(PippinError, match="head_dim"):
        resolved(8.5e10, overrides=("model.head_dim=7",))


def test_memory_holds_the_size_down():
    rich, _, _ = resolved(1e15, gigabytes=64)
    poor, _, _ = resolved(1e15, gigabytes=3)
    assert poor.model.d_model < rich.model.d_model
    assert predict_training_memory(poor, param_specs(poor.model)).total <= 0.8 * 3e9


def test_memory_that_is_short_splits_a_step_and_never_changes_its_rows():
    size = ("model.d_model=256", "model.n_layers=4", "train.total_steps=50")
    free = resolved(1e11, overrides=size)[0].train
    rows = free.micro_batch_size
    assert free.grad_accum_steps == 1 and rows > 4
    splits = set()
    for tenth in range(6, 30):
        t = resolved(1e11, overrides=size, gigabytes=tenth / 10)[0].train
        assert t.micro_batch_size * t.grad_accum_steps == rows
        splits.add(t.grad_accum_steps)
    assert len(splits) > 1


def test_what_the_user_set_is_never_touched():
    overrides = ["model.d_model=96", "train.total_steps=33", "train.lr_embed=0.5"]
    config, _, draft = resolved(1e12, overrides=overrides)
    assert (config.model.d_model, config.train.total_steps, config.train.lr_embed) == (96, 33, 0.5)
    assert draft.sources["model.d_model"].kind == "flag"
    assert draft.sources["model.n_heads"].kind == "auto" and draft.sources["model.n_heads"].reason


def test_a_small_text_is_not_read_a_hundred_times():
    small = DataFacts(vocab_size=300, train_tokens=20_000, name="x", is_stories=False)
    config, _, _ = resolved(1e12, data=small)
    step = config.train.micro_batch_size * config.data.seq_len
    assert config.train.total_steps <= max(MAX_EPOCHS * 20_000 // step, 20)


def test_precision_and_compilation_follow_the_device():
    assert resolved(1e11)[0].train.precision == "float32"
    eager = resolved(1e12, backend="mps", is_gpu=True, native_bf16=True)[0].train
    assert eager.precision == "float32"
    mac = resolved(1e12, backend="mlx", is_gpu=True, native_bf16=True)[0].train
    assert (mac.precision, mac.compile, mac.ns_dtype) == ("bfloat16", True, "float32")


def test_flops_against_a_count_by_hand():
    config = tiny_config(
        model__vocab_size=100,
        model__d_model=8,
        model__n_layers=1,
        model__n_heads=2,
        model__n_kv_heads=1,
        model__head_dim=4,
        model__d_ff=16,
        model__tie_embeddings=True,
    )
    specs = param_specs(config.model)
    matrices = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 16 + 100 * 8
    assert flops_per_token(config.model, specs, 32) == 6 * matrices + 12 * 1 * 2 * 4 * 32


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Apple M4 Max", 13.8e12),
        ("Apple M4", 2.98e12),
        ("Apple M4 Pro", None),
        ("Pentium", None),
        ("NVIDIA H100 80GB HBM3", 52e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 51e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB", 19e12),
        ("NVIDIA A100-SXM4-40GB", 19e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA A1000", None),
        ("NVIDIA GeForce RTX 4090", 55e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla T4", 4e12),
        ("Tesla T40", None),
    ],
)
def test_peak_rates_are_not_those_of_a_sibling(name, known):
    assert peak_flops(name, "float32") == known


@pytest.mark.parametrize(
    ("precision", "more", "tflops"),
    [
        ("bfloat16", {}, 784),
        ("float32", {}, 52),
        ("float32", {"tf32": True}, 392),
        ("bfloat16", {"tf32": True}, 784),
        # MLX has no such switch, and what multiplies no bfloat16 has no TF32.
        ("float32", {"tf32": True, "backend": "mlx"}, 52),
        ("float32", {"tf32": True, "native_bf16": False}, 52),
        ("bfloat16", {"native_bf16": False}, 52),
        ("float16", {"native_bf16": False}, 784),
    ],
)
def test_the_peak_of_mfu_is_that_of_the_products_that_are_taken(precision, more, tflops):
    """Dense bfloat16 of an H100 as measured, its half for TF32, and float32."""
    peak = peak_flops("NVIDIA H100 80GB HBM3", precision, **{"backend": "cuda", **more})
    assert peak == pytest.approx(1e12 * tflops)


def test_speed_counts_tokens_over_time_and_leaves_the_first_step_out():
    config = tiny_config()
    now = [0.0]

    class Slow:
        def train_step(self, micro, hyper):
            now[0] += 0.5
            return {"loss": 1.0}

        def synchronize(self):
            pass

    speed = measure_tokens_per_s(Slow(), config, seconds=2.0, clock=lambda: now[0])  # type: ignore[arg-type]
    step = config.train.micro_batch_size * config.train.grad_accum_steps * config.data.seq_len
    assert speed == pytest.approx(step / 0.5)


@pytest.mark.parametrize("width", [9, 129, 131])
def test_an_odd_width_is_refused_by_the_rules(width):
    with pytest.raises(PippinError) as info:
        resolved(1e12, overrides=[f"model.d_model={width}"])
    assert info.value.code == "P010" and "even width" in info.value.render()


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model.n_heads=7", "model.n_heads=8"),  # 7 divides no width of the ladder
        ("model.n_kv_heads=11", "model.n_kv_heads=3"),  # 96 wide has 3 heads of 32
    ],
)
def test_a_shape_that_goes_with_no_size_is_refused_before_the_text_is_prepared(override, fix):
    def early(text):
        draft = load(config="quickstart", overrides=[text])
        resolve_early(draft, device())
        return draft

    with pytest.raises(PippinError) as info:
        early(override)
    error = info.value
    assert error.code == "P010" and error.remedy == fix and error.kept == "nothing was started."
    assert error.found.startswith(f"{override}: ")
    assert early(fix).is_auto("model.d_model")  # and no size is chosen yet


def test_heads_that_divide_some_widths_are_for_those():
    config, _, _ = resolved(1e12, overrides=["model.n_heads=6"])
    assert config.model.d_model % 6 == 0 and config.model.head_dim % 2 == 0
    config, _, _ = resolved(1e12, overrides=["model.n_heads=7", "model.head_dim=16"])
    assert (config.model.n_heads, config.model.head_dim) == (7, 16)


def test_a_long_warm_up_is_measured_against_the_run_not_against_one_epoch():
    small = DataFacts(vocab_size=300, train_tokens=60_000, name="x", is_stories=False)
    config, _, _ = resolved(1e12, data=small, overrides=["train.warmup_steps=100"])
    assert config.train.warmup_steps == 100 < config.train.total_steps
    with pytest.raises(PippinError) as info:
        resolved(1e12, overrides=["train.warmup_steps=100", "train.total_steps=50"])
    assert "before it is warm" in info.value.render()


@pytest.mark.parametrize("steps", [10, 10_000, 100_000, 1_000_000])
def test_a_given_length_sizes_the_model_by_its_tokens(steps):
    overrides = [f"train.total_steps={steps}"]
    config, _, draft = resolved(1e9, overrides=overrides, gigabytes=64)
    tokens = steps * config.train.micro_batch_size * config.data.seq_len
    rung = sizes_of(device(64).tier).index((config.model.d_model, config.model.n_layers))
    if rung > 0:
        assert tokens >= TOKENS_PER_PARAMETER * num_parameters(param_specs(config.model))
    assert (rung == 0) == (steps == 10)
    poor, _, _ = resolved(1e9, overrides=overrides, gigabytes=3)
    assert predict_training_memory(poor, param_specs(poor.model)).total <= 0.8 * 3e9
    assert "M parameters" in draft.sources["model.d_model"].reason


def test_a_long_run_is_saved_every_half_hour_where_its_speed_is_known():
    """Two days lost 4.8 hours to a crash at a tenth of the run; four minutes stay at ten of them."""
    config, speed, draft = resolved(9e10, overrides=["train.minutes=2880"])
    t = config.train
    step_s = t.micro_batch_size * t.grad_accum_steps * config.data.seq_len / speed
    assert 0.9 * 1800 < t.ckpt_interval * step_s <= 1800 and t.eval_interval == t.ckpt_interval
    assert t.total_steps > 50 * t.ckpt_interval
    assert draft.sources["train.ckpt_interval"].reason.startswith("about every 30 min")
    short, _, draft = resolved(9e10, overrides=["train.minutes=4"])
    assert short.train.ckpt_interval == -(-short.train.total_steps // 10)
    assert draft.sources["train.ckpt_interval"].reason == "10 checkpoints"
    given, _, _ = resolved(9e10, overrides=["train.minutes=2880", "train.ckpt_interval=7"])
    assert given.train.ckpt_interval == 7


def test_a_checkpoint_is_never_validated_on_more_tokens_than_it_was_trained_on():
    many = 10**8
    overrides = ["train.minutes=2880", f"train.eval_tokens={many}"]
    config, _, _ = resolved(9e10, overrides=overrides)
    t = config.train
    step_tokens = t.micro_batch_size * t.grad_accum_steps * config.data.seq_len
    tenth = -(-t.total_steps // 10)
    assert t.ckpt_interval == min(tenth, -(-many // step_tokens))
