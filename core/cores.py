"""How many processor threads this process may use: of the machine, and of what a container leaves.

Imports nothing of Pippin, as both the machine's detection and the preparing of data ask it. Limits are
those of the process's control groups (Linux), version 2 or 1, and of every group above them.
"""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

CGROUPS = "/proc/self/cgroup"
_ROOT = "/sys/fs/cgroup"

# The content of a file; None where it cannot be read.
Read = Callable[[str], str | None]


def usable_cores() -> int:
    """Hardware threads that this process may use, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cpu_quota(_read)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota(read: Read) -> float | None:
    """Processors whose whole time the process's control groups allow; None for no limit."""
    quotas = []
    for kind, folder in control_groups(read(CGROUPS) or ""):
        if kind in ("", "cpu"):
            quotas += _quota(read, folder, is_v2=kind == "")
    return min(quotas, default=None)


def control_groups(text: str) -> list[tuple[str, str]]:
    """(controller, folder) of the process's groups and all above; controller "" is version 2.

    In a container a group's path may be the host's, which is not mounted: the mount's own root holds
    the container's limits then.

    Args:
        text: Content of `CGROUPS`.
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


def _quota(read: Read, folder: str, *, is_v2: bool) -> list[float]:
    if is_v2:
        words = (read(f"{folder}/cpu.max") or "").split()
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [(read(f"{folder}/{name}") or "").strip() for name in names]
    good = len(words) == 2 and all(w.isdigit() and int(w) > 0 for w in words)
    return [int(words[0]) / int(words[1])] if good else []


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
