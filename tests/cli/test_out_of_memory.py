"""Memory that runs out in a run: a smaller micro-batch, the same curve, and a checkpoint that goes on.

Run: python -m pytest tests/cli/test_out_of_memory.py
"""

import json

import pytest
import torch

import backends
from backends.mlx.backend import MlxBackend
from backends.torch_common.backend import TorchBackend
from backends.torch_common.optim import Optimizer
from core.machine.pressure import Reading
from core.training import execute
from core.training.guard import Budget, MemoryWatch
from core.training.recovery import halved
from tests.cli.runs import assert_same_checkpoint, losses, rows, start, tensors, train_here
from tests.fake_mps import create_fake_mps, fake_mps_memory

# Sums over the rows of a step in another order. Measured over 12 steps: 1.1e-7 on cpu, 6.9e-7 on mlx.
ROUNDING = 5e-6


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("core.training.summary.loss_plot", lambda *args, **kwargs: None)
    return tmp_path


def run_args(here, *more):
    return [
        *start(here, "train.total_steps=6", "data.seq_len=16"),
        "train.micro_batch_size=8",
        *more,
    ]


def config_of(folder):
    train = json.loads((folder / "config.json").read_text())["train"]
    return train["micro_batch_size"], train["grad_accum_steps"]


def meta_of(path):
    ckpt = backends.open_checkpoint(path)
    try:
        return ckpt.meta
    finally:
        ckpt.close()


def too_small(monkeypatch, cls, error, *, step, fits):
    """From this step on, a micro-batch of more rows than `fits` raises `error` in the middle."""
    real, failed = cls._train_step, []
    at = 1 if cls is MlxBackend else 2  # place of the hyper argument

    def failing(self, *args):
        micro, hyper = args[at - 1], args[at]
        if hyper.step >= step and micro[0].tokens.shape[0] > fits:
            failed.append(hyper.step)
            raise error
        return real(self, *args)

    monkeypatch.setattr(cls, "_train_step", failing)
    return failed


def close(a, b):
    assert [s for s, _ in a] == [s for s, _ in b]
    return all(abs(x - y) <= ROUNDING * abs(y) for (_, x), (_, y) in zip(a, b))


def steps_of(folder):
    return [(r["step"], r["loss"]) for r in rows(folder) if "loss" in r]


def test_halving_keeps_the_rows_of_a_step():
    assert halved(8, 1) == (4, 2)
    assert halved(6, 5) == (3, 10)
    assert halved(9, 2) == (3, 6)  # by a divisor, so that processes share evenly
    assert halved(13, 1) == (1, 13)
    assert halved(1, 8) is None


def test_a_split_of_a_step_changes_nothing_but_rounding(here):
    for name in ("cpu", "mlx"):
        for rows_at_once, parts in ((8, 1), (2, 4)):
            args = [a if a != "cpu" else name for a in run_args(here)]
            more = (f"train.micro_batch_size={rows_at_once}", f"train.grad_accum_steps={parts}")
            assert train_here(*args, *more, "--max-steps", 3, "--save-dir", f"{name}{parts}") == 0
        whole, split = losses(here / f"{name}1"), losses(here / f"{name}4")
        assert len(whole) == 3 and close(whole, split)
        assert whole[-1][1] < whole[0][1] - 0.1


