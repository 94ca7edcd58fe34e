"""`auto_configure()`: what `python train.py` would decide here, as an object, before any text is prepared.

    from core.machine import auto_configure

    configurator = auto_configure()                 # detects everything
    configurator.print_config()                     # shows what it found
    model_config = configurator.get_model_config()  # the architecture

No framework is imported and nothing is written. With `backends` (what `auto_config.py` of the project's
root hands in) the speed is measured on the backend, as train.py does; without, it is estimated as
`core.machine.rate` does, and said to be. The text is not read: the vocabulary
and the number of tokens are those that stories would have, so train.py may still differ in these.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import IO, Any

from core.backend import MLX_LINUX_BUILDS, Availability, CreateBackend
from core.checkpoint import initial_checkpoint
from core.config.draft import Draft
from core.config.load import build, load
from core.config.schema import ModelConfig, RunConfig
from core.machine.autoconfig import (
    STORY_VOCAB_SIZE,
    DataFacts,
    DeviceFacts,
    resolve_auto,
    resolve_early,
)
from core.machine.backends import Backends
from core.machine.depth import apply_depth
from core.machine.detect import device_facts, machine_facts
from core.machine.facts import MachineFacts
from core.machine.memory import predict_training_memory
from core.machine.probe import Probe
from core.machine.rate import sizing_rate, slow_speed, speed_at
from core.machine.scaling import STORY_BYTES_PER_TOKEN, Tier
from core.machine.speed import measure_tokens_per_s
from core.machine.timebudget import apply_time_budget, parse_minutes
from core.params import num_parameters, param_specs

PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class AutoConfigurator:
    """What was found and decided.

    Attributes:
        machine: The machine in one line.
        device: The device that a run would use.
        config: The resolved experiment.
        draft: Every value with its source and reason.
        tokens_per_s: Speed at the chosen size; None where it does not fit.
        speed_source: "measured", "estimated from ..." or "predicted: ...".
        notes: What the user's own values and a depth have to say to each other.
    """

    machine: str
    device: DeviceFacts
    config: RunConfig
    draft: Draft
    tokens_per_s: float | None
    speed_source: str
    notes: tuple[str, ...] = ()

    @property
    def tier(self) -> Tier:
        """The tier of the device's memory."""
        return self.device.tier

    def get_model_config(self) -> ModelConfig:
        """The architecture."""
        return self.config.model

    def get_config(self) -> RunConfig:
        """The whole experiment."""
        return self.config

    def as_object(self) -> dict[str, Any]:
        """A JSON object: machine, tier, configuration, and the reason of each decision."""
        return {
            "machine": self.machine,
            "backend": self.device.backend,
            "tier": self.tier.name,
            "memory_bytes": self.device.memory_bytes,
            "budget_bytes": self.device.budget_bytes,
            "parameters": num_parameters(param_specs(self.config.model)),
            "tokens_per_s": self.tokens_per_s,
            "speed": self.speed_source,
            "config": self.config.model_dump(mode="json"),
            "why": {k: s.reason for k, s in self.draft.sources.items() if s.reason},
        }

    def print_config(self, stream: IO[str] | None = None) -> None:
        """Print what was found and decided; the first words of each line are seed guide 000's."""
        print("\n".join(self.lines()), file=sys.stdout if stream is None else stream)

    def lines(self) -> list[str]:
        """The lines of `print_config`."""
        m, t, d = self.config.model, self.config.train, self.config.data
        specs = param_specs(m)
        needed = predict_training_memory(self.config, specs).total
        limit = self.device.budget_bytes * t.memory_fraction
        memory = self.device.memory_bytes or self.device.budget_bytes
        why = {k: s.reason for k, s in self.draft.sources.items()}
        speed = "not measured: it does not fit"
        if self.tokens_per_s is not None:
            speed = f"{self.tokens_per_s:,.0f} tokens/s, {self.speed_source}"
        heads = f"{m.d_model}d x {m.n_layers}L x {m.n_heads}H"
        return [
            f"Machine: {self.machine}",
            f"Mode: {self.device.backend} ({self.device.reason or 'given'})",
            f"Memory: {memory / 1e9:.1f} GB for one replica: tier {self.tier.name}, at most "
            f"{self.tier.d_model}d x {self.tier.n_layers}L x {self.tier.n_heads}H",
            f"Model: {heads}, {why['model.d_model'] or 'given'}",
            f"Experts: {f'{m.n_experts}, {m.top_k} a token' if m.n_experts else 'none, dense'}",
            f"Batch: {t.micro_batch_size} rows x {t.grad_accum_steps} "
            f"({why['train.micro_batch_size'] or 'given'})",
            f"Sequence: {d.seq_len} ({why['data.seq_len'] or 'given'})",
            f"Mixed Precision: {'no' if t.precision == 'float32' else 'yes'}, {t.precision} "
            f"({why['train.precision'] or 'given'})",
            f"Steps: {t.total_steps:,} ({why['train.total_steps'] or 'given'})",
            f"Parameters: {num_parameters(specs):,}",
            f"Learning rate: {t.lr:g} (matrices {t.lr_matrix:g}, embedding {t.lr_embed:g})",
            f"Will take: {needed / 1e9:.1f} of {limit / 1e9:.1f} GB · {speed}",
            *(f"Note: {note}" for note in self.notes),
        ]


