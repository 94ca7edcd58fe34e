"""Apple chips: sysctl for the processor, the IO registry for the GPU, Metal for its limits.

Metal is asked in a process of its own, by ctypes: no framework is needed, and whatever goes wrong in
there leaves the figure unknown instead of ending the run.
"""

import re
from collections.abc import Mapping

from core.machine.facts import AppleFacts, CpuFacts
from core.machine.probe import Probe
from core.machine.system import SYSCTL, metal_limits, recommended_working_set_bytes

_MIB = 1 << 20
SYSCTL_NAMES = (
    "machdep.cpu.brand_string",
    "hw.memsize",
    "hw.physicalcpu",
    "hw.logicalcpu",
    "hw.nperflevels",
    "hw.perflevel0.physicalcpu",
    "hw.perflevel1.physicalcpu",
    "hw.optional.arm64",
    "hw.optional.arm.FEAT_BF16",
    "hw.optional.arm.FEAT_SME",
    "hw.optional.avx512f",
    "iogpu.wired_limit_mb",
)
IOREG = ("/usr/sbin/ioreg", "-r", "-c", "AGXAccelerator", "-d", "1", "-w", "0")
SYSTEM_PROFILER = ("/usr/sbin/system_profiler", "SPDisplaysDataType")


def sysctl_values(probe: Probe) -> dict[str, str]:
    """The names that this system knows, with their values."""
    text = probe.run([SYSCTL, *SYSCTL_NAMES], partial=True) or ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def mac_cpu(probe: Probe, values: Mapping[str, str]) -> CpuFacts:
    """The processor of a Mac, of either kind."""
    arm = values.get("hw.optional.arm64") == "1"
    two_kinds = _whole(values.get("hw.nperflevels")) == 2
    logical = _whole(values.get("hw.logicalcpu")) or probe.cpu_count(logical=True)
    return CpuFacts(
        name=values.get("machdep.cpu.brand_string") or probe.architecture,
        physical_cores=_whole(values.get("hw.physicalcpu")) or probe.cpu_count(logical=False),
        logical_cores=logical,
        performance_cores=_whole(values.get("hw.perflevel0.physicalcpu")) if two_kinds else None,
        efficiency_cores=_whole(values.get("hw.perflevel1.physicalcpu")) if two_kinds else None,
        usable_cores=logical,
        bf16=_flag(values.get("hw.optional.arm.FEAT_BF16")) if arm else None,
        avx512=False if arm else _flag(values.get("hw.optional.avx512f")),
        amx=False,
        sme=_flag(values.get("hw.optional.arm.FEAT_SME")) if arm else False,
    )


def apple_facts(
    probe: Probe, values: Mapping[str, str], memory_bytes: int | None
) -> AppleFacts | None:
    """The Apple chip, None on an Intel Mac.

    Args:
        probe: The machine.
        values: Its `sysctl_values`.
        memory_bytes: Its memory, where sysctl does not say.
    """
    chip = values.get("machdep.cpu.brand_string", "")
    if values.get("hw.optional.arm64") != "1" and probe.architecture != "arm64":
        return None
    total = _whole(values.get("hw.memsize")) or memory_bytes
    recommended, largest = metal_limits(probe.run)
    source = "Metal's recommended working set" if recommended is not None else None
    limit_mib = _whole(values.get("iogpu.wired_limit_mb"))
    if recommended is None and limit_mib:
        recommended, source = limit_mib * _MIB, "sysctl iogpu.wired_limit_mb"
    is_estimate = recommended is None
    if recommended is None and total is not None:
        recommended, source = recommended_working_set_bytes(total), "macOS's default share"
    number = re.match(r"Apple M(\d+)", chip)
    return AppleFacts(
        chip=chip or "Apple silicon",
        generation=int(number.group(1)) if number else None,
        gpu_cores=_gpu_cores(probe),
        unified_memory_bytes=total,
        recommended_working_set_bytes=recommended,
        working_set_source=source,
        working_set_is_estimate=is_estimate,
        largest_buffer_bytes=largest,
        is_rosetta=probe.architecture == "x86_64",
    )


def _gpu_cores(probe: Probe) -> int | None:
    """From the IO registry, else from the slower system_profiler."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', probe.run(IOREG) or "")
    if found is None:
        text = probe.run(SYSTEM_PROFILER) or ""
        found = re.search(r"Total Number of Cores:\s*(\d+)", text)
    return int(found.group(1)) or None if found else None


def _whole(text: str | None) -> int | None:
    """A positive number, None for anything else."""
    return int(text) or None if text is not None and text.isdigit() else None


def _flag(text: str | None) -> bool | None:
    return {"1": True, "0": False}.get(text or "")
