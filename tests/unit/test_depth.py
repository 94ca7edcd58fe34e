"""`--depth`: one dial; its rules by hand, what the user sets wins, and what is said of it.

Run: python -m pytest tests/unit/test_depth.py
"""

import itertools
import math

import pytest

from core.config.load import build, load
from core.errors import PippinError
from core.machine import depth as dials
from core.machine.autoconfig import DataFacts, DeviceFacts, resolve_auto, resolve_early
from core.machine.depth import TOKENS_PER_PARAMETER, apply_depth
from core.machine.memory import predict_training_memory
from core.machine.scaling import TIERS
from core.machine.speed import flops_per_token
from core.machine.timebudget import parse_minutes
from core.params import num_parameters, param_specs

DEVICE = DeviceFacts("cuda", "an NVIDIA GPU", True, True, 80 * 10**9, 80 * 10**9)


def dialled(depth, *, overrides=(), flags=None, config="quickstart", device=DEVICE, tokens=10**12):
    draft = load(config=config, overrides=list(overrides), flags=flags or {})
    dial = apply_depth(draft, depth)
    resolve_early(draft, device, dial)
    draft.resolve("data.tokenizer", "bpe", "the stories'")

    def measure(config):
        return 1e13 / flops_per_token(config.model, param_specs(config.model), config.data.seq_len)

    resolve_auto(draft, DataFacts(4096, tokens, "x", True), device, measure, dial)
    draft.resolve("train.save_dir", "x", "next free name")
    return build(draft), draft, dial


def count_by_hand(depth, vocab=4096):
    """Untied, MLP of 2 d, QK-norm, heads of 64: written down anew, not by `param_specs`."""
    d = 64 * depth
    block = 4 * d * d + 3 * 2 * d * d + 2 * d + 2 * 64
    return depth * block + d + 2 * vocab * d


def step_tokens(config):
    t = config.train
    return t.micro_batch_size * t.grad_accum_steps * config.data.seq_len


def test_depths_1_to_40_are_valid_and_have_the_stated_parameters():
    sizes, batches, rates = [], [], []
    for depth in range(1, 41):
        config, draft, _ = dialled(depth)
        m = config.model
        assert (m.d_model, m.n_layers, m.n_heads, m.head_dim) == (64 * depth, depth, depth, 64)
        size = num_parameters(param_specs(m))
        assert size == count_by_hand(depth)
        tokens = config.train.total_steps * step_tokens(config)
        assert TOKENS_PER_PARAMETER * size <= tokens <= 1.02 * TOKENS_PER_PARAMETER * size
        sizes.append(size)
        batches.append(step_tokens(config))
        rates.append(config.train.lr)
        assert not [k for k, s in draft.sources.items() if s.kind == "auto" and not s.reason]
    assert sizes == sorted(sizes) and len(set(sizes)) == 40
    # A micro-batch holds whole rows, so a split step may be a few rows off.
    assert all(b >= 0.98 * a for a, b in itertools.pairwise(batches))
    assert rates == sorted(rates, reverse=True)


def test_the_tiers_of_the_guide_are_depths():
    for tier, depth in zip(TIERS, (4, 6, 12, 24)):
        model = dialled(depth)[0].model
        assert (model.d_model, model.n_layers) == (tier.d_model, tier.n_layers)


def test_batch_and_rates_by_hand_at_depth_12():
    config, _, _ = dialled(12)
    horizon = 20 * count_by_hand(12)
    ratio = horizon / 2.1e6
    batch = 3072 * ratio**0.383
    # Whole rows of 224 tokens, in a number that can be halved.
    assert 0 <= batch - step_tokens(config) < 4 * 224
    factor = math.sqrt(batch / 3072) * ratio**-0.32
    t = config.train
    assert t.lr == pytest.approx(2e-3 * factor, rel=1e-3)
    assert t.lr_matrix == pytest.approx(6 * t.lr * math.sqrt(128 / 768), rel=1e-3)
    assert t.lr_head == pytest.approx(25 * t.lr * 128 / 768, rel=1e-3)
    assert t.lr_embed == pytest.approx(50 * t.lr, rel=1e-3)
    assert t.min_lr == pytest.approx(0.1 * t.lr, rel=1e-3)


def test_at_the_anchor_the_measured_values_come_out():
    assert dials.batch_tokens(dials.ANCHOR_TOKENS) == pytest.approx(3072)
    assert dials.rate_factor(dials.ANCHOR_TOKENS, 3072) == pytest.approx(1)
    assert dials.matrix_factor({"model.d_model": 128}) == (1.0, "")


def test_the_matrices_rate_follows_the_optimizers_own_scale():
    width = {"model.d_model": 512, "train.optimizer": "muon"}
    assert dials.matrix_factor({**width, "train.muon_scale": "rms"})[0] == pytest.approx(0.5)
    assert dials.matrix_factor({**width, "train.muon_scale": "spectral"})[0] == 1.0
    adamw = {**width, "train.optimizer": "adamw", "train.muon_scale": "rms"}
    assert dials.matrix_factor(adamw)[0] == pytest.approx(0.25)


def test_all_that_it_sets_says_so_with_a_reason():
    _, draft, _ = dialled(6)
    for name in ("model.d_model", "model.n_layers", "model.n_heads", "train.lr"):
        source = draft.sources[name]
        assert source.kind == "flag" and source.where == "--depth 6"
        assert source.reason.startswith("--depth 6: ")
    assert "20 tokens a parameter" in draft.sources["train.total_steps"].reason
    assert "tokens a step" in draft.sources["train.micro_batch_size"].reason
    assert "--depth 6" in draft.sources["data.corpus_bytes"].reason


