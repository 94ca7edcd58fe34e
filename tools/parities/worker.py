"""One backend's share of the comparison, in a process of its own.

A process each, because MLX reads its environment once, frameworks would share threads and memory,
and a fault of one must not touch the other. What a worker found lies in the job's folder.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from core.backend import Backend
from core.checkpoint import Checkpoint, Meta, initial_checkpoint
from core.config.schema import RunConfig
from core.params import param_specs
from core.training.schedule import step_hyper
from tools.parities.experiment import open_loader, prompts

JOB_NAME = "job.json"
INITIAL_NAME = "initial.npz"
RUN = "run"
# The final gain multiplies every logit, whatever the architecture and its initial values.
FAULTY_TENSOR = "norm.weight"


class FaultyCheckpoint:
    """A checkpoint whose final gain is wrong by a factor: what the self-test must find."""

    def __init__(self, inner: Checkpoint, factor: float) -> None:
        self._inner = inner
        self._factor = factor
        self.meta, self.names = inner.meta, inner.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._inner.shape(name)

    def dtype(self, name: str) -> str:
        """Storage dtype of a tensor."""
        return self._inner.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor, scaled if it is the faulty one."""
        values = self._inner.read(name)
        return values * np.float32(self._factor) if name == FAULTY_TENSOR else values

    def close(self) -> None:
        """Close the file."""
        self._inner.close()


def write_job(folder: Path, config: RunConfig, num_steps: int) -> None:
    """Write what every worker reads: the job, and the checkpoint that all start from."""
    job = {"config": config.model_dump(mode="json"), "num_steps": num_steps}
    (folder / JOB_NAME).write_text(json.dumps(job), encoding="utf-8")
    specs = param_specs(config.model)
    initial = initial_checkpoint(config, specs)
    tensors = ((name, initial.read(name)) for name in initial.names)
    backends.checkpoint_format(".npz").write(folder / INITIAL_NAME, initial.meta, tensors)


def result_path(folder: Path, task: str, suffix: str) -> Path:
    """Where the result of a task lies: `mlx.json`, `mlx.npz`, `mlx-from-cpu.json`."""
    return folder / f"{task}{suffix}"


def half_way(num_steps: int) -> int:
    """The step after which runs are handed over."""
    return max(num_steps // 2, 1)


def run_worker(folder: Path, name: str, tasks: Sequence[str], *, fault: float) -> None:
    """Run the experiment on a backend, and go on from the checkpoints of other backends.

    Args:
        folder: Holds the job.
        name: The backend.
        tasks: "run" is the experiment from its start; another backend's name is the second half
            from that backend's checkpoint.
        fault: Relative size of an injected fault, 0 for none.

    Raises:
        PippinError: P501, P502 if the backend is not here, and whatever it raises.
    """
    job = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))
    job["config"]["train"]["backend"] = name
    config = RunConfig.model_validate(job["config"])
    backend = backends.load(name)(config, param_specs(config.model), mode="train")
    try:
        for task in tasks:
            if task == RUN:
                _run(folder, backend, config, job["num_steps"], fault)
            else:
                _continue(folder, backend, config, task, job["num_steps"], fault)
    finally:
        backend.close()


def _run(folder: Path, backend: Backend, config: RunConfig, num_steps: int, fault: float) -> None:
    started = time.perf_counter()
    initial = backends.open_checkpoint(folder / INITIAL_NAME)
    backend.load(FaultyCheckpoint(initial, 1 + fault) if fault else initial)
    before = _weights(backend)
    arrays: dict[str, NDArray[Any]] = {}
    losses: list[float] = []
    norms: list[float] = []
    with open_loader(config, num_steps, start_step=1) as loader:
        for batch in loader:
            if batch.step == 1:
                arrays["logits"] = backend.logits(batch.micro[0].tokens)
            metrics = backend.train_step(
                batch.micro, step_hyper(batch.step, config.train, batch.normalizer)
            )
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
            if batch.step == 1:
                after = _weights(backend)
                arrays |= {f"update/{name}": after[name] - before[name] for name in before}
            if batch.step == half_way(num_steps):
                path = result_path(folder, f"half-{backend.name}", backend.suffix)
                backend.save(path, _meta(initial.meta, batch.step)).result()
            if batch.step == num_steps:
                break
    initial.close()
    arrays |= {f"final/{name}": value for name, value in _weights(backend).items()}
    tokens, leads = greedy(backend, config)
    info = backend.device_info()
    np.savez(result_path(folder, backend.name, ".npz"), **arrays)  # type: ignore[arg-type]
    result = {
        "losses": losses,
        "grad_norms": norms,
        "tokens": tokens,
        "leads": leads,
        "device": info.device,
        "framework": info.framework,
        "checkpoint": f"half-{backend.name}{backend.suffix}",
        "seconds": time.perf_counter() - started,
    }
    path = result_path(folder, backend.name, ".json")
    path.write_text(json.dumps(result), encoding="utf-8")


def _continue(
    folder: Path, backend: Backend, config: RunConfig, source: str, num_steps: int, fault: float
) -> None:
    theirs = json.loads(result_path(folder, source, ".json").read_text(encoding="utf-8"))
    ckpt = backends.open_checkpoint(folder / theirs["checkpoint"])
    try:
        backend.load(FaultyCheckpoint(ckpt, 1 + fault) if fault else ckpt)
        first = ckpt.meta.step + 1
    finally:
        ckpt.close()
    losses: list[float] = []
    with open_loader(config, num_steps, start_step=first) as loader:
        for batch in loader:
            if batch.step > num_steps:
                break
            hyper = step_hyper(batch.step, config.train, batch.normalizer)
            losses.append(float(backend.train_step(batch.micro, hyper)["loss"]))
    path = result_path(folder, f"{backend.name}-from-{source}", ".json")
    path.write_text(json.dumps({"first_step": first, "losses": losses}), encoding="utf-8")


def _meta(initial: Meta, step: int) -> Meta:
    return replace(initial, step=step, dtypes={}, shapes={}, checksums={})


def _weights(backend: Backend) -> dict[str, NDArray[Any]]:
    """Copies of the parameters."""
    return {name: np.array(value) for name, value in backend.tensors(optimizer=False)}


def greedy(backend: Backend, config: RunConfig) -> tuple[list[list[int]], list[list[float]]]:
    """The most likely continuation of each prompt, through the cache.

    Returns:
        Token ids of each row, and the lead of each over the second best, as a logit.
    """
    rows, count = prompts(config)
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), int(lengths.max())), np.int32)  # [B, T]
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    cache = backend.start(len(rows), int(lengths.max()) + count)
    chosen: list[NDArray[np.int64]] = []
    leads: list[NDArray[np.float32]] = []
    for _ in range(count):
        logits = backend.decode(tokens, lengths, cache)  # [B, V]
        top = np.sort(logits, axis=-1)[:, -2:]  # [B, 2]
        leads.append(top[:, 1] - top[:, 0])
        chosen.append(logits.argmax(axis=-1))
        tokens = chosen[-1].astype(np.int32)[:, None]  # [B, 1]
        lengths = np.ones(len(rows), np.int32)
    return np.stack(chosen, axis=1).tolist(), np.stack(leads, axis=1).tolist()
