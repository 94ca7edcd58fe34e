"""What core needs of the package `backends`, which it never imports: entry points pass it in."""

from pathlib import Path
from typing import Protocol

from core.backend import Availability, CreateBackend
from core.checkpoint import Checkpoint
from core.config.schema import RunConfig
from core.machine.micro_batch import Probed


class Backends(Protocol):
    """What `backends` offers; passed in, because core imports no backend."""

    def available(self) -> dict[str, Availability]:
        """Every backend by name."""
        ...

    def load(self, name: str) -> CreateBackend:
        """Import one and return its `create`."""
        ...

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open a file of either suffix."""
        ...

    def probe_step(self, config: RunConfig, limit_bytes: int) -> Probed:
        """Take a real step in a process of its own."""
        ...
