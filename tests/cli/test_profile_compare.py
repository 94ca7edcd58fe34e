"""tools/benchmark.py profile and compare: arithmetic by hand, what is remembered, bad input, and for real.

Run: python -m pytest tests/cli/test_profile_compare.py
"""

import json
from dataclasses import replace

import numpy as np
import pytest

import backends
from core.backend import Availability
from core.machine.remembered import machine_of, recall
from core.params import num_parameters, param_specs
from tests.helpers import tiny_config
from tools import benchmark
from tools.benchmarks import compare, profile, training
from tools.benchmarks.compare import Result

TINY = (
    "model.d_model=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.d_ff=24",
    "model.vocab_size=61",
    "data.seq_len=13",
    "train.micro_batch_size=2",
)
SECONDS = dict(zip(profile.PHASES, (0.001, 0.002, 0.030, 0.050, 0.015, 0.002)))


def result(name, speed, losses=(4.0, 3.0), **changes):
    return Result(name, "torch 2.13.0", "chip", "float32", losses, 1.0, speed, **changes)


# Profile


def test_the_figures_of_a_profile_by_hand():
    found = profile.Profile(SECONDS, whole=0.090, num_steps=3, tokens=100)
    rows = {r.name: r for r in profile.figures(found, {"forward": 6e9, "backward": 5e9}, 1e12)}
    assert [rows[p].value for p in profile.PHASES] == pytest.approx([1, 2, 30, 50, 15, 2])
    assert rows["forward"].note.startswith("30.0 %") and "200 GFLOP/s" in rows["forward"].note
    assert "100 GFLOP/s, 10 % of peak" in rows["backward"].note
    assert rows["sum of the parts"].value == pytest.approx(100)
    assert "1.08 x this" in rows["whole step, not split"].note  # (100 - 1 - 2) / 90
    assert profile.summary(list(rows.values())) == "most of the time: backward, 50.0 %"


def test_the_work_of_forward_and_backward_by_hand():
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
    tokens, length = 26, config.data.seq_len
    blocks = 2 * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 16) + 4 * 2 * 4 * length
    head = 2 * 100 * 8
    work = profile.split_flops(config, tokens)
    assert work == pytest.approx(
        {"forward": tokens * (blocks + 3 * head), "backward": tokens * 2 * blocks}
    )
    train = config.train.model_copy(update={"gradient_checkpointing": True})
    again = profile.split_flops(config.model_copy(update={"train": train}), tokens)
    assert again["backward"] == pytest.approx(tokens * 3 * blocks)


@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_a_step_is_profiled(name, capsys, tmp_path):
    picture = tmp_path / "profile.png"
    args = ["profile", "--backend", name, "--steps", "2", *TINY, "--plot", str(picture), "--json"]
    assert benchmark.main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["seconds"]) == profile.PHASES
    assert all(s >= 0 for s in found["seconds"].values())
    assert found["seconds"]["forward"] > 0 and found["seconds"]["backward"] > 0
    total = found["figures"]["sum of the parts"]["value"]
    assert total == pytest.approx(1e3 * sum(found["seconds"].values()))
    assert found["backend"] == name and found["config"]["model"]["d_model"] == 16
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_slow_loader_shows_as_data(monkeypatch, tmp_path):
    import time

    from core.data.sampling.loader import TrainLoader

    fast = TrainLoader.__next__

    def slow(self):
        time.sleep(0.02)
        return fast(self)

    monkeypatch.setattr(TrainLoader, "__next__", slow)
    config = training.resolve_config("cpu", None, TINY)
    found, _, _ = profile.measure(config, 2)
    assert found.seconds["data"] >= 0.02 > found.seconds["transfer"]


# Compare


def test_the_fastest_that_agrees_is_recommended():
    found = compare.judge([result("mlx", 300.0), result("cpu", 100.0)])
    assert found.ok and found.best == "mlx" and list(found.speeds()) == ["mlx", "cpu"]
    assert compare.recommendation(found) == "--backend mlx, 3.0x cpu"


def test_a_fast_backend_with_another_loss_is_not_recommended():
    found = compare.judge([result("mlx", 300.0, (4.0, 3.01)), result("cpu", 100.0)])
    assert not found.ok and found.best == "cpu" and found.agree == {"mlx": False, "cpu": True}
    assert found.differences["mlx"] == pytest.approx(0.01)
    half = replace(result("mlx", 300.0, (4.0, 3.01)), precision="bfloat16")
    assert compare.judge([half, result("cpu", 100.0)]).ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_never_agree(bad):
    found = compare.judge([result("mlx", 300.0, (4.0, bad)), result("cpu", 1.0)])
    assert found.best == "cpu" and not found.agree["mlx"]
    both = compare.judge([result("mlx", 300.0, (4.0, bad)), result("cpu", 1.0, (4.0, bad))])
    assert both.best is None and "none" in compare.recommendation(both)


def test_a_backend_that_fails_is_told_and_the_others_count():
    found = compare.judge([Result("mps", error="P101 out of memory"), result("cpu", 5.0)])
    assert not found.ok and found.best == "cpu"
    assert compare.recommendation(found) == "cpu, the only one that ran and agreed"
    nothing = compare.judge([Result("cpu", error="x")])
    assert nothing.best is None and not nothing.ok


