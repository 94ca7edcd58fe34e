"""The one door to the machine: every command, file and figure that detection reads goes through it.

Tests and reports of other machines hand in a probe of recorded answers; nothing else is replaced. No
framework is imported. What cannot be had is None.
"""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import psutil

from core.machine.system import SystemMemory, run_command, system_memory


@dataclass(frozen=True)
class Battery:
    """A battery: its charge in percent, and whether the machine is on mains (None: not said)."""

    percent: float
    plugged: bool | None


class Probe(Protocol):
    """What a machine answers.

    Attributes:
        system: `platform.system()`: "Darwin", "Linux" or "Windows".
        architecture: `platform.machine()`: "arm64", "x86_64", "aarch64".
    """

    system: str
    architecture: str

    def run(self, command: Sequence[str], *, partial: bool = False) -> str | None:
        """What a command prints, None where it is missing or fails.

        Args:
            command: Program and arguments.
            partial: Keep what a failing command printed, as sysctl does where one name is unknown.
        """
        ...

    def read(self, path: str) -> str | None:
        """A text file of the system, None where it is missing or may not be read."""
        ...

    def environ(self, name: str) -> str | None:
        """A variable of the environment, None where it is not set."""
        ...

    def system_version(self) -> str | None:
        """Version of macOS ("15.5"), or the release of another system."""
        ...

    def memory(self) -> SystemMemory | None:
        """The machine's memory and swap."""
        ...

    def cpu_count(self, *, logical: bool) -> int | None:
        """Logical or physical cores."""
        ...

    def affinity(self) -> int | None:
        """Logical cores that this process may run on."""
        ...

    def battery(self) -> Battery | None:
        """The battery, None where there is none."""
        ...

    def disk_free(self, path: str) -> int | None:
        """Bytes that can be written on the disk of a folder."""
        ...


class SystemProbe:
    """This machine. A command is run once: what is asked of them does not change in a process's life."""

    def __init__(self) -> None:
        self.system = platform.system()
        self.architecture = platform.machine()
        self._answers: dict[tuple[str, ...], str | None] = {}

    def run(self, command: Sequence[str], *, partial: bool = False) -> str | None:
        """See `Probe`."""
        key = tuple(command)
        if key not in self._answers:
            self._answers[key] = run_command(command, partial=partial)
        return self._answers[key]

    def read(self, path: str) -> str | None:
        """See `Probe`."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except (OSError, ValueError):
            return None

    def environ(self, name: str) -> str | None:
        """See `Probe`."""
        return os.environ.get(name)

    def system_version(self) -> str | None:
        """See `Probe`."""
        return (platform.mac_ver()[0] if sys.platform == "darwin" else platform.release()) or None

    def memory(self) -> SystemMemory | None:
        """See `Probe`."""
        try:
            return system_memory()
        except (OSError, RuntimeError, psutil.Error):
            return None

    def cpu_count(self, *, logical: bool) -> int | None:
        """See `Probe`."""
        return psutil.cpu_count(logical=logical)

    def affinity(self) -> int | None:
        """See `Probe`."""
        ask = getattr(os, "sched_getaffinity", None)
        try:
            return len(ask(0)) if ask is not None else None
        except OSError:
            return None

    def battery(self) -> Battery | None:
        """See `Probe`."""
        try:
            found = getattr(psutil, "sensors_battery", lambda: None)()
        except (OSError, RuntimeError, ValueError, NotImplementedError):
            return None
        return None if found is None else Battery(float(found.percent), found.power_plugged)

    def disk_free(self, path: str) -> int | None:
        """See `Probe`."""
        try:
            return shutil.disk_usage(path).free
        except OSError:
            return None


@lru_cache(maxsize=1)
def this_machine() -> SystemProbe:
    """The probe of this machine; made when it is first asked for."""
    return SystemProbe()
