"""What one call of train.py is given: its options, and what `backends` offers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from core.backend import Availability, CreateBackend
from core.checkpoint import Checkpoint
from core.config.schema import RunConfig
from core.errors import PippinError
from core.machine.micro_batch import Probed
from core.machine.timebudget import parse_minutes


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


@dataclass(frozen=True)
class Options:
    """The command line of train.py."""

    overrides: list[str] = field(default_factory=list)
    config: str | None = None
    config_file: str | None = None
    model_name: str | None = None
    lr: list[str] = field(default_factory=list)
    resume_from: str | None = None
    foreign: dict[str, str] = field(default_factory=dict)
    locked: bool = False
    input_file: str | None = None
    backend: str | None = None
    minutes: float | None = None
    time_budget: str | None = None
    depth: int | None = None
    max_steps: int | None = None
    save_dir: str | None = None
    save_dir_flag: str = "--save_dir"
    seed: int | None = None
    micro_batch_size: int | str | None = None
    resume: str | None = None
    overwrite: bool = False
    manual_config: bool = False
    print_config: bool = False
    dry_run: bool = False
    validate_setup: bool = False
    force: bool = False
    allow_cpu_fallback: bool = False
    log: str = "spaced"
    quiet: bool = False
    json: bool = False

    def asked_minutes(self) -> float | None:
        """Minutes of `--time-budget` or `--minutes`.

        Raises:
            PippinError: P012 where it is no time, or both are given and differ.
        """
        if self.time_budget is None:
            return self.minutes
        minutes = parse_minutes(self.time_budget)
        if self.minutes is not None and self.minutes != minutes:
            raise PippinError(
                "P012",
                f"--time-budget {self.time_budget} and --minutes {self.minutes:g} are two times.",
                remedy=f"leave one out: python train.py --time-budget {self.time_budget}",
            )
        return minutes

    def typed(self) -> dict[str, str]:
        """How the flags of `flags` were spelt, where it is not the key's name."""
        return {
            "train.minutes": f"--time-budget {self.time_budget}"
            if self.time_budget
            else "--minutes",
            "train.save_dir": self.save_dir_flag,
        }

    def flags(self) -> dict[str, Any]:
        """First-class flags as dotted keys."""
        pairs = {
            "data.input_file": self.input_file,
            "train.backend": self.backend,
            "train.minutes": self.asked_minutes(),
            "train.save_dir": self.save_dir,
            "train.seed": self.seed,
            "train.micro_batch_size": self.micro_batch_size,
            "train.lr": self.lr[-1] if self.lr else None,
        }
        return {name: value for name, value in pairs.items() if value is not None}
