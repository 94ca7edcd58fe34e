"""What one call of train.py is given: its options, and what `backends` offers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from core.backend import Availability, CreateBackend
from core.checkpoint import Checkpoint


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


@dataclass(frozen=True)
class Options:
    """The command line of train.py."""

    overrides: list[str] = field(default_factory=list)
    config: str | None = None
    input_file: str | None = None
    backend: str | None = None
    minutes: float | None = None
    max_steps: int | None = None
    save_dir: str | None = None
    seed: int | None = None
    micro_batch_size: int | None = None
    resume: str | None = None
    overwrite: bool = False
    manual_config: bool = False
    print_config: bool = False
    dry_run: bool = False
    force: bool = False
    log: str = "spaced"
    quiet: bool = False
    json: bool = False

    def flags(self) -> dict[str, Any]:
        """First-class flags as dotted keys."""
        pairs = {
            "data.input_file": self.input_file,
            "train.backend": self.backend,
            "train.minutes": self.minutes,
            "train.save_dir": self.save_dir,
            "train.seed": self.seed,
            "train.micro_batch_size": self.micro_batch_size,
        }
        return {name: value for name, value in pairs.items() if value is not None}
