"""tools/benchmark.py: its arithmetic by hand, its floors, and that each of them can be missed.

Run: python -m pytest tests/cli/test_benchmark_tool.py
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.backend import MemoryStats
from core.data.sampling.loader import StepBatches, TrainLoader
from core.errors import PippinError
from core.params import num_parameters, param_specs, slot_specs
from core.training.runlog import RunLog, read_rows
from tools import benchmark
from tools.benchmarks import report, saving, training
from tools.benchmarks.saving import Cost

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.d_model=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.d_ff=24",
    "model.vocab_size=61",
    "data.seq_len=13",
    "train.micro_batch_size=2",
)


def run_json(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any]]:
    code = benchmark.main([str(a) for a in args] + ["--json"])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    return code, json.loads(captured.out)


# Arithmetic


def test_percentiles_by_hand() -> None:
    assert report.median([3.0, 1.0, 2.0]) == 2.0
    assert report.median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert report.percentile([10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], 0.9) == 9.0
    assert report.percentile([5.0], 0.9) == 5.0


def test_numbers_have_three_digits() -> None:
    values = (None, 0, 0.01234, 1.234, 12.34, 1234567.0, float("inf"))
    shown = ["-", "0", "0.0123", "1.23", "12.3", "1,234,567", "inf"]
    assert [report.number(v) for v in values] == shown


def test_what_is_demanded_and_missing_does_not_pass() -> None:
    assert report.Measured("a", 1.0, "s", most=1.0).ok
    assert not report.Measured("a", 1.01, "s", most=1.0).ok
    assert not report.Measured("a", None, "s", most=1.0).ok
    assert not report.Measured("a", float("nan"), "s", most=1.0).ok
    assert report.Measured("a", None, "s").ok


def test_training_figures_by_hand() -> None:
    timings = training.Timings(
        steps=[0.010, 0.020, 0.030],
        total=2.0,
        loader=0.010,
        log=0.030,
        rows=3,
        tokens=6000,
        memory=MemoryStats(1, 2_500_000_000, 3),
    )
    rows = {r.name: r for r in training.figures(timings, flops_a_token=6e6, peak=1e11)}
    assert rows["speed"].value == 3000.0
    assert rows["step, median"].value == pytest.approx(20.0)
    assert rows["step, p90"].value == pytest.approx(30.0)
    assert rows["loading data"].value == pytest.approx(0.5) and rows["loading data"].ok
    assert rows["logging"].value == pytest.approx(1.5) and not rows["logging"].ok
    assert rows["MFU"].value == pytest.approx(18.0)
    assert rows["memory of the device, peak"].value == 2.5
    timings.rows = 0
    rows = {r.name: r for r in training.figures(timings, flops_a_token=6e6, peak=None)}
    assert rows["MFU"].value is None and not rows["logging"].ok


def test_saving_figures_by_hand() -> None:
    save = [Cost(2.0, 3.0), Cost(2.4, 3.2), Cost(9.0, 3.1)]
    plain = [Cost(1.0, 0.5), Cost(1.2, 0.6), Cost(1.5, 0.4)]
    rows = {r.name: r for r in saving.save_figures(save, plain, size=2_000_000_000)}
    assert rows["save, processor"].value == pytest.approx(1.55) and rows["save, processor"].ok
    assert rows["plain write, processor"].value == pytest.approx(0.25)
    assert rows["save : plain write"].value == pytest.approx(2.0)
    assert rows["checkpoint"].value == 2.0
    rows = {r.name: r for r in saving.save_figures(save, plain, size=1_000_000_000)}
    assert not rows["save, processor"].ok
    worse = [Cost(2.5, 1.0)] * 3
    rows = {r.name: r for r in saving.save_figures(worse, plain, size=1_000_000_000)}
    assert not rows["save : plain write"].ok


def test_the_checkpoint_is_as_large_as_asked() -> None:
    config = saving.checkpoint_config(137_000_000, "cpu")
    specs = param_specs(config.model)
    assert (config.model.n_layers, config.model.d_model) == (12, 768)
    assert num_parameters(specs) == pytest.approx(137e6, rel=0.01)
    state = sum(int(np.prod(s.shape)) for s in slot_specs("muon", specs))
    size = saving.checkpoint_bytes(config, specs)
    assert size == 4 * (num_parameters(specs) + state) == pytest.approx(1.3e9, rel=0.02)
    small = saving.checkpoint_config(200_000, "cpu")
    written = sum(v.nbytes for v in saving.random_tensors(small).values())
    assert written == saving.checkpoint_bytes(small, param_specs(small.model))


def test_other_programs_are_noticed() -> None:
    """One that is busy for the whole measurement counts as about one processor; this one not."""
    loop = "import time; e = time.time() + 0.8\nwhile time.time() < e: pass"
    with subprocess.Popen([sys.executable, "-c", loop]):
        time.sleep(0.2)
        others = report.OtherLoad()
        time.sleep(0.4)
        found = others.figure()
    assert found.value is not None and found.value > 0.3 and "again" in found.note
    assert found.most is None and found.unit == "processors"


def test_counts_are_read() -> None:
    assert [benchmark.parse_count(t) for t in ("137M", "1.5g", "20000", "3k")] == [
        137_000_000,
        1_500_000_000,
        20_000,
        3_000,
    ]
    for text in ("", "M", "-3", "1e6", "0", "12T"):
        with pytest.raises(PippinError, match="no number of parameters"):
            benchmark.parse_count(text)


# Saving and loading


@pytest.mark.parametrize(
    "which", [("--format", "npz"), ("--format", "pt"), ("--backend", "cpu"), ("--backend", "mlx")]
)
@pytest.mark.parametrize("command", ["save", "load"])
def test_it_saves_and_loads_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, which: tuple[str, str]
) -> None:
    code, found = run_json(
        capsys, command, *which, "--params", "200K", "--repeats", 2, "--folder", tmp_path
    )
    assert not list(tmp_path.iterdir())
    # Of so small a file the floors say nothing; but the code must say what the figures say.
    assert code == (0 if found["ok"] else 1)
    assert found["ok"] == all(f["ok"] for f in found["figures"].values())
    config = saving.checkpoint_config(200_000, "cpu")
    size = saving.checkpoint_bytes(config, param_specs(config.model))
    assert found["figures"]["checkpoint"]["value"] == pytest.approx(size / 1e9)
    assert found["parameters"] == num_parameters(param_specs(config.model))
    assert {len(c) for c in found["costs"].values()} == {2}
    assert all(c["wall_s"] > 0 for costs in found["costs"].values() for c in costs)
    demanded = {name for name, f in found["figures"].items() if f["most"] is not None}
    assert demanded == ({"save, processor", "save : plain write"} if command == "save" else set())


def subject(save: Any, size: int = 1 << 20) -> saving.Subject:
    data = np.zeros(size, np.uint8)
    return saving.Subject(
        label="made up",
        size=size,
        suffix=".npz",
        save=save,
        load=lambda path: path.read_bytes(),
        arrays=lambda: iter([data]),
        close=lambda: None,
    )


def test_a_slow_writer_misses_both_floors(tmp_path: Path) -> None:
    def slow(path: Path) -> None:
        path.write_bytes(bytes(1 << 20))
        end = time.process_time() + 0.15
        while time.process_time() < end:
            pass

    rows, costs = saving.measure_save(subject(slow), tmp_path, repeats=3)
    found = {r.name: r for r in rows}
    assert len(costs["save"]) == len(costs["plain"]) == 3
    assert not found["save, processor"].ok and not found["save : plain write"].ok
    assert found["save, processor"].value == pytest.approx(0.15 / 1.048576e-3, rel=0.5)


def test_the_plain_write_writes_the_same_bytes(tmp_path: Path) -> None:
    arrays = [np.arange(7, dtype=np.float32), np.arange(12, dtype=np.float32).reshape(3, 4).T]
    saving.plain_write(tmp_path / "x", iter(arrays))
    assert (tmp_path / "x").read_bytes() == b"".join(
        np.ascontiguousarray(a).tobytes() for a in arrays
    )


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000_000})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage)
    args = ["save", "--format", "npz", "--folder", str(tmp_path)]
    assert benchmark.main(args) == 2
    assert capsys.readouterr().err.startswith("P312") and not list(tmp_path.iterdir())


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = type("Memory", (), {"available_bytes": 1000})
    monkeypatch.setattr(saving, "system_memory", lambda: memory)
    with pytest.raises(PippinError, match="memory are needed") as error:
        saving.check_room(tmp_path, 1000, copies=1.3)
    assert error.value.code == "P101"


# Training


def train_args(steps: int = 10) -> list[object]:
    return ["train", "--backend", "cpu", "--steps", steps, *TINY]


def test_training_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_json(capsys, *train_args())
    assert code == (0 if found["ok"] else 1)
    figures = found["figures"]
    assert figures["speed"]["value"] > 0
    assert 0 < figures["step, median"]["value"] <= figures["step, p90"]["value"]
    assert found["config"]["model"]["d_model"] == 16 and found["backend"] == "cpu"
    assert found["steps"] == 10 and found["parameters"] > 0
    assert {n for n, f in figures.items() if f["most"] is not None} == {"loading data", "logging"}
    assert figures["logging"]["value"] > 0 and "a row" in figures["logging"]["note"]


def test_a_slow_loader_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = TrainLoader.__next__

    def slow(self: TrainLoader) -> StepBatches:
        time.sleep(0.02)
        return fast(self)

    monkeypatch.setattr(TrainLoader, "__next__", slow)
    code, found = run_json(capsys, *train_args())
    assert code == 1 and not found["figures"]["loading data"]["ok"]
    # 20 ms of a step of a few: not in the step's own time.
    assert found["figures"]["loading data"]["value"] > 20


def test_slow_logging_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    fast = RunLog.row

    def slow(self: RunLog, step: int, values: Any) -> None:
        time.sleep(0.05)
        fast(self, step, values)
        written.append(len(read_rows(self.path)))

    monkeypatch.setattr(RunLog, "row", slow)
    code, found = run_json(capsys, *train_args(20))
    assert code == 1 and not found["figures"]["logging"]["ok"]
    assert written == [1, 2], "real rows, every tenth step"


def test_it_runs_as_a_script_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "save", "--format", "npz"]
    command += ["--params", "20K", "--repeats", "1"]
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert "save : plain write" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], "P012", "required"),
        (["train"], "P012", "--backend"),
        (["train", "--backend", "tpu"], "P012", "tpu"),
        (["train", "--backend", "cpu", "--steps", "9"], "P012", "--steps is 9"),
        (["train", "--backend", "cpu", "--step", "3"], "P012", "--step"),
        (["train", "--backend", "cpu", "model.d_mode=3"], "P010", "did you mean model.d_model"),
        (["save"], "P012", "required"),
        (["save", "--backend", "cpu", "--format", "pt"], "P012", "not allowed"),
        (["save", "--format", "npz", "--params", "many"], "P012", "'many'"),
        (["save", "--format", "npz", "--repeats", "0"], "P012", "--repeats is 0"),
        (["save", "--format", "npz", "--folder", "/nowhere/at/all"], "P312", "does not exist"),
    ],
)
def test_a_wrong_command_line_is_refused(
    capsys: pytest.CaptureFixture[str], args: list[str], code: str, words: str
) -> None:
    assert benchmark.main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(code) and words in captured.err
    assert "Traceback" not in captured.err and not captured.out
