"""The MPS backend on a machine without MPS: the policy's choices on the CPU, its counters faked."""

from collections.abc import Sequence

import pytest

from core.backend import Backend, Mode
from core.config.schema import RunConfig
from core.params import ParamSpec

COUNTERS = {
    "recommended_max_memory": 10 << 30,
    "current_allocated_memory": 3 << 20,
    "driver_allocated_memory": 5 << 20,
}


def fake_mps_memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple]]:
    """Replace what `torch.mps` asks of the device; returns the calls that change it."""
    import torch

    calls: list[tuple[str, tuple]] = []
    for name, value in COUNTERS.items():
        monkeypatch.setattr(torch.mps, name, lambda value=value: value)
    for name in ("set_per_process_memory_fraction", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.mps, name, lambda *args, name=name: calls.append((name, args)))
    return calls


def create_fake_mps(config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> Backend:
    from backends.torch_common.backend import TorchBackend
    from backends.torch_mps.policy import MpsPolicy

    return TorchBackend(config, specs, MpsPolicy(config, device="cpu"), mode=mode)