def test_a_file_that_states_rates_gives_way_in_all_of_them(tmp_path):
    stated = "lr: 1.0, lr_matrix: 2.0, lr_embed: 3.0, lr_head: 4.0, lr_vector: 5.0, lr_router: 6.0"
    path, other = tmp_path / "rates.yaml", tmp_path / "none.yaml"
    path.write_text(f"model: {{n_experts: 4}}\ntrain: {{{stated}, min_lr: 0.5}}\n")
    other.write_text("model: {n_experts: 4}\n")
    config, _, dial = dialled(6, config=str(path))
    plain, _, _ = dialled(6, config=str(other))
    rates = [n for n in type(config.train).model_fields if n.startswith("lr")] + ["min_lr"]
    assert len(rates) == 7
    for name in rates:
        assert getattr(config.train, name) == getattr(plain.train, name), name
    assert "train.lr_router" in dial.notes[-1]


def test_another_depth_has_the_shape_that_it_would_dial():
    ten, six = (dialled(n)[0].model for n in (10, 6))
    assert ten.model_copy(update=_plain(dials.dialled_shape(ten, 10, 6))).model_dump() == {
        **six.model_dump(),
        "head_dim": 64,
    }
    given = dialled(10, overrides=["model.d_model=320", "model.n_heads=5"])[0].model
    assert dials.dialled_shape(given, 10, 6) == {"model.n_layers": 6}
    kept = dialled(10, overrides=["model.n_kv_heads=2", "model.d_ff=96"])[0].model
    assert dials.dialled_shape(kept, 10, 6) == {
        "model.n_layers": 6,
        "model.d_model": 384,
        "model.n_heads": 6,
    }


def _plain(changes):
    return {name.partition(".")[2]: value for name, value in changes.items()}


def test_what_the_user_sets_wins_and_is_told():
    config, _, dial = dialled(6, overrides=["model.d_model=320", "train.lr=0.001"])
    assert (config.model.d_model, config.model.n_layers, config.model.n_heads) == (320, 6, 5)
    assert config.train.lr == 0.001
    assert dial.notes == ("model.d_model = 320 is given and stands; --depth 6 alone would set 384",)
    same = dialled(6, overrides=["model.n_layers=6"])[2]
    assert same.notes == ()


def test_a_length_or_time_that_is_given_wins():
    config, _, _ = dialled(4, overrides=["train.total_steps=77"])
    assert config.train.total_steps == 77
    config, draft, _ = dialled(4, flags={"train.minutes": 30.0})
    assert "30 min" in draft.sources["train.total_steps"].reason
    speed = 1e13 / flops_per_token(config.model, param_specs(config.model), 224)
    assert config.train.total_steps * step_tokens(config) == pytest.approx(
        speed * 1800 * 0.95, rel=0.01
    )


def test_a_file_gives_way_and_is_told(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "model: {d_model: 100, n_layers: 3, n_heads: 5, d_ff: 300, tie_embeddings: false}\n"
        "train: {lr: 0.5, lr_matrix: 0.25, total_steps: 9, micro_batch_size: 2, warmup_steps: 3}\n"
    )
    config, draft, dial = dialled(4, config=str(path))
    assert (config.model.d_model, config.model.n_heads, config.model.n_kv_heads) == (256, 4, 4)
    assert config.model.d_ff == 1024 and config.train.lr < 2e-3 and config.train.total_steps > 1000
    (note,) = dial.notes
    for name in ("model.d_ff", "train.lr_matrix", "train.total_steps", "train.lr"):
        assert name in note
    assert draft.sources["train.warmup_steps"].kind == "auto"


def test_a_small_text_ends_the_horizon():
    config, draft, _ = dialled(6, tokens=1_000_000)
    assert config.train.total_steps * step_tokens(config) <= 20e6
    assert "by heart" in draft.sources["train.total_steps"].reason


def test_little_memory_splits_the_step():
    whole = dialled(6)[0]
    memory = int(0.9 * predict_training_memory(whole, param_specs(whole.model)).total)
    small = DeviceFacts("cuda", "", True, True, memory, memory)
    split = dialled(6, device=small)[0]
    assert split.train.grad_accum_steps > whole.train.grad_accum_steps == 1
    assert step_tokens(split) == pytest.approx(step_tokens(whole), rel=0.1)
    assert predict_training_memory(split, param_specs(split.model)).total <= 0.8 * memory


@pytest.mark.parametrize("depth", [0, -1, 129, 10**9])
def test_depths_that_no_model_has_are_refused(depth):
    with pytest.raises(PippinError) as error:
        apply_depth(load(), depth)
    assert error.value.code == "P012" and "1 to 128" in error.value.render()


# --time-budget


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30m", 30),
        ("90s", 1.5),
        ("2h", 120),
        ("1h30m", 90),
        ("1H 30M", 90),
        ("0.5h", 30),
        ("1d", 1440),
        ("1d2h3m30s", 1563.5),
        (" 45m ", 45),
    ],
)
def test_times_are_read(text, minutes):
    assert parse_minutes(text) == pytest.approx(minutes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "m",
        "30m1h",
        "1h30",
        "-5m",
        "1e3m",
        "30 minutes",
        "∞",
        "0m",
        "5s",
        "9" * 50 + "h",
        "71d",
    ],
)
def test_what_is_no_time_is_refused_with_an_example(text):
    with pytest.raises(PippinError) as error:
        parse_minutes(text)
    shown = error.value.render()
    assert error.value.code == "P012" and "--time-budget 30m" in shown


def test_a_bare_number_is_told_what_it_may_mean():
    with pytest.raises(PippinError) as error:
        parse_minutes("30")
    assert "--time-budget 30m is 30 minutes" in error.value.render()
