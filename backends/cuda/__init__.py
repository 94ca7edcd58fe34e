"""PyTorch on NVIDIA GPUs: the shared torch backend under the CUDA policy."""

from collections.abc import Sequence

from backends.cuda.policy import CudaPolicy
from backends.torch_common.backend import TorchBackend
from core.backend import Backend, Mode
from core.config.schema import RunConfig
from core.params import ParamSpec


def create(config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> Backend:
    """The CUDA backend.

    Raises:
        PippinError: P503 if the model does not have exactly the parameters of the table.
    """
    return TorchBackend(config, specs, CudaPolicy(config), mode=mode)