def test_the_pattern_can_be_learned_and_is_always_the_same(tmp_path):
    config = tiny_config()
    for name in ("a.bin", "b.bin"):
        compare.patterned_stream(config, tmp_path / name)
    ids = np.fromfile(tmp_path / "a.bin", np.uint16).astype(int)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert len(ids) >= 4 * config.data.seq_len
    assert 0 <= ids.min() and ids.max() < config.model.vocab_size
    follows = np.mean(ids[1:] == (3 * ids[:-1] + 7) % config.model.vocab_size)
    assert 0.88 < follows < 0.93


def test_a_gpu_is_measured_with_a_size_that_fills_it():
    cpu = {"cpu": Availability("cpu", True), "mps": Availability("mps", False)}
    mac = {"mps": Availability("mps", True), "cpu": Availability("cpu", True)}
    assert compare.default_size(cpu, []) == []
    assert compare.default_size(mac, ["train.lr=1"]) == [*compare.GPU_SIZE, "train.lr=1"]
    assert compare.default_size(mac, ["model.d_model=64"]) == ["model.d_model=64"]


def big_config():
    return tiny_config(
        model__d_model=256,
        model__head_dim=64,
        model__d_ff=512,
        model__vocab_size=1024,
        data__seq_len=32,
        train__micro_batch_size=64,
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPPIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_good_answer_is_remembered_for_this_machine(cache):
    from core.machine.detect import machine_facts

    config, available = big_config(), backends.available()
    assert num_parameters(param_specs(config.model)) >= compare.MIN_PARAMETERS
    found = compare.judge([result("mlx", 300.0), result("cpu", 100.0)])
    told, kept = compare.keep(found, config, available)
    assert kept and "backend: auto takes" in told
    answer, note = recall(machine_of(machine_facts(), available), cache)
    assert not note and answer is not None and answer.tokens_per_s == {"mlx": 300.0, "cpu": 100.0}


def test_an_answer_that_says_little_is_not_remembered(cache):
    available = backends.available()
    good = compare.judge([result("mlx", 300.0), result("cpu", 100.0)])
    told, kept = compare.keep(good, tiny_config(), available)
    assert not kept and "say little" in told
    bad = compare.judge([result("mlx", 300.0, (4.0, 2.0)), result("cpu", 100.0)])
    told, kept = compare.keep(bad, big_config(), available)
    assert not kept and "agreed" in told and not cache.exists()


def test_what_was_measured_beside_other_programs_is_not_remembered(cache):
    import os

    share = 0.3 * (os.cpu_count() or 1)
    busy = [replace(result("cpu", 100.0), other_processors=share)]
    told, kept = compare.keep(compare.judge(busy), big_config(), backends.available())
    assert not kept and "compare again" in told and not cache.exists()


def test_a_cache_that_cannot_be_written_spoils_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPPIN_CACHE_DIR", str(tmp_path / "file" / "below"))
    told, kept = compare.keep(
        compare.judge([result("cpu", 1.0)]), big_config(), backends.available()
    )
    assert not kept and "cannot be written" in told


def test_the_same_is_trained_on_every_backend_that_is_here(capsys, cache):
    code = benchmark.main(["compare", "--seconds", "0.1", "--json", *TINY])
    found = json.loads(capsys.readouterr().out)
    here = {name for name, state in backends.available().items() if state.ok}
    assert code == 0 and found["ok"] and {r["backend"] for r in found["backends"]} == here
    for r in found["backends"]:
        assert r["agrees"] and r["tokens_per_s"] > 0 and r["process_bytes"] > 1e7
        assert r["losses"][-1] < r["losses"][0] and r["loss_difference"] < 1e-3
    assert found["recommended"] in here and "not remembered" in found["remembered"]
    assert not cache.exists()


def test_a_worker_that_dies_becomes_a_line(monkeypatch):
    config = training.resolve_config("cpu", None, TINY)
    broken = config.model_copy(
        update={"train": config.train.model_copy(update={"backend": "cuda"})}
    )
    found = compare.run_one("cuda", broken, seconds=0.1)
    assert found.error.startswith("P50") or "cuda" in found.error
    monkeypatch.setattr(compare, "TIMEOUT_S", 0.01)
    assert "no result after" in compare.run_one("cpu", config, seconds=0.1).error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["profile"], "--backend"),
        (["profile", "--backend", "cpu", "--steps", "0"], "--steps is 0"),
        (["profile", "--backend", "cpu", "--plot", "x.txt"], "must end in .png"),
        (["profile", "--backend", "cpu", "model.d_mode=3"], "did you mean model.d_model"),
        (["compare", "--seconds", "0"], "--seconds is 0"),
        (["compare", "--seconds", "nan"], "--seconds is nan"),
        (["compare", "--backend", "cpu"], "--backend"),
        (["compare", "model.d_mode=3"], "did you mean model.d_model"),
    ],
)
def test_a_wrong_command_line_is_refused(args, words, capsys):
    assert benchmark.main(args) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and not captured.out
