"""The forecast of memory: terms by hand, properties, and what is suggested where it does not fit."""

import subprocess
import sys

import pytest

from core.config.schema import RunConfig
from core.machine import memory
from core.machine.memory import predict_inference_memory, predict_training_memory
from core.machine.memory_fit import nearest_fits, with_changes
from core.machine.memory_ledger import Ledger
from core.machine.memory_torch import TRAITS, Sizes, stacks
from core.params import num_parameters, param_specs
from tests.helpers import tiny_config

BACKENDS = ("cpu", "mps", "cuda", "mlx")


def config_of(backend: str = "cpu", **changes: object) -> RunConfig:
    """D 64, 4 heads of 16, F 128, V 256, T 32, 3 layers, 2 rows, unless changed (`section__key`)."""
    values: dict = {
        "train.backend": backend,
        "model.d_model": 64,
        "model.n_heads": 4,
        "model.n_kv_heads": 4,
        "model.head_dim": 16,
        "model.d_ff": 128,
        "model.vocab_size": 256,
        "model.n_layers": 3,
        "model.max_seq_len": 4096,
        "model.tie_embeddings": False,
        "data.seq_len": 32,
        "train.micro_batch_size": 2,
    }
    values |= {k.replace("__", "."): v for k, v in changes.items()}
    return with_changes(tiny_config(), values)


def forecast(backend: str = "cpu", **changes: object) -> memory.MemoryForecast:
    config = config_of(backend, **changes)
    return predict_training_memory(config, param_specs(config.model))


def test_the_ledger_remembers_the_parts_and_the_name_of_the_peak():
    ledger = Ledger()
    ledger.add("weights", 10, "start")
    with ledger.hold("workspace", 5, "middle"):
        ledger.spike("logits", 7, "top")
    ledger.add("weights", 4, "end")
    assert ledger.most == 22 and ledger.moment == "top"
    assert dict(ledger.peak) == {"weights": 10, "workspace": 5, "logits": 7}
    assert ledger.held["weights"] == 14 and ledger.held["workspace"] == 0


def test_what_a_block_keeps_by_hand():
    config = config_of()
    sizes = Sizes(config, TRAITS["cpu"], 4)
    n, d, f, heads = 64, 64, 128, 4  # tokens, widths
    # By the model: two rstd; both norms' outputs, the stream between; q, k before and after the
    # norm and rotation, v, the output; a float a head for q's and k's norm and for attention;
    # gate, activation, up and product.
    floats = 2 * n + 3 * n * d + (2 * n * d + 2 * n * d + n * d + n * d) + 3 * n * heads + 4 * n * f
    assert sizes.kept_block(0) == 4 * floats


def test_weights_and_optimizer_by_hand():
    embed, block = 256 * 64, 4 * 64 * 64 + 3 * 64 * 128
    vectors = 3 * (2 * 64 + 2 * 16) + 64
    n = 2 * embed + 3 * block + vectors
    config = config_of(train__optimizer="muon")
    assert num_parameters(param_specs(config.model)) == n
    for backend in BACKENDS:
        found = forecast(backend, train__optimizer="muon")
        assert found.weights == 4 * n
        assert found.optimizer == 4 * (3 * block) + 8 * (2 * embed + vectors)
        assert forecast(backend, train__optimizer="adamw").optimizer == 8 * n


def test_the_parts_are_the_total():
    for backend in BACKENDS:
        found = forecast(backend)
        assert sum(found.parts().values()) == found.total
        assert found.tensors == found.total - found.framework - found.allocator
        assert found.moment


def test_accumulated_gradients_are_there_in_the_forward_pass():
    once = forecast(train__micro_batch_size=64)
    twice = forecast(train__micro_batch_size=64, train__grad_accum_steps=2)
    many = forecast(train__micro_batch_size=64, train__grad_accum_steps=9)
    assert once.moment == twice.moment and twice.total == many.total
    gradients = twice.gradients - once.gradients
    assert 0.9 * twice.weights < gradients <= twice.weights


