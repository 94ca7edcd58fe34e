"""The processor of Linux and Windows, and what a container leaves of it.

Flags are those of /proc/cpuinfo (Linux, arch/x86/include/asm/cpufeatures.h). Limits are those of the
process's control groups, version 2 or 1, and of every group above them.
"""

import re
from pathlib import PurePosixPath

from core.machine.facts import CpuFacts, Limits
from core.machine.probe import Probe

CPUINFO = "/proc/cpuinfo"
CGROUPS = "/proc/self/cgroup"
_ROOT = "/sys/fs/cgroup"
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
    cpus: list[float] = []
    for kind, folder in _groups(probe.read(CGROUPS) or ""):
        if kind in ("", "memory"):
            name = "memory.max" if kind == "" else "memory.limit_in_bytes"
            text = (probe.read(f"{folder}/{name}") or "").strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                sizes.append(int(text))
        if kind in ("", "cpu"):
            cpus += _quota(probe, folder, is_v2=kind == "")
    size = min(sizes, default=None)
    if size is not None and memory_bytes is not None and size >= memory_bytes:
        size = None
    return Limits(size, min(cpus, default=None))


def _groups(text: str) -> list[tuple[str, str]]:
    """(controller, folder) of the process's groups and all above; controller "" is version 2.

    In a container a group's path may be the host's, which is not mounted: the mount's own root holds
    the container's limits then.
    """
    found = []
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        number, names, path = parts
        kinds = [""] if number == "0" and not names else names.split(",")
        for kind in kinds:
            base = _ROOT if kind == "" else f"{_ROOT}/{kind}"
            places = [PurePosixPath(path), *PurePosixPath(path).parents]
            found += [(kind, base + (str(p) if str(p) != "/" else "")) for p in places]
    return found


def _quota(probe: Probe, folder: str, *, is_v2: bool) -> list[float]:
    if is_v2:
        words = (probe.read(f"{folder}/cpu.max") or "").split()
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [(probe.read(f"{folder}/{name}") or "").strip() for name in names]
    good = len(words) == 2 and all(w.isdigit() and int(w) > 0 for w in words)
    return [int(words[0]) / int(words[1])] if good else []