def auto_configure(
    backends: Backends | None = None,
    *,
    config: str = "quickstart",
    overrides: Sequence[str] = (),
    depth: int | None = None,
    time_budget: str | None = None,
    probe: Probe | None = None,
    measure: Callable[[RunConfig], float] | None = None,
) -> AutoConfigurator:
    """Decide everything from the hardware.

    Args:
        backends: The module `backends`, to measure the speed with; None estimates it.
        config: A preset or file to start from.
        overrides: `section.key=value` texts, as train.py takes them.
        depth: As `--depth`.
        time_budget: As `--time-budget`.
        probe: Where the machine's answers come from; this machine by default.
        measure: Positions per second of a configuration, instead of either.

    Raises:
        PippinError: as train.py would.
    """
    flags: dict[str, Any] = {}
    if time_budget is not None:
        flags["train.minutes"] = parse_minutes(time_budget)
    draft = load(config=config, overrides=overrides, flags=flags)
    notes = () if time_budget is None else apply_time_budget(draft, time_budget)
    dial = None if depth is None else apply_depth(draft, depth)
    facts = machine_facts(probe)
    available = installed(facts) if backends is None else backends.available()
    wanted = None if draft.is_auto("train.backend") else str(draft.values["train.backend"])
    found = device_facts(wanted, available, probe=probe)
    resolve_early(draft, found.device, dial)
    draft.resolve("data.tokenizer", "bpe", "the stories'")
    speed_source = "as given"
    if measure is None:
        measure, speed_source = _speed(backends, found.device, facts)
    data = _assumed_data(draft)
    how = "measured" if backends is not None else "estimated"
    speed = resolve_auto(draft, data, found.device, measure, dial, how=how)
    draft.resolve("train.save_dir", "checkpoints/auto", "train.py takes the next free name")
    notes += () if dial is None else dial.notes
    decided = build(draft)
    if speed is None and _fits(decided, found.device):
        slow = (
            slow_speed(decided, found.device, facts, decided.data.seq_len)
            if how == "measured"
            else None
        )
        speed, speed_source = slow or (measure(decided), speed_source)
    return AutoConfigurator(found.machine, found.device, decided, draft, speed, speed_source, notes)


def installed(facts: MachineFacts) -> dict[str, Availability]:
    """Backends by the hardware and the packages that are installed; nothing is imported."""
    torch, mlx = _version("torch"), _version("mlx")
    on_linux = facts.system == "Linux"
    builds = {b: v for b in MLX_LINUX_BUILDS if on_linux and (v := _version(b)) is not None}
    apple = facts.apple is not None and not facts.apple.is_rosetta
    states = {
        "mlx": (mlx, True, ""),
        "mps": (torch, apple, "this machine is no Mac with an Apple chip"),
        "cuda": (torch, facts.nvidia is not None, "no NVIDIA device is here"),
        "cpu": (torch, True, ""),
    }
    found = {}
    for name, (version, here, reason) in states.items():
        package = "mlx" if name == "mlx" else "torch"
        if version is None:
            reason = f"the package {package} is missing"
        found[name] = Availability(
            name,
            version is not None and here,
            reason if version is None or not here else "",
            f"pip install {package}" if version is None else "--backend cpu",
            {} if version is None else {package: version, **(builds if name == "mlx" else {})},
        )
    return found


def _speed(
    backends: Backends | None, device: DeviceFacts, facts: MachineFacts
) -> tuple[Callable[[RunConfig], float], str]:
    if backends is not None:
        create = backends.load(device.backend)
        return lambda config: _measure(create, config), "measured"

    def estimate(config: RunConfig) -> float:
        rate = sizing_rate(device, facts, config.train.precision, tf32=config.train.tf32)
        return speed_at(config, rate, config.data.seq_len) or 0.0

    return estimate, sizing_rate(device, facts, "float32").how


def _measure(create: CreateBackend, config: RunConfig) -> float:
    specs = param_specs(config.model)
    backend = create(config, specs, mode="train")
    try:
        backend.load(initial_checkpoint(config, specs))
        return measure_tokens_per_s(backend, config, seconds=PROBE_SECONDS)
    finally:
        backend.close()


def _assumed_data(draft: Draft) -> DataFacts:
    """The stories as they would be."""
    size, held_out = int(draft.values["data.corpus_bytes"]), _held_out(draft.values)
    tokens = int(size * (1 - held_out) / STORY_BYTES_PER_TOKEN)
    vocab = draft.values["model.vocab_size"]
    vocab_size = STORY_VOCAB_SIZE if draft.is_auto("model.vocab_size") else int(vocab)
    return DataFacts(vocab_size, tokens, "stories", draft.values["data.input_file"] is None)


def _fits(config: RunConfig, device: DeviceFacts) -> bool:
    needed = predict_training_memory(config, param_specs(config.model)).total
    return needed <= device.budget_bytes * config.train.memory_fraction


def _held_out(values: Mapping[str, Any]) -> float:
    return float(values["data.val_fraction"]) + float(values["data.test_fraction"])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
