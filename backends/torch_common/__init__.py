"""Everything the torch backends share, and the CPU backend. Reading a `.pt` needs no model."""

import os
from collections.abc import Sequence

from core.backend import Backend, Mode
from core.config.schema import RunConfig
from core.params import ParamSpec


def create(config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> Backend:
    """The CPU backend.

    Raises:
        PippinError: P503 if the model does not have exactly the parameters of the table.
    """
    # GNU OpenMP's threads spin at every barrier. Beside another busy program a step took 2.0 s, with a
    # short spin 1.1 s, and 0.28 s either way on a quiet machine (2 cores, torch 2.13, 2026-11-21).
    # It is read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from backends.torch_common.backend import TorchBackend
    from backends.torch_common.device import CpuPolicy

    return TorchBackend(config, specs, CpuPolicy(config), mode=mode)
