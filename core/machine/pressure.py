"""How short of memory the machine is while something runs: one cheap reading, no subprocess.

A Mac swaps long before an allocation fails, so what is read is what moves before that: the process, the
swap in use, and macOS's own level of memory pressure. What cannot be known is None, never 0.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from core.machine.system import process_memory, system_memory

# <sys/kern_memorystatus.h>, as `sysctl kern.memorystatus_vm_pressure_level` says it.
NORMAL, WARNING, CRITICAL = 1, 2, 4
PRESSURE_NAMES = {NORMAL: "normal", WARNING: "warning", CRITICAL: "critical"}
_LEVEL = b"kern.memorystatus_vm_pressure_level"

Sysctl = Callable[[bytes, Any, Any, Any, int], int]


@dataclass(frozen=True)
class Reading:
    """Memory at one moment, in bytes.

    Attributes:
        at_s: Seconds of a monotonic clock.
        process_bytes: The process: footprint where known, else resident.
        device_bytes: What its framework holds on the device, None where it has no counter.
        swap_used_bytes: Swap in use on the whole machine.
        available_bytes: What the machine can give without swapping.
        total_bytes: Memory of the machine.
        pressure: `NORMAL`, `WARNING`, `CRITICAL` on a Mac.
    """

    at_s: float
    process_bytes: int
    device_bytes: int | None
    swap_used_bytes: int | None
    available_bytes: int
    total_bytes: int
    pressure: int | None = None


def read_memory(device_bytes: int | None = None, *, pid: int | None = None) -> Reading:
    """Memory now; about 0.5 ms of a core.

    Args:
        device_bytes: What the framework's counter said last.
        pid: Process to read, by default this one.
    """
    system = system_memory()
    process = process_memory(os.getpid() if pid is None else pid)
    return Reading(
        at_s=time.monotonic(),
        process_bytes=0 if process is None else process.memory_bytes,
        device_bytes=device_bytes,
        swap_used_bytes=system.swap_used_bytes,
        available_bytes=system.available_bytes,
        total_bytes=system.total_bytes,
        pressure=memory_pressure(),
    )


def memory_pressure(sysctl: Sysctl | None = None) -> int | None:
    """The level of memory pressure that macOS names: 1 normal, 2 warning, 4 critical; None elsewhere.

    Args:
        sysctl: The system's `sysctlbyname`: (name, value, its size, None, 0) -> 0 for success.
    """
    call = _sysctlbyname() if sysctl is None else sysctl
    if call is None:
        return None
    level = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(level))
    if call(_LEVEL, ctypes.byref(level), ctypes.byref(size), None, 0) != 0:
        return None
    return level.value if level.value in PRESSURE_NAMES else None


@lru_cache(maxsize=1)
def _sysctlbyname() -> Sysctl | None:
    if sys.platform != "darwin":
        return None
    try:
        function = ctypes.CDLL("/usr/lib/libSystem.B.dylib").sysctlbyname
    except (OSError, AttributeError):
        return None
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, pointer, pointer, pointer, ctypes.c_size_t]
    function.restype = ctypes.c_int
    found: Sysctl = function
    return found


def shares_memory(backend: str) -> bool:
    """Whether what a backend holds on its device is memory of the process: not on an NVIDIA card."""
    return sys.platform == "darwin" or backend != "cuda"
