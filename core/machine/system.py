"""What the system knows about memory: psutil, and on a Mac what psutil leaves out. No framework.

A figure that cannot be had is None, never 0. Sizes are bytes. Every source can be replaced by an
argument, so that the parsing of a Mac's answers is tested anywhere.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil

_MIB = 1 << 20
_GIB = 1 << 30
# <sys/resource.h> of macOS: rusage_info_v0 is a 16-byte uuid and ten uint64, of which the eighth is
# ri_phys_footprint.
_RUSAGE_INFO_V0 = 0
_RUSAGE_V0_BYTES = 96
_FOOTPRINT_OFFSET = 16 + 7 * 8
_COMMAND_TIMEOUT_S = 5.0
SYSCTL = "/usr/sbin/sysctl"
# Asks Metal by ctypes. CoreGraphics first: without it a command-line program gets no default device
# (Apple, MTLCreateSystemDefaultDevice). Both properties are NSUInteger or uint64.
METAL_QUERY = """
import ctypes, json
frameworks = "/System/Library/Frameworks/{0}.framework/{0}"
ctypes.CDLL(frameworks.format("CoreGraphics"))
metal = ctypes.CDLL(frameworks.format("Metal"))
objc = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
metal.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
device = metal.MTLCreateSystemDefaultDevice()
objc.sel_registerName.restype = ctypes.c_void_p
objc.sel_registerName.argtypes = [ctypes.c_char_p]
send = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)(
    ("objc_msgSend", objc))
names = ("recommendedMaxWorkingSetSize", "maxBufferLength")
if device:
    print(json.dumps({n: send(device, objc.sel_registerName(n.encode())) for n in names}))
