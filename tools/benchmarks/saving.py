"""Cost of saving and loading a checkpoint, against plainly writing and reading as many bytes."""

import gc
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from core.backend import Backend
from core.checkpoint import Checkpoint, Meta, initial_checkpoint, verify
from core.config.load import build, load
from core.config.schema import RunConfig
from core.durable import flush_to_disk
from core.errors import PippinError
from core.machine.autoconfig import DataFacts, DeviceFacts, resolve_auto, resolve_early
from core.machine.memory import checkpoint_bytes
from core.machine.system import system_memory
from core.params import param_specs, slot_specs
from tools.benchmarks.report import GB, Measured, OtherLoad, median

MAX_CPU_S_PER_GB = 2.0
MAX_WALL_RATIO = 2.0
LAYERS = 12
HEAD_DIM = 64
# Vocabulary as a multiple of the width: 33,792 words at width 768.
VOCAB_PER_WIDTH = 44
_CHUNK_BYTES = 8 << 20

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass: of the clock, and of all processors, of which the system's share."""

    wall_s: float
    cpu_s: float
    system_s: float = 0.0


def checkpoint_config(num_params: int, backend: str) -> RunConfig:
    """A 12-layer model with about `num_params` parameters; 137 million have width 768."""
    # 12 layers of 12 d^2 and an embedding and a head of 44 d^2 each.
    width = math.sqrt(num_params / (LAYERS * 12 + 2 * VOCAB_PER_WIDTH))
    step = HEAD_DIM if width >= 4 * HEAD_DIM else 8
    width = max(step * round(width / step), 8)
    values = {
        "model.d_model": width,
        "model.n_layers": LAYERS,
        "model.n_heads": width // step,
        "model.vocab_size": VOCAB_PER_WIDTH * width,
        "model.tie_embeddings": False,
        "model.mlp_multiple": 8 / 3,
        "train.backend": backend,
        "train.precision": "float32",
    }
    draft = load(flags=values)
    device = DeviceFacts(backend, "", is_gpu=False, native_bf16=False, budget_bytes=1 << 40)
    resolve_early(draft, device)
    draft.resolve("data.tokenizer", "byte", "not used")
    draft.resolve("train.save_dir", "checkpoints/benchmark", "nothing is kept there")
    resolve_auto(draft, DataFacts(VOCAB_PER_WIDTH * width, 10**6, "", False), device, None)
    return build(draft)


