"""The machine as the seed's `system` module showed it: `print_system_info()` and `SYSTEM_CONFIG`.

The architecture comes from the compute capability, so an H100 is "hopper" and an RTX 4090 "ada".
Nothing is asked of the machine before the first figure is read, and no framework is imported.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from core.errors import PippinError
from core.machine.detect import gib, gpu_budget_bytes, machine_facts, native_bf16, system_words
from core.machine.facts import MachineFacts

TITLE = "\N{LEFT-POINTING MAGNIFYING GLASS} GPU System Configuration:"


class SystemConfig:
    """A summary of one machine, read when it is first needed.

    Args:
        detect: Where the facts come from; this machine by default.
    """

    def __init__(self, detect: Callable[[], MachineFacts] = machine_facts) -> None:
        self._detect = detect

    @cached_property
    def facts(self) -> MachineFacts:
        """Everything that is known."""
        return self._detect()

    @property
    def architecture(self) -> str:
        """As "blackwell", "hopper", "apple m3" or "cpu"; "unknown" for a card that does not say."""
        if self.facts.apple is not None:
            generation = self.facts.apple.generation
            return "apple" if generation is None else f"apple m{generation}"
        if self.facts.nvidia is None:
            return "cpu"
        return (self.facts.nvidia.gpus[0].architecture or "unknown").lower()

    @property
    def device_name(self) -> str:
        """The GPU that a run would use, else the processor."""
        nvidia = self.facts.nvidia
        return self.facts.cpu.name if nvidia is None else nvidia.gpus[0].name

    @property
    def backend(self) -> str:
        """The backend this hardware is for, installed or not."""
        if self.facts.apple is not None and not self.facts.apple.is_rosetta:
            return "mlx"
        return "cpu" if self.facts.nvidia is None else "cuda"

    def supports_feature(self, feature: str) -> bool:
        """Whether the device computes in "fp8", "bf16", "fp16" or "fp32"; "nvlink": cards are joined.

        What is not known counts as no.

        Raises:
            PippinError: P012 for another feature.
        """
        nvidia = self.facts.nvidia
        answers = {
            "fp8": nvidia is not None and all(g.native_fp8 for g in nvidia.gpus),
            "bf16": self._has_bf16(),
            "fp16": nvidia is not None or self.facts.apple is not None,
            "fp32": True,
            "nvlink": nvidia is not None and nvidia.interconnect == "nvlink",
        }
        if feature not in answers:
            raise PippinError("P012", f"no feature is called {feature!r}.", choices=tuple(answers))
        return answers[feature]

    def _has_bf16(self) -> bool:
        if self.backend == "cpu":
            return bool(self.facts.cpu.bf16)
        return native_bf16(self.backend, self.facts)

    def get_optimal_dtype(self) -> str:
        """What `train.precision: auto` means here: bfloat16 on a GPU that has it, else float32."""
        return "bfloat16" if native_bf16(self.backend, self.facts) else "float32"

    def get_info(self) -> dict[str, Any]:
        """The summary as plain values; None where a figure cannot be had."""
        return {
            "architecture": self.architecture,
            "device_name": self.device_name,
            "has_fp8_support": self.supports_feature("fp8"),
            "has_bf16_support": self.supports_feature("bf16"),
            "optimal_dtype": self.get_optimal_dtype(),
            "num_gpus": 0 if self.facts.nvidia is None else len(self.facts.nvidia.gpus),
            "gpu_memory_bytes": gpu_budget_bytes(self.facts),
            "memory_bytes": self.facts.usable_memory_bytes,
            "cpu_cores": self.facts.cpu.physical_cores,
            "system": system_words(self.facts),
        }


SYSTEM_CONFIG = SystemConfig()


def print_system_info(
    config: SystemConfig | None = None, *, write: Callable[[str], Any] = print
) -> None:
    """Print the summary.

    Args:
        config: The machine; this one by default.
        write: Takes each line.
    """
    config = SYSTEM_CONFIG if config is None else config
    info = config.get_info()

    def size(value: int | None) -> str:
        return "unknown" if value is None else gib(value)

    write(TITLE)
    write(f"   Architecture: {info['architecture']}")
    write(f"   Device: {info['device_name']}")
    write(f"   FP8 Support: {info['has_fp8_support']}")
    write(f"   BF16 Support: {info['has_bf16_support']}")
    write(f"   Precision of a run: {info['optimal_dtype']}")
    if config.backend != "cpu":
        count = f"{info['num_gpus']} x " if info["num_gpus"] > 1 else ""
        write(f"   GPU Memory: {count}{size(info['gpu_memory_bytes'])}")
    write(f"   Memory: {size(info['memory_bytes'])}")
    write(f"   CPU: {config.facts.cpu.name}, {info['cpu_cores'] or 'unknown'} cores")
    write(f"   System: {info['system']}")