"""
METAL_COMMAND = (sys.executable, "-I", "-c", METAL_QUERY)

Run = Callable[[Sequence[str]], str | None]
Rusage = Callable[[int, int, Any], int]


@dataclass(frozen=True)
class SystemMemory:
    """The machine's memory, in bytes.

    Attributes:
        total_bytes: All of it.
        available_bytes: What can be given to programs without swapping.
        swap_used_bytes: Swap in use, None where it is not known.
        swap_total_bytes: Swap there is at present.
    """

    total_bytes: int
    available_bytes: int
    swap_used_bytes: int | None
    swap_total_bytes: int | None


@dataclass(frozen=True)
class ProcessMemory:
    """One process.

    Attributes:
        pid: Process id.
        rss_bytes: Resident memory; on a Mac it misses much of what the GPU holds.
        footprint_bytes: macOS's physical footprint, which counts the GPU's buffers and is what the
            system compares when memory runs out; None elsewhere.
        started: Seconds since 1970.
    """

    pid: int
    rss_bytes: int
    footprint_bytes: int | None
    started: float

    @property
    def memory_bytes(self) -> int:
        """The most truthful figure there is: the footprint where known, else resident memory."""
        return self.rss_bytes if self.footprint_bytes is None else self.footprint_bytes


@dataclass(frozen=True)
class GpuMemory:
    """Memory that the GPU may use, in bytes.

    Attributes:
        budget_bytes: What programs may use together.
        used_bytes: What they use now, None where the system does not say (a Mac's is shared).
        source: Where the budget comes from, in words.
        is_estimate: Whether it is computed from a rule instead of asked.
    """

    budget_bytes: int
    used_bytes: int | None
    source: str
    is_estimate: bool


def system_memory() -> SystemMemory:
    """The machine's memory now."""
    memory = psutil.virtual_memory()
    try:
        swap = psutil.swap_memory()
    except (OSError, RuntimeError):  # containers may hide it
        return SystemMemory(memory.total, memory.available, None, None)
    return SystemMemory(memory.total, memory.available, swap.used, swap.total)


def process_memory(
    pid: int, *, footprint: Callable[[int], int | None] | None = None
) -> ProcessMemory | None:
    """Memory of a process, or None if it is gone or belongs to somebody else.

    Args:
        pid: Process id.
        footprint: Source of the physical footprint; by default `phys_footprint_bytes`.
    """
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            rss, started = process.memory_info().rss, process.create_time()
    except (psutil.Error, OSError, ValueError):
        return None
    read = phys_footprint_bytes if footprint is None else footprint
    return ProcessMemory(pid, rss, read(pid), started)


def phys_footprint_bytes(pid: int, *, rusage: Rusage | None = None) -> int | None:
    """Physical footprint of a process on macOS by `proc_pid_rusage`, None where there is none.

    Args:
        pid: Process id, of this user.
        rusage: The system's function (pid, flavor, buffer) -> 0 for success.
    """
    call = _proc_pid_rusage() if rusage is None else rusage
    if call is None:
        return None
    # Larger than the struct: a newer system may not write past what the flavor asks for, but a
    # wrong flavor must not reach the heap.
    buffer = ctypes.create_string_buffer(4 * _RUSAGE_V0_BYTES)
    if call(pid, _RUSAGE_INFO_V0, buffer) != 0:
        return None
    field = buffer.raw[_FOOTPRINT_OFFSET : _FOOTPRINT_OFFSET + 8]
    return int.from_bytes(field, sys.byteorder) or None


def gpu_memory(
    system: SystemMemory, *, run: Run | None = None, is_apple_silicon: bool | None = None
) -> GpuMemory | None:
    """Memory that the GPU may use: a Mac's share of the whole, or an NVIDIA card's own.

    Args:
        system: The machine's memory.
        run: Runs a command and returns its output, None if it failed.
        is_apple_silicon: By default found out.

    Returns:
        None where there is no such GPU.
    """
    on_mac = on_apple_silicon() if is_apple_silicon is None else is_apple_silicon
    if on_mac and run is None:
        recommended, _ = _metal_here()
        if recommended is not None:
            return GpuMemory(recommended, None, "Metal's recommended size", is_estimate=False)
    run = run_command if run is None else run
    return _mac_gpu_memory(system.total_bytes, run) if on_mac else _nvidia_memory(run)


def metal_limits(run: Run) -> tuple[int | None, int | None]:
    """Metal's recommended working set and largest buffer in bytes, None where it does not answer.

    It follows `iogpu.wired_limit_mb` (llmfit #754, seen on an M3) and rises with newer systems: on 16
    GiB 10.7 GiB before, 11.8 GiB since macOS 15.

    Args:
        run: Runs a command and returns its output, None if it failed.
    """
    try:
        answer = json.loads(run(METAL_COMMAND) or "")
        figures = [int(answer[n]) for n in ("recommendedMaxWorkingSetSize", "maxBufferLength")]
    except (ValueError, KeyError, TypeError):
        return None, None
    return figures[0] or None, figures[1] or None


@lru_cache(maxsize=1)
def _metal_here() -> tuple[int | None, int | None]:
    return metal_limits(run_command)


def on_apple_silicon() -> bool:
    """Whether this is a Mac with an Apple chip, and a Python built for it."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def recommended_working_set_bytes(total_bytes: int) -> int:
    """Metal's default `recommendedMaxWorkingSetSize`, by the rule that observed machines follow.

    Two thirds of the memory up to 32 GiB, three quarters above (16 GiB: 10.7; 64 GiB: 48); newer
    systems allow more. For where Metal cannot be asked.
    """
    return total_bytes * 2 // 3 if total_bytes <= 32 * _GIB else total_bytes * 3 // 4


def _mac_gpu_memory(total_bytes: int, run: Run) -> GpuMemory:
    text = run([SYSCTL, "-n", "iogpu.wired_limit_mb"])
    limit_mib = int(text) if text is not None and text.strip().isdigit() else 0
    if limit_mib > 0:
        return GpuMemory(limit_mib * _MIB, None, "sysctl iogpu.wired_limit_mb", is_estimate=False)
    budget = recommended_working_set_bytes(total_bytes)
    share = "2/3" if total_bytes <= 32 * _GIB else "3/4"
    return GpuMemory(budget, None, f"macOS's default, about {share} of memory", is_estimate=True)


def _nvidia_memory(run: Run) -> GpuMemory | None:
    """The first card that this process may see."""
    query = "--query-gpu=memory.total,memory.used"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0].strip()
        if first in ("", "-1", "NoDevFiles"):  # CUDA's way to hide every card
            return None
        command.append(f"--id={first}")
    lines = (run(command) or "").strip().splitlines()
    try:
        total, used = (int(part) for part in lines[0].split(","))
    except (IndexError, ValueError):
        return None
    return GpuMemory(total * _MIB, used * _MIB, "nvidia-smi", is_estimate=False)


def _proc_pid_rusage() -> Rusage | None:
    if sys.platform != "darwin":
        return None
    try:
        function = ctypes.CDLL("/usr/lib/libSystem.B.dylib").proc_pid_rusage
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_int
    found: Rusage = function
    return found


def run_command(command: Sequence[str], *, partial: bool = False) -> str | None:
    """What a command prints, None where it is missing, hangs or fails.

    Args:
        command: Program and arguments.
        partial: Keep what a failing command printed.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout if done.returncode == 0 or (partial and done.stdout) else None
