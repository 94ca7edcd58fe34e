"""One verification: the machine, the configuration and what it needs, and the backends' self-tests."""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.backend import Availability
from core.config.draft import Draft
from core.config.load import load
from core.errors import PippinError
from core.machine import detect
from core.machine.autoconfig import DeviceFacts
from core.machine.backends import Backends
from core.machine.facts import MachineFacts
from core.machine.probe import Probe, this_machine
from core.training.verification import surroundings
from core.training.verification.report import Check, Report
from core.training.verification.selftests import Subject, run_apart, run_here

DEFAULT_CONFIG = "quickstart"
# Problems of the command line, not of what is verified.
USAGE_CODES = ("P011", "P012")


@dataclass(frozen=True)
class Request:
    """What is to be verified.

    Attributes:
        config: Preset or file; None is what `python train.py` uses.
        backend: The only backend to test; None is every one that is here.
        overrides: `section.key=value`.
        flags: Dotted keys from first-class flags.
        quick: Only the self-tests that find a broken installation in seconds, and no configuration
            unless one is named.
        online: Reach a dataset of the hub, instead of only asking for its library.
        apart: Each backend in a process of its own, so that a crash is a failed check.
        command: The program with the flag before the configuration's name, for a remedy.
    """

    config: str | None = None
    backend: str | None = None
    overrides: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    online: bool = False
    apart: bool = True
    command: str = "python tools/setup_verification.py --config"


def verify(
    request: Request,
    backends: Backends,
    *,
    show: Callable[[Check], None] = lambda check: None,
    probe: Probe | None = None,
) -> Report:
    """Run all checks.

    Args:
        request: What is to be verified.
        backends: What `backends` offers.
        show: Takes each check as it is done.
        probe: Where the machine's answers come from; this machine by default.

    Raises:
        PippinError: P011 or P012 for a configuration that is not there or an override that is none.
    """
    started = time.monotonic()
    probe = this_machine() if probe is None else probe
    facts = detect.machine_facts(probe)
    report = Report(facts.as_object(), detect.describe(facts))
    for check in _checks(request, backends, facts, probe):
        report.checks.append(check)
        show(check)
    report.seconds = time.monotonic() - started
    return report


def _checks(
    request: Request, backends: Backends, facts: MachineFacts, probe: Probe
) -> Iterator[Check]:
    # First of all, so that a wrong command line ends before anything is shown.
    draft, problem = _draft(request)
    yield from surroundings.machine(facts)
    available = backends.available()
    wanted = request.backend
    if wanted is None and draft is not None and not draft.is_auto("train.backend"):
        wanted = str(draft.values["train.backend"]) if request.config is not None else None
    present, checks = surroundings.backends_here(available, wanted)
    yield from checks
    compiles = False
    if problem is not None:
        yield problem
    elif draft is not None and not (request.quick and request.config is None):
        yield from _configuration(draft, request, available, probe)
        compiles = draft.values["train.compile"] is True
    for name in _tested(present, quick=request.quick):
        yield from _self_tests(name, request, backends, facts, available, compiles=compiles)


def _draft(request: Request) -> tuple[Draft | None, Check | None]:
    config = request.config or DEFAULT_CONFIG
    try:
        draft = load(
            config=config,
            overrides=request.overrides,
            flags=dict(request.flags),
            command=request.command,
        )
        return draft, None
    except PippinError as error:
        if error.code in USAGE_CODES:
            raise
        return None, surroundings.failed("config", "fields", error)


def _configuration(
    draft: Draft, request: Request, available: Mapping[str, Availability], probe: Probe
) -> Iterator[Check]:
    name = request.config or DEFAULT_CONFIG
    yield Check("config", "fields", "pass", f"{name}: {len(draft.values)} keys")
    yield surroundings.tokenizer(draft)
    text, text_bytes = surroundings.dataset(draft, online=request.online)
    device = _device(draft, request, available, probe)
    planned = None
    if isinstance(device, Check):
        yield device
    else:
        try:
            planned = surroundings.plan(draft, device, text_bytes)
            yield Check("config", "values together", "pass", "they do not contradict each other")
        except PippinError as error:
            yield surroundings.failed("config", "values together", error)
    yield text
    if planned is None:
        return
    yield surroundings.memory(draft, planned)
    yield surroundings.disk(planned, surroundings.free_bytes)
    yield from surroundings.folders(draft)


def _device(
    draft: Draft, request: Request, available: Mapping[str, Availability], probe: Probe
) -> DeviceFacts | Check:
    """The device of a run, or why there is none."""
    given = None if draft.is_auto("train.backend") else str(draft.values["train.backend"])
    try:
        return detect.device_facts(request.backend or given, available, probe=probe).device
    except PippinError as error:
        return surroundings.failed("config", "device of a run", error)


def _tested(present: list[str], *, quick: bool) -> list[str]:
    """Backends whose self-tests run; a GPU's torch makes the CPU's quick test superfluous."""
    if quick and {"mps", "cuda"} & set(present):
        return [name for name in present if name != "cpu"]
    return present


def _self_tests(
    name: str,
    request: Request,
    backends: Backends,
    facts: MachineFacts,
    available: Mapping[str, Availability],
    *,
    compiles: bool,
) -> Iterator[Check]:
    packages = tuple(available[name].versions)
    has_torch = importlib.util.find_spec("torch") is not None
    subject = Subject(
        backend=name,
        load=backends.load,
        open_checkpoint=backends.open_checkpoint,
        suffixes=(".npz", ".pt") if has_torch else (".npz",),
        is_gpu=detect.computes_on(name, facts, packages) != "cpu",
        compiles=compiles,
        quick=request.quick,
    )
    yield from run_apart(subject) if request.apart else run_here(subject)