@pytest.mark.parametrize("name", ["cpu", "mlx", "mps"])
def test_a_run_goes_on_with_half_the_rows_and_the_same_curve(here, capsys, monkeypatch, name):
    if name == "mps":
        fake_mps_memory(monkeypatch)
        real_load = backends.load
        monkeypatch.setattr(
            backends, "load", lambda asked: create_fake_mps if asked == "mps" else real_load(asked)
        )
        ok = backends.Availability("mps", True, versions={"torch": torch.__version__})
        everything = backends.available()
        monkeypatch.setattr(backends, "available", lambda: {**everything, "mps": ok})
    args = [a if a != "cpu" else name for a in run_args(here)]
    args += ["train.ckpt_interval=5"]
    whole = ("train.micro_batch_size=4", "train.grad_accum_steps=2")
    assert train_here(*args, *whole, "--save-dir", "halved") == 0
    cls, error = {
        "cpu": (
            TorchBackend,
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        ),
        "mlx": (MlxBackend, RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")),
        "mps": (TorchBackend, RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")),
    }[name]
    failed = too_small(monkeypatch, cls, error, step=4, fits=4)
    capsys.readouterr()
    assert train_here(*args, "--save-dir", "a") == 0
    assert failed == [4]
    out = capsys.readouterr().out
    assert out.count("after step 3: the device ran out of memory") == 1
    assert "micro-batch 8 -> 4, accumulation 1 -> 2" in out
    assert "memory ran out after step 3: micro-batches of 4 rows, 2 a step" in out
    assert close(steps_of(here / "a"), steps_of(here / "halved"))
    # Recorded: in the log, the summary, the configuration and every checkpoint from there on.
    event = next(r for r in rows(here / "a") if "event" in r)
    assert (event["step"], event["when"]) == (3, "after step 3")
    assert (event["micro_batch_size"], event["grad_accum_steps"]) == (4, 2)
    summary = json.loads((here / "a" / "logs" / "final_training_summary.json").read_text())
    assert [e["when"] for e in summary["out_of_memory"]] == ["after step 3"]
    assert config_of(here / "a") == (4, 2)
    suffix = ".npz" if name == "mlx" else ".pt"
    saved = here / "a" / f"step_000003{suffix}"
    assert meta_of(saved).config["train"]["micro_batch_size"] == 4
    # The step that was saved for it goes on to the same bits as the run did.
    (here / "b").mkdir()
    (here / "b" / saved.name).write_bytes(saved.read_bytes())
    again = ("--resume", f"b/{saved.name}", "--save-dir", "c", "train.ckpt_interval=5")
    assert train_here(*again) == 0
    assert_same_checkpoint(here / "a" / f"step_000006{suffix}", here / "c" / f"step_000006{suffix}")
    assert [x for x in steps_of(here / "a") if x[0] > 3] == steps_of(here / "c")
    assert (
        meta_of(here / "a" / f"step_000006{suffix}").tokens_seen
        == rows(here / "halved")[-1]["tokens_processed"]
    )


def test_memory_that_runs_out_at_the_first_step_and_again(here, monkeypatch, capsys):
    error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
    )
    failed = too_small(monkeypatch, TorchBackend, error, step=1, fits=2)
    assert train_here(*run_args(here), "--save-dir", "a") == 0
    assert failed == [1, 1] and config_of(here / "a") == (2, 4)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    more = ("train.micro_batch_size=2", "train.grad_accum_steps=4", "--save-dir", "b")
    assert train_here(*run_args(here), *more) == 0
    # Nothing had been trained, so it is the same run bit for bit.
    assert_same_checkpoint(here / "a" / "step_000006.pt", here / "b" / "step_000006.pt")


def test_an_update_that_was_cut_short_goes_back_to_the_last_checkpoint(here, monkeypatch, capsys):
    more = ("train.micro_batch_size=4", "train.grad_accum_steps=2")
    args = run_args(here, "train.preflight=false")  # which takes a step of its own
    assert train_here(*args, *more, "--save-dir", "halved") == 0
    real, calls = Optimizer.step, []

    def cut_short(self, grads, numbers, ok, factor):
        calls.append(1)
        if len(calls) == 4:
            stacks, self._stacks = self._stacks, self._stacks[:1]
            real(self, list(grads), numbers, ok, factor)
            self._stacks = stacks
            raise torch.OutOfMemoryError("in the middle of the update")
        real(self, grads, numbers, ok, factor)

    monkeypatch.setattr(Optimizer, "step", cut_short)
    capsys.readouterr()
    assert train_here(*args, "--save-dir", "a") == 0
    assert "going on from step 2, the last saved one" in capsys.readouterr().out
    found = steps_of(here / "a")
    assert [s for s, _ in found] == [1, 2, 3, 4, 5, 6]
    assert close(found, steps_of(here / "halved"))
    final = meta_of(here / "a" / "step_000006.pt")
    assert final.tokens_seen == rows(here / "halved")[-1]["tokens_processed"]


def test_memory_that_runs_out_in_a_validation(here, monkeypatch, capsys):
    real, sizes = TorchBackend._place, []

    def failing(self, batch, *, step):
        if step == 0 and batch.tokens.shape[0] > 4 and self.mode == "train" and sizes:
            sizes.append(batch.tokens.shape[0])
            raise MemoryError("no memory for the host's arrays")
        if step == 2:
            sizes.append(0)
        return real(self, batch, step=step)

    monkeypatch.setattr(TorchBackend, "_place", failing)
    args = run_args(here, "train.eval_tokens=4000")
    assert train_here(*args, "--save-dir", "a") == 0
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert config_of(here / "a") == (4, 2) and 8 in sizes
    # The step whose validation failed was saved at once, and again with what was then measured.
    loop = meta_of(here / "a" / "step_000002.pt").loop
    assert loop["saved_best_step"] == 2 and (here / "a" / "best.pt").is_file()


def test_memory_that_runs_out_in_the_checks_before_the_first_step(here, monkeypatch, capsys):
    real = TorchBackend._place

    def failing(self, batch, *, step):
        if step == 0 and batch.tokens.shape[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, step=step)

    monkeypatch.setattr(TorchBackend, "_place", failing)
    assert train_here(*run_args(here), "--save-dir", "a") == 0
    assert "before step 1: the device ran out of memory" in capsys.readouterr().out
    assert config_of(here / "a") == (4, 2)


def test_one_row_that_does_not_fit_ends_the_run_saved(here, monkeypatch, capsys):
    too_small(monkeypatch, TorchBackend, torch.OutOfMemoryError("no more"), step=4, fits=0)
    args = run_args(here, "train.ckpt_interval=5", "train.gradient_checkpointing=true")
    assert train_here(*args, "--save-dir", "a") == 1
    err = capsys.readouterr().err
    assert err.startswith("P101 after step 3") and "cannot be halved" in err
    assert "saved: a/step_000003.pt" in err and "--resume a" in err
    assert not (here / "pippin-error.log").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert config_of(here / "a") == (1, 8)
    assert train_here("--resume", "a") == 0
    assert len(tensors(here / "a" / "step_000006.pt")) > 10


def swapping(budget_bytes):
    """Readings of a 16 GB Mac: calm for three checks, then above the budget while swap grows."""
    checks = []

    def read(device_bytes):
        n = len(checks)
        checks.append(n)
        over = n >= 3
        return Reading(
            at_s=2.0 * n,
            process_bytes=int(budget_bytes * (1.1 if over else 0.5)),
            device_bytes=device_bytes,
            swap_used_bytes=10**9 + (300_000_000 * (n - 2) if 3 <= n < 8 else 0),
            available_bytes=10**9,
            total_bytes=17_179_869_184,
        )

    return read


def watch_that_swaps(job):
    """The watch of a run, which reads what `swapping` gives at each step."""
    budget = Budget(job.budget_bytes, is_shared=True)
    return MemoryWatch(budget, read=swapping(job.budget_bytes), interval_s=None)


def test_a_run_that_swaps_is_made_smaller_before_it_fails(here, monkeypatch, capsys):
    monkeypatch.setattr(execute, "_watch", watch_that_swaps)
    args = run_args(here, "train.total_steps=12", "train.ckpt_interval=50")
    assert train_here(*args, "--save-dir", "a") == 0
    out = capsys.readouterr().out
    assert out.count("swap grew by") == 2  # the warning, and then what was done
    assert "--micro-batch-size 4 train.grad_accum_steps=2" in out
    assert "micro-batch 8 -> 4, accumulation 1 -> 2" in out
    assert config_of(here / "a") == (4, 2)
    more = ("train.micro_batch_size=4", "train.grad_accum_steps=2", "--save-dir", "b")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_here(*args, *more) == 0
    assert close(steps_of(here / "a"), steps_of(here / "b"))


def test_a_run_of_one_row_that_swaps_is_told_once_and_goes_on(here, monkeypatch, capsys):
    monkeypatch.setattr(execute, "_watch", watch_that_swaps)
    args = run_args(here, "train.total_steps=12", "train.micro_batch_size=1")
    assert train_here(*args, "--save-dir", "a") == 0
    assert capsys.readouterr().out.count("the run cannot be made smaller") == 1
    assert len(rows(here / "a")) == 12
