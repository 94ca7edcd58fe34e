"""PyTorch on Apple GPUs: the shared torch backend under the MPS policy."""

from collections.abc import Sequence

from backends.torch_common.backend import TorchBackend
from backends.torch_mps.policy import MpsPolicy
from core.backend import Backend, Mode
from core.config.schema import RunConfig
from core.params import ParamSpec


def create(config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> Backend:
    """The MPS backend.

    Raises:
        PippinError: P502 if the precision does not work here, P503 if the model does not have exactly
            the parameters of the table.
    """
    return TorchBackend(config, specs, MpsPolicy(config), mode=mode)
