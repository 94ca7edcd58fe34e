"""Facts of this machine that need no framework: the chip, memory, power, and the backend to use."""

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from core.backend import Availability
from core.errors import PippinError
from core.machine.autoconfig import DeviceFacts
from core.machine.choose import choose_backend
from core.machine.system import gpu_memory, on_apple_silicon, system_memory


@dataclass(frozen=True)
class Facts:
    """The machine in words, and the device that a run would use."""

    machine: str
    device: DeviceFacts


def device_facts(wanted: str | None, available: Mapping[str, Availability]) -> Facts:
    """The device of a run.

    Args:
        wanted: Backend that was asked for, None for the best one here.
        available: What `backends.available()` says.

    Raises:
        PippinError: P501 where no backend is here at all.
    """
    if wanted is None:
        name, reason = choose_backend(available, is_apple_silicon=on_apple_silicon())
    else:
        name, reason = wanted, ""
        if name in available and not available[name].ok:
            state = available[name]
            code = "P502" if state.reason.startswith("needs") else "P501"
            raise PippinError(
                code,
                f"backend {name} cannot run here: {state.reason}.",
                choices=[n for n, a in available.items() if a.ok],
                remedy=state.remedy,
                kept="nothing was started.",
            )
    memory = system_memory()
    gpu = gpu_memory(memory) if name in ("mlx", "mps", "cuda") else None
    is_gpu = name in ("mps", "cuda") or (name == "mlx" and sys.platform == "darwin")
    budget = gpu.budget_bytes if gpu is not None else memory.total_bytes
    power = _power()
    text = f"{chip_name()} · {psutil.cpu_count(logical=False) or psutil.cpu_count()} cores"
    text += f" · {memory.total_bytes / 1e9:.0f} GB"
    if gpu is not None:
        text += f" ({gpu.budget_bytes / 1e9:.1f} GB for the GPU)"
    text += f" · {_system()}" + (f" · {power}" if power else "")
    return Facts(
        machine=text,
        device=DeviceFacts(
            backend=name,
            reason=reason,
            is_gpu=is_gpu,
            native_bf16=native_bf16(name),
            budget_bytes=budget,
        ),
    )


def chip_name() -> str:
    """Name of the processor: "Apple M3 Pro", "AMD EPYC 9R14"."""
    if sys.platform == "darwin":
        return _run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.M)
        if match:
            return " ".join(match.group(1).split())
    return platform.processor() or platform.machine()


def native_bf16(backend: str) -> bool:
    """Whether the device multiplies bfloat16 at full rate or better than float32.

    M1 and M2 run bfloat16 at half the rate of float16 and no faster than float32; M3 and later have
    it. NVIDIA has it from compute capability 8.0 (asked by nvidia-smi). CPUs stay at float32, where a
    run is exact across backends.
    """
    if backend in ("mlx", "mps") and sys.platform == "darwin":
        match = re.match(r"Apple M(\d+)", chip_name())
        return match is not None and int(match.group(1)) >= 3
    if backend in ("cuda", "mlx"):
        text = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        try:
            return float(text.splitlines()[0]) >= 8.0
        except (IndexError, ValueError):
            return False
    return False


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.machine()}"


def _power() -> str:
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    if battery is None:
        return ""
    if battery.power_plugged:
        return "mains"
    return f"on battery {battery.percent:.0f} %: plug in for long runs"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
