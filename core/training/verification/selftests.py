"""All self-tests of one backend, in this process or in one of its own.

In a process of its own a crash of a kernel ends that process, not the report, and two frameworks never
share one.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from core.backend import CreateBackend
from core.checkpoint import Checkpoint
from core.errors import PippinError
from core.training.verification import forward, updates
from core.training.verification.bench import Bench
from core.training.verification.report import Check

TIMEOUT_S = 600.0
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Subject:
    """What is tested, in a form that another process can be given.

    Attributes:
        backend: Name of the backend.
        load: `backends.load`.
        open_checkpoint: `backends.open_checkpoint`.
        suffixes: Checkpoint suffixes that can be written here.
        is_gpu: Whether it computes on a GPU.
        compiles: Whether the run compiles.
        quick: Only the short tests.
    """

    backend: str
    load: Callable[[str], CreateBackend]
    open_checkpoint: Callable[[Path], Checkpoint]
    suffixes: tuple[str, ...]
    is_gpu: bool
    compiles: bool
    quick: bool


def run_here(subject: Subject) -> Iterator[Check]:
    """Every self-test; an error in one is a failed check, and the others go on."""
    group = f"backend {subject.backend}"
    try:
        create = subject.load(subject.backend)
    except PippinError as error:
        yield Check(group, "loads", "fail", error.what, remedy=error.remedy)
        return
    with tempfile.TemporaryDirectory(prefix="pippin-verify-") as folder:
        bench = Bench(
            subject.backend,
            create,
            Path(folder),
            is_gpu=subject.is_gpu,
            compiles=subject.compiles,
            quick=subject.quick,
        )
        for name, test in _tests(bench, subject):
            try:
                yield from test()
            except PippinError as error:
                yield Check(group, name, "fail", error.what, remedy=error.remedy)
            except Exception as error:  # a kernel may raise anything; the others still count
                figure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                yield Check(group, name, "fail", figure, remedy=forward.BROKEN)


def _tests(bench: Bench, subject: Subject) -> list[tuple[str, Callable[[], Iterator[Check]]]]:
    opener = subject.open_checkpoint
    short: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("no leak", lambda: forward.causal(bench)),
        ("attention", lambda: forward.against_float64(bench)),
        ("gradients", lambda: updates.backward(bench)),
        ("Muon's update", lambda: updates.muon(bench)),
        ("AdamW's update", lambda: updates.adamw(bench)),
    ]
    if bench.quick:
        return short
    return [
        *short,
        ("grouped heads", lambda: forward.grouped_heads(bench)),
        ("large vocabulary", lambda: forward.large_vocabulary(bench)),
        ("clip", lambda: updates.clip(bench)),
        ("dropout", lambda: updates.dropout(bench, opener)),
        ("compiled step", lambda: updates.compiled(bench)),
        ("conversion", lambda: updates.conversion(bench, opener, subject.suffixes)),
        ("memory", lambda: updates.memory_slope(bench)),
    ]


def run_apart(subject: Subject, *, timeout_s: float = TIMEOUT_S) -> Iterator[Check]:
    """The same in a process of its own; checks come as they are done."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(subject, sender), daemon=True)
    with _one_thread():
        process.start()
    sender.close()
    group = f"backend {subject.backend}"
    finished = False
    try:
        while receiver.poll(timeout_s):
            try:
                check = receiver.recv()
            except EOFError:
                break
            if check is None:
                finished = True
                break
            yield check
        else:
            process.terminate()
            figure = f"no answer in {timeout_s:.0f} s"
            yield Check(group, "self-tests", "fail", figure, remedy=forward.BROKEN)
            return
        process.join(10)
        if not finished:
            code = process.exitcode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
            figure = f"the process ended {how} in the test after the last one above"
            yield Check(group, "self-tests", "fail", figure, remedy=forward.BROKEN)
    finally:
        if process.is_alive():
            process.terminate()
        receiver.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Child processes started inside compute with one thread.

    The tensors are tiny: threads would wait for each other, and where other programs run for long.
    """
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _child(subject: Subject, sender: "Connection[Check | None, None]") -> None:
    for check in run_here(subject):
        sender.send(check)
    sender.send(None)
    sender.close()