def random_tensors(config: RunConfig) -> Tensors:
    """Every tensor of a full checkpoint, of random float32 values."""
    specs = param_specs(config.model)
    rng = np.random.default_rng(0)
    shapes = {s.name: s.shape for s in specs}
    shapes |= {s.key: s.shape for s in slot_specs(config.train.optimizer, specs)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


class RandomCheckpoint:
    """A full checkpoint in memory, for a backend to load."""

    def __init__(self, meta: Meta, tensors: Tensors) -> None:
        self.meta = meta
        self.names = tuple(tensors)
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """All are float32."""
        return "float32"

    def read(self, name: str) -> NDArray[Any]:
        """The tensor."""
        return self._tensors[name]

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Subject:
    """What is measured.

    Attributes:
        label: In words.
        size: Bytes of all tensors.
        save: Writes a checkpoint to a path.
        load: Reads one, all checksums compared.
        arrays: The tensors, streamed, for the plain write of the same bytes.
        close: Gives back what is held.
    """

    label: str
    size: int
    suffix: str
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    arrays: Callable[[], Iterator[NDArray[Any]]]
    close: Callable[[], None]


def format_subject(suffix: str, config: RunConfig) -> Subject:
    """The writer and reader of a format alone, with tensors in memory."""
    fmt = backends.checkpoint_format(suffix)
    tensors, meta = random_tensors(config), _meta(config)
    return Subject(
        label=f"{suffix} format",
        size=sum(v.nbytes for v in tensors.values()),
        suffix=suffix,
        save=lambda path: fmt.write(path, meta, tensors.items()),
        load=lambda path: _verify(fmt.open(path)),
        arrays=lambda: iter(tensors.values()),
        close=tensors.clear,
    )


def backend_subject(name: str, config: RunConfig) -> Subject:
    """A backend's own save and load, with the copies from and to its device."""
    specs, meta = param_specs(config.model), _meta(config)
    backend: Backend = backends.load(name)(config, specs, mode="train")
    backend.load(RandomCheckpoint(meta, random_tensors(config)))
    gc.collect()

    def read(path: Path) -> None:
        ckpt = backends.open_checkpoint(path)
        try:
            backend.load(ckpt)
            backend.synchronize()
        finally:
            ckpt.close()

    return Subject(
        label=f"backend {name}, {backend.suffix}",
        size=checkpoint_bytes(config, specs),
        suffix=backend.suffix,
        save=lambda path: backend.save(path, meta).result(),
        load=read,
        arrays=lambda: (array for _, array in backend.tensors()),
        close=backend.close,
    )


def _meta(config: RunConfig) -> Meta:
    initial = initial_checkpoint(config, param_specs(config.model)).meta
    return replace(initial, step=1000, dtypes={}, shapes={}, checksums={})


def _verify(ckpt: Checkpoint) -> None:
    try:
        verify(ckpt)
    finally:
        ckpt.close()


def check_room(folder: Path, size: int, *, copies: float) -> None:
    """Refuse what would fill the disk or the memory.

    Args:
        folder: Where files are written.
        size: Bytes of one checkpoint.
        copies: How many of it are in memory.

    Raises:
        PippinError: P312 for the disk, P101 for memory.
    """
    if not folder.is_dir():
        raise PippinError("P312", f"the folder {folder} does not exist.", remedy="--folder .")
    needed, free = int(1.2 * size), shutil.disk_usage(folder).free
    if free < needed:
        raise PippinError(
            "P312",
            f"the disk of {folder} has {free / GB:.2f} GB free, one checkpoint needs "
            f"{needed / GB:.2f} GB.",
            remedy="--folder ANOTHER, or smaller --params",
            kept="nothing was written.",
        )
    memory, wanted = system_memory().available_bytes, int(copies * size)
    if memory < wanted:
        raise PippinError(
            "P101",
            f"{wanted / GB:.2f} GB of memory are needed, {memory / GB:.2f} GB are available.",
            remedy="smaller --params",
            kept="nothing was written.",
        )


def measure_save(
    subject: Subject, folder: Path, repeats: int
) -> tuple[list[Measured], dict[str, list[Cost]]]:
    """Plain writes and saves in turn, each to a new file that is then removed."""
    costs: dict[str, list[Cost]] = {"save": [], "plain": []}
    others = OtherLoad()
    with tempfile.TemporaryDirectory(prefix=".pippin-benchmark-", dir=folder) as name:
        place = Path(name)
        jobs: dict[str, Callable[[Path], object]] = {
            "plain": lambda path: plain_write(path, subject.arrays()),
            "save": subject.save,
        }
        for i in range(repeats + 1):
            # Turn about, so that neither always has the emptier cache; the first round is a warm-up.
            for kind in ("plain", "save") if i % 2 else ("save", "plain"):
                path = place / f"step_{i:06d}{subject.suffix}"
                _back_memory(path, subject.arrays())
                cost = timed(partial(jobs[kind], path))
                path.unlink()
                if i > 0:
                    costs[kind].append(cost)
    rows = save_figures(costs["save"], costs["plain"], subject.size)
    return [*rows, others.figure()], costs


def measure_load(
    subject: Subject, folder: Path, repeats: int
) -> tuple[list[Measured], dict[str, list[Cost]]]:
    """Plain reads and loads of one file in turn; the file is in the system's cache."""
    costs: dict[str, list[Cost]] = {"load": [], "plain": []}
    others = OtherLoad()
    with tempfile.TemporaryDirectory(prefix=".pippin-benchmark-", dir=folder) as name:
        path = Path(name) / f"step_000001{subject.suffix}"
        subject.save(path)
        for i in range(repeats + 1):
            plain, own = timed(lambda: plain_read(path)), timed(lambda: subject.load(path))
            if i > 0:
                costs["plain"].append(plain)
                costs["load"].append(own)
    rows = load_figures(costs["load"], costs["plain"], subject.size)
    return [*rows, others.figure()], costs


def timed(job: Callable[[], object]) -> Cost:
    """Seconds of a job: of the clock, and of all processor time of this process."""
    gc.collect()
    before, start = os.times(), time.perf_counter()
    cpu = time.process_time()
    job()
    cpu = time.process_time() - cpu
    return Cost(time.perf_counter() - start, cpu, os.times().system - before.system)


def plain_write(path: Path, arrays: Iterator[NDArray[Any]], *, flush: bool = True) -> None:
    """Write the arrays' bytes and flush them to the disk, as little as can be done."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for array in arrays:
            view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            while view:
                view = view[os.write(fd, view[:_CHUNK_BYTES]) :]
        if flush:
            flush_to_disk(fd)
    finally:
        os.close(fd)


def _back_memory(path: Path, arrays: Iterator[NDArray[Any]]) -> None:
    """Fill as much of the file cache as the next pass needs, and free it again.

    A virtual machine gives free memory back to its host within seconds, and getting it again takes
    up to 2 s of processor time a GB (measured 2026-11), by chance of a save or of a plain write.
    """
    plain_write(path, arrays, flush=False)
    path.unlink()


def plain_read(path: Path) -> None:
    """Read a file and keep nothing."""
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def save_figures(save: Sequence[Cost], plain: Sequence[Cost], size: int) -> list[Measured]:
    """What is reported of saves and plain writes of `size` bytes."""
    wall, base = (median([c.wall_s for c in costs]) for costs in (save, plain))
    cpu, base_cpu = (median([c.cpu_s for c in costs]) * GB / size for costs in (save, plain))
    system = median([c.system_s for c in save]) * GB / size
    return [
        Measured("checkpoint", size / GB, "GB", note="weights and optimizer state"),
        Measured(
            "save, processor", cpu, "s/GB", MAX_CPU_S_PER_GB, f"all threads; system {system:.2f}"
        ),
        Measured("plain write, processor", base_cpu, "s/GB"),
        Measured("save", wall, "s", note=_spread(save)),
        Measured("plain write and fsync", base, "s", note=_spread(plain)),
        Measured("save : plain write", wall / base, "", MAX_WALL_RATIO, "of the medians"),
    ]


def load_figures(load: Sequence[Cost], plain: Sequence[Cost], size: int) -> list[Measured]:
    """What is reported of loads and plain reads of `size` bytes; nothing is demanded."""
    wall, base = (median([c.wall_s for c in costs]) for costs in (load, plain))
    cpu = median([c.cpu_s for c in load]) * GB / size
    return [
        Measured("checkpoint", size / GB, "GB", note="weights and optimizer state"),
        Measured("load, processor", cpu, "s/GB", note="every checksum compared"),
        Measured("load", wall, "s", note=_spread(load)),
        Measured("plain read", base, "s", note="from the system's cache"),
        Measured("load : plain read", wall / base, ""),
    ]


def _spread(costs: Sequence[Cost]) -> str:
    walls = [c.wall_s for c in costs]
    return f"median of {len(walls)}, {min(walls):.2f} to {max(walls):.2f}"
