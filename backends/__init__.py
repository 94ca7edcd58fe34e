"""Backend registry: a name, its module, and why it cannot run here if it cannot.

Importing this package imports no framework. `load(name)` does, once, when a run asks for it.
"""

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np

from backends.fallback import forbid_unasked
from core.backend import MLX_LINUX_BUILDS, Availability, CreateBackend
from core.checkpoint import Checkpoint, Meta, open_npz, write_npz
from core.config.schema import RunConfig
from core.errors import PippinError
from core.machine.micro_batch import Probed

MODULES = {
    "mlx": "backends.mlx",
    "mps": "backends.torch_mps",
    "cuda": "backends.cuda",
    "cpu": "backends.torch_common",
}
SUFFIX = {"mlx": ".npz", "mps": ".pt", "cuda": ".pt", "cpu": ".pt"}
MIN_TORCH = (2, 11)
MIN_TORCH_MPS = (2, 12)
MIN_MLX = (0, 32, 2)
# Of Metal's bfloat16, and of the wheels of MLX.
MIN_MACOS = (14,)
# What macOS tells a Python that was built for systems before 11, whatever it is.
UNKNOWN_MACOS = (10, 16)
# Device files of the driver, also below Windows; without one there is no need to import torch.
NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
# Short spins at OpenMP's barriers: beside other busy programs a step takes half as long (docs/LOG.md).
SPIN_COUNT = "10000"


@dataclass(frozen=True)
class CheckpointFormat:
    """Reader and writer of one checkpoint suffix."""

    suffix: str
    open: Callable[[Path], Checkpoint]
    write: Callable[[Path, Meta, Iterable[tuple[str, np.ndarray[Any, Any]]]], Path]


def checkpoint_format(suffix: str) -> CheckpointFormat:
    """The format of a suffix: `.npz` needs numpy alone, `.pt` needs torch.

    Raises:
        PippinError: P306 for another suffix, P501 where torch is needed and missing.
    """
    if suffix == ".npz":
        return CheckpointFormat(".npz", open_npz, write_npz)
    if suffix == ".pt":
        if importlib.util.find_spec("torch") is None:
            raise PippinError(
                "P501",
                "a .pt checkpoint needs torch, which is not installed.",
                remedy="pip install torch",
            )
        module = importlib.import_module("backends.torch_common.checkpoint")
        return CheckpointFormat(".pt", module.open_pt, module.write_pt)
    raise PippinError(
        "P306", f"no checkpoint format has the suffix {suffix!r}.", choices=(".npz", ".pt")
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint file of either suffix.

    Raises:
        PippinError: P303 to P306 for a file that cannot be used.
    """
    return checkpoint_format(path.suffix).open(path)


def available() -> dict[str, Availability]:
    """Every backend by name, in the order in which `auto` prefers them."""
    return {name: _check(name) for name in MODULES}


def load(name: str) -> CreateBackend:
    """Import a backend and return its `create`.

    Raises:
        PippinError: P501 if its package or device is missing, P502 for a version known to be wrong.
    """
    state = _check(name)
    if not state.ok:
        others = [n for n, a in available().items() if a.ok]
        raise PippinError(
            state.code,
            f"backend {name} cannot run here: {state.reason}.",
            choices=others,
            remedy=state.remedy,
            kept="nothing was started.",
        )
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        return cast(CreateBackend, importlib.import_module(MODULES[name]).create)
    except (ImportError, OSError) as error:
        raise PippinError(
            "P501",
            f"backend {name} does not load: {error}.",
            remedy=f"pip install --force-reinstall {'mlx' if name == 'mlx' else 'torch'}",
            kept="nothing was started.",
        ) from error


def probe_step(config: RunConfig, limit_bytes: int) -> Probed:
    """Take a real training step in a process of its own: `backends.probe`."""
    from backends import probe

    return probe.probe_step(config, limit_bytes)


def _check(name: str) -> Availability:
    if name not in MODULES:
        raise PippinError("P501", f"no backend is called {name!r}.", choices=tuple(MODULES))
    if sys.platform == "darwin" and platform.machine() == "x86_64" and _is_apple_silicon():
        return Availability(
            name,
            False,
            "needs an arm64 Python; this one is an Intel build running under Rosetta",
            "brew install python@3.12, then remove .venv and run make run again",
            code="P502",
        )
    old = _old_macos() if name in ("mlx", "mps") else ""
    if old:
        reason = f"needs macOS >= 14, found {old}"
        return Availability(name, False, reason, "update macOS, or --backend cpu", code="P502")
    return _check_mlx() if name == "mlx" else _check_torch(name)


def _check_mlx() -> Availability:
    version = _version("mlx")
    if version is None:
        extra = "mlx" if sys.platform == "darwin" else '"mlx[cpu]"'
        return Availability("mlx", False, "the package mlx is missing", f"pip install {extra}")
    if _numbers(version) < MIN_MLX:
        reason = f"needs mlx >= 0.32.2, found {version}"
        return Availability("mlx", False, reason, "pip install -U mlx", code="P502")
    # Not imported to find out: loading MLX's BLAS next to torch slows torch's matmuls down.
    on_linux = sys.platform == "linux"
    builds = {b: v for b in MLX_LINUX_BUILDS if on_linux and (v := _version(b)) is not None}
    if on_linux and not builds:
        reason = "the package mlx has no CPU or CUDA library beside it"
        return Availability("mlx", False, reason, 'pip install "mlx[cpu]"')
    return Availability("mlx", True, versions={"mlx": version, **builds})


def _check_torch(name: str) -> Availability:
    version = _version("torch")
    if version is None:
        return Availability(name, False, "the package torch is missing", "pip install torch")
    if _numbers(version) < MIN_TORCH:
        reason = f"needs torch >= 2.11, found {version}"
        return Availability(name, False, reason, "pip install -U torch", code="P502")
    versions = {"torch": version}
    if name == "cpu":
        return Availability(name, True, versions=versions)
    if name == "mps" and sys.platform != "darwin":
        return Availability(
            name, False, "MPS is Apple's; this machine is not a Mac", "--backend cpu"
        )
    if name == "mps" and _numbers(version) < MIN_TORCH_MPS:
        reason = f"needs torch >= 2.12 on MPS, found {version}"
        return Availability(name, False, reason, "pip install -U torch", code="P502")
    if name == "cuda" and sys.platform == "linux" and not any(map(os.path.exists, NVIDIA_DEVICES)):
        return Availability(name, False, "no NVIDIA device is here", "--backend cpu")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    forbid_unasked()
    torch = importlib.import_module("torch")
    present = torch.backends.mps.is_available() if name == "mps" else torch.cuda.is_available()
    if not present:
        return Availability(name, False, f"torch {version} sees no {name} device", "--backend cpu")
    return Availability(name, True, versions=versions)


def _old_macos() -> str:
    """The version of a macOS that is too old; empty for others, unknown ones and other systems."""
    version = platform.mac_ver()[0]
    numbers = _numbers(version)
    known = bool(version) and numbers[:2] != UNKNOWN_MACOS
    return version if known and numbers < MIN_MACOS else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int("".join(c for c in p if c.isdigit()) or 0) for p in parts[:3])


def _is_apple_silicon() -> bool:
    import subprocess

    out = subprocess.run(
        ["/usr/sbin/sysctl", "-n", "hw.optional.arm64"], capture_output=True, text=True, check=False
    )
    return out.stdout.strip() == "1"