def test_stacks_are_those_of_the_optimizer():
    config = config_of()
    found = stacks(config, param_specs(config.model))
    # embed; vectors of 64; q, k, v, o; vectors of 16; gate and up; down; head
    assert [count for _, count, *_ in found] == [1, 7, 12, 6, 6, 3, 1]
    assert sum(count * size for _, count, *_, size in found) == num_parameters(
        param_specs(config.model)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "key",
    [
        "train__micro_batch_size",
        "data__seq_len",
        "model__n_layers",
        "model__d_ff",
        "model__vocab_size",
    ],
)
def test_more_of_anything_takes_more(backend, key):
    section, name = key.split("__")
    base = getattr(getattr(config_of(backend), section), name)
    sizes = [forecast(backend, **{key: base * k}).tensors for k in (1, 2, 4, 16)]
    assert sizes == sorted(sizes) and sizes[-1] > 1.5 * sizes[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_saves_memory_saves_memory(backend):
    big = {"train__micro_batch_size": 64, "model__n_layers": 12}
    plain = forecast(backend, **big).tensors
    assert forecast(backend, **big, train__gradient_checkpointing=True).tensors < 0.6 * plain
    assert forecast(backend, **big, train__precision="bfloat16").tensors < 0.85 * plain


def test_unfused_attention_grows_with_the_square_of_the_window():
    def activations(backend: str, length: int) -> int:
        return forecast(backend, data__seq_len=length, train__micro_batch_size=1).activations

    for backend, least, most in (("cpu", 1.9, 2.1), ("mlx", 3.0, 4.1), ("mps", 3.0, 4.1)):
        assert least < activations(backend, 4096) / activations(backend, 2048) < most


def test_mlx_on_a_mac_works_on_larger_pieces(monkeypatch):
    changes = {"model__vocab_size": 32_000, "train__micro_batch_size": 64}
    monkeypatch.setattr(sys, "platform", "linux")
    here = forecast("mlx", **changes)
    monkeypatch.setattr(sys, "platform", "darwin")
    mac = forecast("mlx", **changes)
    assert mac.logits > here.logits and mac.activations == here.activations


def test_keys_and_values_by_hand():
    config = config_of()
    found = predict_inference_memory(config, param_specs(config.model), 5, 100)
    # 2 x layers x rows x tokens x heads x head_dim x 4 bytes
    assert found.cache == 2 * 3 * 5 * 100 * 4 * 16 * 4
    half = config_of(train__precision="bfloat16")
    narrow = predict_inference_memory(half, param_specs(half.model), 5, 100)
    assert narrow.cache == found.cache // 2 and narrow.weights < 0.52 * found.weights


def test_suggestions_fit_and_keep_the_rows_of_a_step():
    config = config_of(train__micro_batch_size=96, train__grad_accum_steps=2, data__seq_len=256)
    whole = predict_training_memory(config, param_specs(config.model))
    budget = whole.total - (whole.tensors // 3)
    found = nearest_fits(config, budget)
    assert len(found) == 2
    for fit in found:
        trial = with_changes(config, fit.changes)
        assert predict_training_memory(trial, param_specs(trial.model)).total <= budget
        t = trial.train
        assert t.micro_batch_size * t.grad_accum_steps == 192
    rows = int(found[0].changes["train.micro_batch_size"])
    assert found[0].typed == f"train.micro_batch_size={rows} train.grad_accum_steps={192 // rows}"
    bigger = min(r for r in (96, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2) if r > rows)
    above = with_changes(config, {"train.micro_batch_size": bigger})
    assert predict_training_memory(above, param_specs(above.model)).total > budget


def test_a_model_that_is_too_large_gets_a_smaller_one():
    config = config_of(
        train__micro_batch_size=1, model__n_layers=48, model__d_ff=8192, model__vocab_size=256
    )
    whole = predict_training_memory(config, param_specs(config.model))
    found = nearest_fits(config, whole.framework + whole.tensors // 4)
    assert found and "model.n_layers" in found[-1].changes
    assert not nearest_fits(config, 1000)


def least_memory(config: RunConfig, **changes: int) -> int:
    """The forecast with one row at a time and checkpointing."""
    values: dict[str, int | bool] = {k.replace("__", "."): v for k, v in changes.items()}
    values |= {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    trial = with_changes(config, values)
    return predict_training_memory(trial, param_specs(trial.model)).total


def test_the_model_that_is_offered_is_the_deepest_that_fits():
    """7 of 12 blocks, which is no eighth of them."""
    least = {"train__micro_batch_size": 1, "train__gradient_checkpointing": True}
    config = config_of(model__n_layers=12, model__d_ff=2048, **least)
    budget = least_memory(config, model__n_layers=7) + 1000
    assert least_memory(config, model__n_layers=8) > budget
    found = [f for f in nearest_fits(config, budget) if "model.n_layers" in f.changes]
    assert found[0].changes["model.n_layers"] == 7 and "model.d_model" not in found[0].changes
    assert found[0].total_bytes <= budget
    assert len(found) == 1


def test_fewer_experts_are_offered_but_no_fewer_than_a_token_goes_to():
    least = {"train__micro_batch_size": 1, "train__gradient_checkpointing": True}
    mixture = {"model__n_experts": 9, "model__top_k": 3, "model__d_ff": 1024}
    config = config_of(model__n_layers=4, **mixture, **least)
    budget = least_memory(config, model__n_experts=7) + 1000
    typed = [f.typed for f in nearest_fits(config, budget)]
    assert "model.n_experts=7" in typed and "model.n_layers=3" in typed
    small = least_memory(config, model__n_experts=3) - 1
    for fit in nearest_fits(config, small):
        assert fit.changes.get("model.n_experts", 3) >= 3


def test_a_dialled_model_gets_the_largest_depth_that_fits():
    def at(depth: int) -> RunConfig:
        shape = {"d_model": 64 * depth, "n_layers": depth, "n_heads": depth, "n_kv_heads": depth}
        shape |= {"d_ff": 128 * depth, "head_dim": 64, "mlp_multiple": 2}
        return config_of(**{f"model__{k}": v for k, v in shape.items()})

    budget = least_memory(at(5)) + 1000
    assert least_memory(at(6)) > budget
    found = nearest_fits(at(9), budget, depth=9)
    assert found[-1].typed.startswith("--depth 5") and found[-1].total_bytes <= budget
    # Its sizes and its batch follow from it.
    assert all("model." not in f.typed and "micro" not in f.typed for f in found if f.flags)


@pytest.mark.skipif(sys.platform != "linux", reason="the window is that of MLX's CPU build")
def test_the_loss_of_mlx_holds_few_chunks_however_many_there_are():
    mx = pytest.importorskip("mlx.core")
    from backends.mlx.losses import _head_loss

    tokens, vocab, rows = 1024, 2048, 32
    hidden, weight = mx.ones((tokens, 8)), mx.ones((vocab, 8))
    targets, weights = mx.zeros((tokens,), mx.int32), mx.ones((tokens,))
    mx.eval(hidden, weight, targets, weights)

    def loss(hidden, weight):
        return _head_loss(hidden, weight, targets, weights, mx.array(1.0), rows)

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(hidden, weight))
    chunks = (mx.get_peak_memory() - before) / (4 * rows * vocab)
    # 6 tensors of each of two chunks, and small change; unordered it was 38 chunks of 16.
    assert 3 < chunks < 17


def test_the_loss_of_mlx_is_forecast_by_its_window():
    def logits(rows: int) -> int:
        changes = {"model__vocab_size": 8192, "model__n_layers": 1, "data__seq_len": 128}
        return forecast("mlx", **changes, train__micro_batch_size=rows).logits

    # 4 chunks and 8; the head's matrix is the same
    assert 0 < logits(8) <= 1.01 * logits(4)


def test_no_framework_is_imported_for_a_forecast():
    code = (
        "import sys, core.machine.memory, core.machine.memory_fit, core.training.forecast\n"
        "assert not {'torch', 'mlx', 'mlx.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_loss_of_mlx_holds_padding_or_narrow_logits_not_both():
    """Measured with AdamW, a tied vocabulary of 12,000 and 21 rows of 64: 77.8 MB in bfloat16."""
    changes = {"model__vocab_size": 12_000, "data__seq_len": 64, "train__micro_batch_size": 21}
    wide = forecast("mlx", **changes, train__precision="float32").logits
    narrow = forecast("mlx", **changes, train__precision="bfloat16").logits
    assert narrow == pytest.approx(wide, rel=0.02)
    even = {**changes, "model__vocab_size": 12_288}
    wide = forecast("mlx", **even, train__precision="float32").logits
    assert forecast("mlx", **even, train__precision="bfloat16").logits > 1.1 * wide
