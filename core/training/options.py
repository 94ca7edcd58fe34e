"""What one call of train.py is given: its options."""

from dataclasses import dataclass, field
from typing import Any

from core.errors import PippinError
from core.machine.timebudget import parse_minutes


@dataclass(frozen=True)
class Options:
    """The command line of train.py; None is a flag that was not given.

    Attributes:
        overrides: `section.key=value`, each of which sets one key.
        config: A preset's name or a file.
        config_file: The same by another project's name; the file then defines the architecture.
        model_name: The run folder checkpoints/NAME, another project's name for `save_dir`.
        lr: Peak learning rates as typed; several are a run each.
        resume_from: Another project's name for `resume`.
        foreign: Flags of other projects by name, as typed.
        locked: Whether the file defines the architecture, so that foreign flags of it are ignored.
        input_file: Text file, .jsonl or folder.
        backend: "auto" or a backend's name.
        minutes: Time to train, minutes.
        time_budget: The same as typed, such as "1h30m".
        depth: The one dial: size, batch, rates and length.
        max_steps: The step to stop at, 1 or more; the length where nothing gives one.
        save_dir: The run folder.
        save_dir_flag: The flag that named it, for messages.
        seed: Of weights, data order and dropout.
        micro_batch_size: Rows of one forward pass, or "auto".
        resume: A run or a checkpoint to go on from; empty for the run in `save_dir`, else the newest.
        overwrite: Start anew in a folder that holds a run.
        manual_config: Decide nothing automatically.
        print_config: Print every key, its value and source, and train nothing.
        dry_run: Decide and forecast, and train nothing.
        validate_setup: Verify the machine and the configuration, and train nothing.
        force: Train although the forecast does not fit.
        allow_cpu_fallback: Let the CPU compute what MPS has no kernel for.
        log: Rows in the terminal: "spaced" or "every".
        quiet: Print warnings and the summary only.
        json: Print JSON lines on stdout, text on stderr.
    """

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
