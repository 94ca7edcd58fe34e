"""Tiny runs of train.py for the tests: a small text, a small model, and how to read what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import backends
import train
from core.paths import PROJECT_ROOT

TINY = (
    "model.d_model=16",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_ff=24",
    "data.seq_len=24",
    "data.tokenizer=byte",
    "train.micro_batch_size=2",
    "train.eval_tokens=96",
    "train.samples=0",
    "train.log_interval=1",
    "data.val_fraction=0.1",
)


def write_text(folder: Path, num_lines: int = 200) -> Path:
    """A text that a tiny model can begin to learn."""
    path = folder / "words.txt"
    words = ("ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
    lines = [" ".join(words[(i * k + k) % 8] for k in range(1, 8)) for i in range(num_lines)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def start(folder: Path, *more: object) -> tuple[object, ...]:
    """The arguments of a tiny run of 6 steps with a checkpoint at each second one."""
    args = ("--input_file", write_text(folder), "--backend", "cpu", *TINY)
    lengths = ("train.total_steps=6", "train.ckpt_interval=2", "train.eval_interval=2")
    return (*args, *lengths, "train.ckpt_keep=9", *more)


def train_here(*args: object) -> int:
    """Run train.py in this process, in the current directory; returns the exit code."""
    return train.main([str(a) for a in args])


def train_process(*args: object, cwd: Path, **kwargs: object) -> "subprocess.Popen[str]":
    """Start train.py as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(PROJECT_ROOT / "train.py"), *map(str, args)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,  # type: ignore[call-overload]
    )


def rows(folder: Path) -> list[dict[str, object]]:
    """Rows of a run's metrics.jsonl."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, verified."""
    ckpt = backends.open_checkpoint(path)
    try:
        return {name: ckpt.read(name) for name in ckpt.names}
    finally:
        ckpt.close()


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Bit for bit the same tensors, optimizer state included."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and any(k.startswith("optim/") for k in first)
    different = [k for k in first if first[k].tobytes() != second[k].tobytes()]
    assert not different, different


def losses(folder: Path) -> list[tuple[object, object]]:
    """(step, loss) of every row."""
    return [(row["step"], row["loss"]) for row in rows(folder)]
