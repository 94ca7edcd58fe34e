"""The MLX backend: Metal on a Mac, and the CPU or CUDA builds of MLX on Linux.

Importing this package imports no framework: `create` does, so that the environment that MLX reads at
its start is set first.
"""

from collections.abc import Sequence

from backends.mlx.runtime import import_mlx
from core.backend import Backend, Mode
from core.config.schema import RunConfig
from core.params import ParamSpec


def create(config: RunConfig, specs: Sequence[ParamSpec], *, mode: Mode) -> Backend:
    """Build the model on MLX's default device; weights come with `load`.

    Args:
        config: Resolved configuration.
        specs: Its parameter table.
        mode: "infer" keeps no optimizer, and the matrices in the compute dtype.

    Raises:
        PippinError: P503 if the model's parameters differ from the table.
    """
    import_mlx(tf32=config.train.tf32)
    from backends.mlx.backend import MlxBackend

    return MlxBackend(config, specs, mode=mode)
