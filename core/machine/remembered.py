"""The answer of `tools/benchmark.py compare`, kept for `backend: auto` in the user's cache folder.

One small JSON file for all machines that share the folder. An answer counts only for the same chip,
memory, system and versions. The file is a convenience: whatever is wrong with it, it is as if it were
not there, and what it says can only reorder backends that `auto` chooses from anyway.
"""

import json
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import __version__
from core.backend import Availability
from core.errors import PippinError
from core.machine.choose import Remembered, choose_measured
from core.machine.detect import machine_facts
from core.machine.facts import MachineFacts
from core.machine.system import on_apple_silicon

FORMAT = 1
FILE_NAME = "backends.json"
MAX_BYTES = 262_144
MAX_ENTRIES = 32
MAX_TOKENS_PER_S = 1e12
_DATE = re.compile(r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])\Z")


@dataclass(frozen=True)
class Machine:
    """What an answer depends on.

    Attributes:
        key: The machine: chip, GPUs, memory and system.
        versions: Of Pippin, the system, and each framework that is installed.
        word: "Mac" or "machine".
    """

    key: str
    versions: Mapping[str, str]
    word: str


def machine_of(facts: MachineFacts, available: Mapping[str, Availability]) -> Machine:
    """The identity of a machine and its software."""
    versions = {"pippin": __version__, "system": facts.system_version or "?"}
    for state in available.values():
        versions.update(state.versions)
        versions[f"backend {state.name}"] = "yes" if state.ok else "no"
    # In GiB: a kernel's own share varies a little.
    memory = "?" if facts.memory_bytes is None else f"{facts.memory_bytes / (1 << 30):.0f} GiB"
    parts = [facts.system, facts.architecture, facts.cpu.name, memory]
    if facts.apple is not None:
        parts.append(f"{facts.apple.gpu_cores} GPU cores")
    if facts.nvidia is not None:
        parts += [g.name for g in facts.nvidia.gpus]
        versions["driver"] = facts.nvidia.driver or "?"
    return Machine(" | ".join(parts), versions, "Mac" if facts.system == "macOS" else "machine")


def cache_folder(
    environ: Mapping[str, str] | None = None,
    *,
    platform: str = sys.platform,
    home: Path | None = None,
) -> Path:
    """The user's cache folder for Pippin: `~/Library/Caches/pippin` on a Mac, else XDG's.

    Args:
        environ: Variables; those of the process by default. `PIPPIN_CACHE_DIR` wins everywhere.
        platform: `sys.platform`.
        home: The user's home folder.
    """
    environ = os.environ if environ is None else environ
    home = Path(os.path.expanduser("~")) if home is None else home  # noqa: PTH111 - never raises
    own = environ.get("PIPPIN_CACHE_DIR", "")
    if own:
        return Path(own)
    if platform == "darwin":
        return home / "Library" / "Caches" / "pippin"
    base = environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path is to be ignored.
    return (Path(base) if base.startswith("/") else home / ".cache") / "pippin"


def is_there(folder: Path | None = None) -> bool:
    """Whether anything was ever kept: looking at the machine costs time."""
    path = (cache_folder() if folder is None else folder) / FILE_NAME
    try:
        os.lstat(path)
    except (OSError, ValueError):
        return False
    return True


def recall(machine: Machine, folder: Path | None = None) -> tuple[Remembered | None, str]:
    """The answer for a machine, and what to tell where a file is there but of no use.

    Never raises, whatever the file is.
    """
    path = (cache_folder() if folder is None else folder) / FILE_NAME
    entries, problem = _read(path)
    if problem:
        return None, f"the measured backends in {path} are not used: {problem}"
    entry = entries.get(machine.key)
    if not isinstance(entry, dict):
        return None, ""
    if entry.get("versions") != dict(machine.versions):
        return None, (
            "versions have changed since the backends were compared; again: "
            "python tools/benchmark.py compare"
        )
    date, speeds = entry.get("date"), entry.get("tokens_per_s")
    if not isinstance(date, str) or not _DATE.match(date) or not isinstance(speeds, dict):
        return None, f"the measured backends in {path} are not used: an entry is not as written"
    good = {n: float(v) for n, v in speeds.items() if _is_speed(v)}
    if not good:
        return None, f"the measured backends in {path} are not used: an entry is not as written"
    return Remembered(good, date, machine.word), ""


def fastest(available: Mapping[str, Availability]) -> tuple[tuple[str, str] | None, str]:
    """The backend that an earlier comparison on this machine found fastest, and why.

    Args:
        available: Every backend by name.

    Returns:
        Name and reason, None where nothing was measured; and what is wrong with the memory, or "".
    """
    if not is_there():
        return None, ""
    found, note = recall(machine_of(machine_facts(), available))
    if found is None:
        return None, note
    apple = on_apple_silicon()
    return choose_measured(available, is_apple_silicon=apple, remembered=found), note


def remember(
    machine: Machine,
    tokens_per_s: Mapping[str, float],
    *,
    date: str,
    folder: Path | None = None,
) -> Path:
    """Keep an answer; a file that cannot be read is replaced.

    Args:
        machine: Where it was measured.
        tokens_per_s: Trained tokens per second by backend.
        date: As 2026-11-20.
        folder: By default the user's cache folder.

    Raises:
        PippinError: P312 where the folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / FILE_NAME
    entries, _ = _read(path)
    entries.pop(machine.key, None)
    entry = {"date": date, "versions": dict(machine.versions), "tokens_per_s": dict(tokens_per_s)}
    kept = [*list(entries.items())[-(MAX_ENTRIES - 1) :], (machine.key, entry)]
    text = json.dumps({"format": FORMAT, "machines": dict(kept)}, indent=1) + "\n"
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(prefix=".backends-", dir=folder)
        with os.fdopen(number, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(temporary, path)  # noqa: PTH105 - as the rest of this block
    except OSError as error:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
        raise PippinError(
            "P312",
            f"{path} cannot be written: {error.strerror or error}.",
            remedy="PIPPIN_CACHE_DIR=FOLDER for another folder, or --no-remember",
            kept="the measurement is above; backend: auto stays as it was.",
        ) from error
    return path


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Entries by machine, and what is wrong with the file."""
    try:
        # A pipe or a device would wait for ever, or never end.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"it cannot be read ({getattr(error, 'strerror', None) or error})"
    try:
        with os.fdopen(number, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_BYTES:
                return {}, "it is not a small file"
            data = json.loads(file.read(MAX_BYTES + 1))
    except OSError as error:
        return {}, f"it cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError):
        return {}, "it is not what Pippin writes"
    machines = data.get("machines") if isinstance(data, dict) else None
    if not isinstance(machines, dict) or data.get("format") != FORMAT:
        return {}, "it is not what Pippin writes"
    return {str(k): v for k, v in machines.items() if isinstance(v, dict)}, ""


def _is_speed(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= MAX_TOKENS_PER_S
        and math.isfinite(value)
        and value > 0
    )
