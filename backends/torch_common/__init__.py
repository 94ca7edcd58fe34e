"""Everything the torch backends share, and the CPU backend. Reading a `.pt` needs no model."""

from collections.abc import Sequence

from core.backend import Backend, Mode
from core.config.schema import RunConfig
from core.params import ParamSpec


def create(config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> Backend:
    """The CPU backend.

    Raises:
        PippinError: P503 if the model does not have exactly the parameters of the table.
    """
    from backends.torch_common.backend import TorchBackend
    from backends.torch_common.device import CpuPolicy

    return TorchBackend(config, specs, CpuPolicy(config), mode=mode)
