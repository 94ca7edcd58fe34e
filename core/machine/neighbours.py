"""Other programs that hold much memory: what to close before a run has to be made smaller."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import psutil

from core.machine.system import phys_footprint_bytes

# What is smaller is not worth closing.
MIN_BYTES = 200_000_000


@dataclass(frozen=True)
class OtherProcess:
    """One program: its name, how many processes, and what they hold together."""

    name: str
    processes: int
    memory_bytes: int


def large_processes(
    *,
    without: Collection[int | None] = (),
    most: int = 3,
    min_bytes: int = MIN_BYTES,
    list_processes: Callable[[], Iterable[tuple[int, str, int]]] | None = None,
    footprint: Callable[[int], int | None] = phys_footprint_bytes,
) -> tuple[OtherProcess, ...]:
    """The programs that hold the most, those of one name together, the largest first.

    Args:
        without: Process ids to leave out.
        most: How many programs.
        min_bytes: Programs that hold less are left out.
        list_processes: (pid, name, resident bytes) of every process; by default the system's.
        footprint: Physical footprint of a process, None where there is none.
    """
    found: defaultdict[str, list[int]] = defaultdict(list)
    for pid, name, resident in (list_processes or _processes)():
        if pid not in without:
            found[name].append(footprint(pid) or resident)
    programs = [OtherProcess(n, len(sizes), sum(sizes)) for n, sizes in found.items()]
    large = [p for p in programs if p.memory_bytes >= min_bytes]
    return tuple(sorted(large, key=lambda p: (-p.memory_bytes, p.name))[:most])


def _processes() -> Iterable[tuple[int, str, int]]:
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        memory = process.info["memory_info"]
        if memory is not None:
            yield process.info["pid"], process.info["name"] or "?", memory.rss
