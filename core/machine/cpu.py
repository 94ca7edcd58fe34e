"""The processor of Linux and Windows, and what a container leaves of it.

Flags are those of /proc/cpuinfo (Linux, arch/x86/include/asm/cpufeatures.h). Limits are those of the
process's control groups, version 2 or 1, and of every group above them.
"""

import re

from core.cores import CGROUPS, control_groups, cpu_quota
from core.machine.facts import CpuFacts, Limits
from core.machine.probe import Probe

CPUINFO = "/proc/cpuinfo"
# Version 1 writes the largest multiple of the page size where there is no limit.
_UNLIMITED = 1 << 60


def cpu_facts(probe: Probe, limits: Limits) -> CpuFacts:
    """The processor.

    Args:
        probe: The machine.
        limits: Of its container.
    """
    info = probe.read(CPUINFO) or ""
    flags = _words(info, "flags") or _words(info, "Features")
    is_x86 = probe.architecture.lower() in ("x86_64", "amd64", "i686")
    known = bool(flags)
    physical, logical = probe.cpu_count(logical=False), probe.cpu_count(logical=True)
    fast, slow = _two_kinds(probe, physical)
    bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
    return CpuFacts(
        name=_name(info) or probe.architecture,
        physical_cores=physical,
        logical_cores=logical,
        performance_cores=fast,
        efficiency_cores=slow,
        usable_cores=_usable(probe, logical, limits),
        bf16=bf16 if known else None,
        avx512=("avx512f" in flags if known else None) if is_x86 else False,
        amx=("amx_tile" in flags if known else None) if is_x86 else False,
        sme=("sme" in flags if known else None) if not is_x86 else False,
    )


def _name(info: str) -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    return " ".join(found.group(1).split()) if found else None


def _words(info: str, name: str) -> set[str]:
    """Words of the first line of that name: every core has the same."""
    found = re.search(rf"^{name}\s*:\s*(.+)$", info, re.M)
    return set(found.group(1).split()) if found else set()


def _two_kinds(probe: Probe, physical: int | None) -> tuple[int | None, int | None]:
    """Fast and slow cores of Intel's hybrids: the slow ones have one thread each."""
    slow = _count(probe.read("/sys/devices/cpu_atom/cpus"))
    fast = _count(probe.read("/sys/devices/cpu_core/cpus"))
    if slow is None or fast is None or physical is None or physical <= slow:
        return None, None
    return physical - slow, slow


def _count(text: str | None) -> int | None:
    """Members of a list such as "0-11,16"."""
    total = 0
    for part in (text or "").strip().split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            return None
        total += int(found.group(2) or found.group(1)) - int(found.group(1)) + 1
    return total


def _usable(probe: Probe, logical: int | None, limits: Limits) -> int | None:
    known = [n for n in (probe.affinity(), logical) if n is not None]
    if limits.cpus is not None:
        known.append(max(1, int(limits.cpus)))
    return min(known) if known else None


def limits(probe: Probe, memory_bytes: int | None) -> Limits:
    """What control groups allow this process.

    Args:
        probe: The machine.
        memory_bytes: Its memory: a limit that is not below it is none.
    """
    if probe.system != "Linux":
        return Limits(None, None)
    sizes: list[int] = []
    for kind, folder in control_groups(probe.read(CGROUPS) or ""):
        if kind in ("", "memory"):
            name = "memory.max" if kind == "" else "memory.limit_in_bytes"
            text = (probe.read(f"{folder}/{name}") or "").strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                sizes.append(int(text))
    size = min(sizes, default=None)
    if size is not None and memory_bytes is not None and size >= memory_bytes:
        size = None
    return Limits(size, cpu_quota(probe.read))
