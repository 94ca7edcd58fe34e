"""Facts of this machine that need no framework: the chip, memory, power, and the backend to use."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from core.backend import MLX_CUDA_BUILDS, Availability
from core.errors import PippinError
from core.machine.apple import apple_facts, mac_cpu, sysctl_values
from core.machine.autoconfig import DeviceFacts
from core.machine.choose import choose_backend
from core.machine.cpu import cpu_facts, limits
from core.machine.facts import MachineFacts, Power
from core.machine.nvidia import nvidia_facts
from core.machine.probe import Probe, this_machine
from core.machine.scaling import replica_memory_bytes

SYSTEM_NAMES = {"Darwin": "macOS"}
Processor = Literal["apple", "nvidia", "cpu"]  # whose GPU, or none


@dataclass(frozen=True)
class Facts:
    """The machine in words, and the device that a run would use."""

    machine: str
    device: DeviceFacts


def machine_facts(probe: Probe | None = None, *, folder: str = ".") -> MachineFacts:
    """All that is known of a machine.

    Args:
        probe: Where the answers come from; this machine by default.
        folder: The folder whose disk matters.
    """
    probe = this_machine() if probe is None else probe
    memory = probe.memory()
    total = None if memory is None else memory.total_bytes
    allowed = limits(probe, total)
    on_mac = probe.system == "Darwin"
    values = sysctl_values(probe) if on_mac else {}
    apple = apple_facts(probe, values, total) if on_mac else None
    if apple is not None:
        total = total or apple.unified_memory_bytes
    return MachineFacts(
        system=SYSTEM_NAMES.get(probe.system, probe.system),
        system_version=probe.system_version(),
        architecture=probe.architecture,
        cpu=mac_cpu(probe, values) if on_mac else cpu_facts(probe, allowed),
        memory_bytes=total,
        available_bytes=None if memory is None else memory.available_bytes,
        swap_used_bytes=None if memory is None else memory.swap_used_bytes,
        limits=allowed,
        apple=apple,
        nvidia=None if on_mac else nvidia_facts(probe),
        power=_power(probe),
        disk_folder=folder,
        disk_free_bytes=probe.disk_free(folder),
    )


def device_facts(
    wanted: str | None, available: Mapping[str, Availability], *, probe: Probe | None = None
) -> Facts:
    """The device of a run.

    Args:
        wanted: Backend that was asked for, None for the best one here.
        available: What `backends.available()` says.
        probe: Where the machine's answers come from; this machine by default.

    Raises:
        PippinError: P501 where no backend is here at all.
    """
    probe = this_machine() if probe is None else probe
    is_apple_silicon = probe.system == "Darwin" and probe.architecture == "arm64"
    if wanted is None:
        name, reason = choose_backend(available, is_apple_silicon=is_apple_silicon)
    else:
        name, reason = wanted, ""
        if name in available and not available[name].ok:
            raise _not_here(name, available)
    facts = machine_facts(probe)
    packages = tuple(available[name].versions) if name in available else ()
    processor = computes_on(name, facts, packages)
    return Facts(
        machine=describe(facts, name, packages),
        device=DeviceFacts(
            backend=name,
            reason=reason,
            is_gpu=processor != "cpu",
            native_bf16=native_bf16(name, facts, packages),
            budget_bytes=budget_bytes(name, facts, packages),
            memory_bytes=replica_memory_bytes("cuda" if processor == "nvidia" else name, facts),
        ),
    )


def _not_here(name: str, available: Mapping[str, Availability]) -> PippinError:
    state = available[name]
    return PippinError(
        state.code,
        f"backend {name} cannot run here: {state.reason}.",
        choices=[n for n, a in available.items() if a.ok],
        remedy=state.remedy,
        kept="nothing was started.",
    )


def computes_on(backend: str, facts: MachineFacts, packages: Collection[str] = ()) -> Processor:
    """What a backend computes on, without asking its framework.

    MLX computes on Apple's GPU; elsewhere it depends on which of its builds is installed, and the
    ordinary one computes on the CPU, whatever card is in the machine.

    Args:
        backend: Its name.
        facts: The machine.
        packages: Names of the backend's installed packages, as `Availability.versions` has them.
    """
    if backend == "mps" or (backend == "mlx" and facts.apple is not None):
        return "apple"
    has_cuda_build = any(name in packages for name in MLX_CUDA_BUILDS)
    if backend == "cuda" or (backend == "mlx" and facts.nvidia is not None and has_cuda_build):
        return "nvidia"
    return "cpu"


def gpu_budget_bytes(facts: MachineFacts) -> int | None:
    """What one process may use on the GPU: a Mac's working set, or one card's memory; never a sum."""
    if facts.apple is not None:
        return facts.apple.recommended_working_set_bytes
    return None if facts.nvidia is None else facts.nvidia.replica_memory_bytes


def budget_bytes(backend: str, facts: MachineFacts, packages: Collection[str] = ()) -> int:
    """Memory in bytes that a run on this backend has to itself.

    Args:
        backend: Its name.
        facts: The machine.
        packages: As in `computes_on`.

    Raises:
        PippinError: P101 where the machine does not say how much memory it has.
    """
    on_gpu = computes_on(backend, facts, packages) != "cpu"
    gpu = gpu_budget_bytes(facts) if on_gpu else None
    found = gpu if gpu is not None else facts.usable_memory_bytes
    if found is None:
        raise PippinError(
            "P101",
            "this machine does not say how much memory it has.",
            remedy="python tools/setup_verification.py   (shows what was found)",
            kept="nothing was started.",
        )
    return found


def describe(
    facts: MachineFacts, backend: str | None = None, packages: Collection[str] = ()
) -> str:
    """The machine in one line.

    Args:
        facts: The machine.
        backend: The backend of a run, which says whether the GPU matters; None shows it.
        packages: As in `computes_on`.
    """
    cores = facts.cpu.physical_cores or facts.cpu.logical_cores
    parts = [facts.cpu.name]
    with_gpu = backend is None or computes_on(backend, facts, packages) != "cpu"
    gpu = gpu_budget_bytes(facts) if with_gpu else None
    if facts.nvidia is not None and with_gpu:
        cards = facts.nvidia.gpus
        count = f"{len(cards)} x " if len(cards) > 1 else ""
        parts.insert(0, f"{count}{cards[0].name}")
    if cores is not None:
        usable, threads = facts.cpu.usable_cores, facts.cpu.logical_cores
        fewer = usable is not None and threads is not None and usable < threads
        parts.append(f"{cores} cores" + (f" (limited to {usable} threads)" if fewer else ""))
    if facts.memory_bytes is not None:
        text = gib(facts.memory_bytes)
        if facts.limits.memory_bytes is not None:
            text += f" (limited to {gib(facts.limits.memory_bytes)})"
        parts.append(text + (f" ({gib(gpu)} for the GPU)" if gpu is not None else ""))
    parts.append(system_words(facts))
    power = power_words(facts.power)
    return " · ".join([*parts, power] if power else parts)


def gib(value: int) -> str:
    """Bytes as GiB, the unit in which memory is sold: "16 GiB", "11.8 GiB"."""
    size = value / (1 << 30)
    return f"{size:.0f} GiB" if abs(size - round(size)) < 0.05 else f"{size:.1f} GiB"


def system_words(facts: MachineFacts) -> str:
    """The system: "macOS 15.5", "Linux x86_64"."""
    if facts.system == "macOS":
        return f"macOS {facts.system_version or ''}".strip()
    return f"{facts.system} {facts.architecture}"


def power_words(power: Power) -> str:
    """Of a machine with a battery, where its power comes from."""
    if power.battery_percent is None:
        return ""
    if power.on_mains is None:
        return f"battery at {power.battery_percent:.0f} %"
    if power.on_mains:
        return "mains"
    return f"on battery {power.battery_percent:.0f} %: plug in for long runs"


def native_bf16(backend: str, facts: MachineFacts, packages: Collection[str] = ()) -> bool:
    """Whether the device multiplies bfloat16 at full rate or better than float32.

    M1 and M2 run bfloat16 at half the rate of float16 and no faster than float32; M3 and later have
    it. NVIDIA has it from compute capability 8.0. CPUs stay at float32, where a run is exact across
    backends.

    Args:
        backend: Its name.
        facts: The machine.
        packages: As in `computes_on`.
    """
    processor = computes_on(backend, facts, packages)
    if processor == "apple" and facts.apple is not None:
        return (facts.apple.generation or 0) >= 3
    if processor == "nvidia" and facts.nvidia is not None:
        return all(g.native_bf16 for g in facts.nvidia.gpus)
    return False


def _power(probe: Probe) -> Power:
    battery = probe.battery()
    if battery is None:
        return Power(True, None)
    return Power(battery.plugged, battery.percent)
