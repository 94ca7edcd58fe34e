"""What is known of a machine. Sizes are bytes; a figure that cannot be had is None, never 0."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

GpuKind = Literal["consumer", "workstation", "datacenter"]
Interconnect = Literal["nvlink", "mixed", "pcie"]


@dataclass(frozen=True)
class CpuFacts:
    """The processor.

    Attributes:
        name: "Apple M3 Pro", "Intel(R) Xeon(R) Platinum 8488C".
        physical_cores: Cores.
        logical_cores: Hardware threads.
        performance_cores: Fast cores, of a processor that has two kinds.
        efficiency_cores: Slow cores, of a processor that has two kinds.
        usable_cores: Hardware threads that this process may use, by affinity and by the container.
        bf16: Whether it has bfloat16 instructions.
        avx512: Whether it has AVX-512.
        amx: Whether it has Intel's AMX (Apple's own unit is not a public instruction set).
        sme: Whether it has ARM's SME (Apple M4 and later).
    """

    name: str
    physical_cores: int | None
    logical_cores: int | None
    performance_cores: int | None
    efficiency_cores: int | None
    usable_cores: int | None
    bf16: bool | None
    avx512: bool | None
    amx: bool | None
    sme: bool | None


@dataclass(frozen=True)
class AppleFacts:
    """An Apple chip and its GPU, which shares the memory.

    Attributes:
        chip: "Apple M3 Pro".
        generation: 3 for an M3.
        gpu_cores: Cores of the GPU.
        unified_memory_bytes: The machine's memory.
        recommended_working_set_bytes: What programs may use together on the GPU: Metal's own figure,
            else `iogpu.wired_limit_mb`, else macOS's rule.
        working_set_source: Which of them, in words.
        working_set_is_estimate: Whether it is the rule.
        largest_buffer_bytes: Metal's `maxBufferLength`: no array can be larger.
        is_rosetta: Whether this Python is an Intel build, which has no MLX and no MPS.
    """

    chip: str
    generation: int | None
    gpu_cores: int | None
    unified_memory_bytes: int | None
    recommended_working_set_bytes: int | None
    working_set_source: str | None
    working_set_is_estimate: bool
    largest_buffer_bytes: int | None
    is_rosetta: bool


@dataclass(frozen=True)
class NvidiaGpu:
    """One card, or one MIG slice of a card.

    Attributes:
        index: nvidia-smi's number of the card.
        uuid: "GPU-..." or "MIG-...".
        name: "NVIDIA GeForce RTX 4090"; of a slice with its profile.
        memory_bytes: Its own memory.
        compute_capability: (8, 9).
        architecture: "Ada", by the compute capability.
        kind: consumer, workstation or datacenter, by the name.
        is_mig: Whether this is a slice.
    """

    index: int
    uuid: str | None
    name: str
    memory_bytes: int | None
    compute_capability: tuple[int, int] | None
    architecture: str | None
    kind: GpuKind | None
    is_mig: bool

    @property
    def native_bf16(self) -> bool | None:
        """Whether it multiplies bfloat16 in its tensor units: from Ampere on."""
        return None if self.compute_capability is None else self.compute_capability >= (8, 0)

    @property
    def native_fp8(self) -> bool | None:
        """Whether it has FP8 units: Ada, Hopper and later."""
        return None if self.compute_capability is None else self.compute_capability >= (8, 9)


@dataclass(frozen=True)
class NvidiaFacts:
    """The cards that this process sees, in CUDA's order.

    Attributes:
        gpus: Visible cards.
        num_installed: Cards of the machine.
        driver: Version of the driver.
        interconnect: Between the visible cards: "nvlink" between all pairs, "mixed" between some, or
            "pcie"; None for one card or where nvidia-smi does not say.
        order_is_certain: False where the cards differ and CUDA numbers them by speed, which only CUDA
            knows (`CUDA_DEVICE_ORDER=PCI_BUS_ID` makes it certain).
    """

    gpus: tuple[NvidiaGpu, ...]
    num_installed: int
    driver: str | None
    interconnect: Interconnect | None
    order_is_certain: bool

    @property
    def replica_memory_bytes(self) -> int | None:
        """Memory that one replica of a model can have: one card's, the smallest, never a sum."""
        sizes = [g.memory_bytes for g in self.gpus]
        known = [s for s in sizes if s is not None]
        return min(known) if known and len(known) == len(sizes) else None


@dataclass(frozen=True)
class Limits:
    """What a container or control group allows; None where it does not limit."""

    memory_bytes: int | None
    cpus: float | None


@dataclass(frozen=True)
class Power:
    """Mains or battery.

    Attributes:
        on_mains: None where a battery does not say whether it is charged.
        battery_percent: None without a battery.
    """

    on_mains: bool | None
    battery_percent: float | None


@dataclass(frozen=True)
class MachineFacts:
    """A machine.

    Attributes:
        system: "macOS", "Linux" or "Windows".
        system_version: "15.5"; of Linux the kernel's release.
        architecture: "arm64", "x86_64".
        cpu: The processor.
        memory_bytes: All memory.
        available_bytes: What can be given to programs without swapping.
        swap_used_bytes: Swap in use.
        limits: Of a container or control group.
        apple: The Apple chip, None on other machines.
        nvidia: NVIDIA cards, None where no card is visible.
        power: Mains or battery.
        disk_folder: The folder whose disk was asked.
        disk_free_bytes: What can be written there.
    """

    system: str
    system_version: str | None
    architecture: str
    cpu: CpuFacts
    memory_bytes: int | None
    available_bytes: int | None
    swap_used_bytes: int | None
    limits: Limits
    apple: AppleFacts | None
    nvidia: NvidiaFacts | None
    power: Power
    disk_folder: str
    disk_free_bytes: int | None

    @property
    def usable_memory_bytes(self) -> int | None:
        """The memory, or a container's smaller share of it."""
        known = [n for n in (self.memory_bytes, self.limits.memory_bytes) if n is not None]
        return min(known) if known else None

    def as_object(self) -> dict[str, Any]:
        """A JSON object of every field."""
        return asdict(self)
