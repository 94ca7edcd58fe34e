"""NVIDIA cards, from nvidia-smi: which of them this process sees, what they are, how they are joined.

Architectures follow the compute capability (CUDA C++ Programming Guide, "Compute Capabilities"), never
the name: the T400 is no T4, and the H100 is Hopper. CUDA_VISIBLE_DEVICES is read as the guide says:
numbers or beginnings of UUIDs, up to the first that names nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from core.machine.facts import GpuKind, Interconnect, NvidiaFacts, NvidiaGpu
from core.machine.probe import Probe

_MIB = 1 << 20
_FIELDS = ("index", "uuid", "name", "memory.total", "driver_version")
# Newer drivers know these as well.
_MORE_FIELDS = (*_FIELDS, "compute_cap", "mig.mode.current")
TOPOLOGY = ("nvidia-smi", "topo", "-m")
LINKS = ("nvidia-smi", "nvlink", "--status")
LIST = ("nvidia-smi", "-L")

# Words of a name, compared whole. Servers' cards have no family name: "NVIDIA L40S", "Tesla T4".
_WORKSTATION = {"Quadro", "RTX", "Workstation", "GB10"}
_CONSUMER = {"GeForce", "TITAN"}
_DATACENTER = re.compile(
    r"(Tesla|Server|GRID|[VPKM]\d{2,3}[A-Z]?|T4G?|A(2|10|10G|10M|16|30|30X|40|100|100X|800)"
    r"|L(2|4|20|40|40S|40G)|H(20|100|200|800)|B(100|200|300)|G[HB](200|300))(-.*)?$"
)
_WORKSTATION_MODEL = re.compile(r"(A\d{3,4}|T\d{3,4})$")


def query(fields: Sequence[str]) -> tuple[str, ...]:
    """The command that asks for these fields of every card."""
    return ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")


def architecture(capability: tuple[int, int] | None) -> str | None:
    """Name of the architecture of a compute capability, None for one that is not known."""
    if capability is None:
        return None
    major, minor = capability
    if major == 7:
        return "Turing" if minor == 5 else "Volta"
    if major == 8:
        return "Ada" if minor == 9 else "Ampere"
    names = {5: "Maxwell", 6: "Pascal", 9: "Hopper", 10: "Blackwell", 11: "Blackwell"}
    return names.get(major, "Blackwell" if major == 12 else None)


def gpu_kind(name: str) -> GpuKind | None:
    """What a card is made for, by the words of its name; None where the name does not say."""
    words = name.split()
    if "Server" in words:
        return "datacenter"
    if _CONSUMER & set(words):
        return "consumer"
    if _WORKSTATION & set(words):
        return "workstation"
    if any(_DATACENTER.match(w) for w in words):
        return "datacenter"
    return "workstation" if any(_WORKSTATION_MODEL.match(w) for w in words) else None


def nvidia_facts(probe: Probe) -> NvidiaFacts | None:
    """The cards that this process sees, None where it sees none."""
    rows, driver = _cards(probe)
    if not rows:
        return None
    installed = tuple(gpu for gpu, _ in rows)
    slices = _slices(probe, rows) if any(is_mig for _, is_mig in rows) else {}
    in_bus_order = probe.environ("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    same = len({(g.name, g.memory_bytes) for g in installed}) == 1
    wanted = probe.environ("CUDA_VISIBLE_DEVICES")
    chosen, by_number = _visible(installed, slices, wanted)
    certain = in_bus_order or same or not by_number or len(installed) == 1
    if not certain and len(chosen) < len(installed):
        chosen = _weakest(chosen, installed)
    if not chosen:
        return None
    return NvidiaFacts(
        gpus=chosen,
        num_installed=len(installed),
        driver=driver,
        interconnect=_interconnect(probe, chosen),
        order_is_certain=certain,
    )


def _weakest(chosen: Sequence[NvidiaGpu], installed: Sequence[NvidiaGpu]) -> tuple[NvidiaGpu, ...]:
    """The chosen cards with the least that any card has.

    CUDA's first card is its fastest and nvidia-smi's the first of the bus: any may be meant.
    """
    sizes = [g.memory_bytes for g in installed if g.memory_bytes is not None]
    capabilities = [g.compute_capability for g in installed if g.compute_capability is not None]
    complete = len(sizes) == len(capabilities) == len(installed)
    size = min(sizes) if complete else None
    least = min(capabilities) if complete else None
    kinds = {g.kind for g in installed}
    unknown = NvidiaGpu(
        index=-1,
        uuid=None,
        name=" or ".join(sorted({g.name for g in installed})),
        memory_bytes=size,
        compute_capability=least,
        architecture=architecture(least),
        kind=kinds.pop() if len(kinds) == 1 else None,
        is_mig=False,
    )
    return tuple(replace(unknown, index=g.index) for g in chosen)


def _cards(probe: Probe) -> tuple[list[tuple[NvidiaGpu, bool]], str | None]:
    """Every card with whether it is cut into slices, and the driver's version."""
    fields: tuple[str, ...] = _MORE_FIELDS
    text = probe.run(query(fields))
    if text is None:  # a driver that does not know a field refuses them all
        fields, text = _FIELDS, probe.run(query(_FIELDS))
    rows: list[tuple[NvidiaGpu, bool]] = []
    driver = None
    for line in (text or "").splitlines():
        values = [v.strip() for v in line.split(",")]
        if len(values) != len(fields) or not values[0].isdigit():
            continue
        row = dict(zip(fields, values, strict=True))
        driver = _said(row["driver_version"])
        capability = _capability(row.get("compute_cap", ""))
        memory = row["memory.total"]
        gpu = NvidiaGpu(
            index=int(row["index"]),
            uuid=_said(row["uuid"]),
            name=row["name"],
            memory_bytes=(int(memory) * _MIB or None) if memory.isdigit() else None,
            compute_capability=capability,
            architecture=architecture(capability),
            kind=gpu_kind(row["name"]),
            is_mig=False,
        )
        rows.append((gpu, row.get("mig.mode.current") == "Enabled"))
    return rows, driver


def _slices(
    probe: Probe, rows: Sequence[tuple[NvidiaGpu, bool]]
) -> dict[int, tuple[NvidiaGpu, ...]]:
    """Slices of each card that is cut, by the card's index.

    A slice's memory is what its profile says ("1g.10gb"): the true figure is within some percent.
    """
    by_index = {gpu.index: gpu for gpu, is_mig in rows if is_mig}
    found: dict[int, tuple[NvidiaGpu, ...]] = {index: () for index in by_index}
    card = None
    for line in (probe.run(LIST) or "").splitlines():
        if head := re.match(r"GPU (\d+):", line):
            card = by_index.get(int(head.group(1)))
        part = re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (\S+)\)", line)
        if part and card is not None:
            size = re.search(r"\.(\d+)gb", part.group(1))
            piece = replace(
                card,
                uuid=part.group(2),
                name=f"{card.name} MIG {part.group(1)}",
                memory_bytes=int(size.group(1)) * 10**9 if size else None,
                is_mig=True,
            )
            found[card.index] = (*found[card.index], piece)
    return found


def _visible(
    installed: tuple[NvidiaGpu, ...], slices: dict[int, tuple[NvidiaGpu, ...]], wanted: str | None
) -> tuple[tuple[NvidiaGpu, ...], bool]:
    """The cards that CUDA shows, and whether they are chosen by CUDA's own numbers."""
    if wanted is None:
        if any(slices.values()):  # one slice, of the first card that has one
            return (next(part for part in slices.values() if part)[0],), True
        return tuple(g for g in installed if g.index not in slices), True
    everything = [*installed, *(piece for part in slices.values() for piece in part)]
    chosen: list[NvidiaGpu] = []
    by_number = True
    for item in (part.strip() for part in wanted.split(",")):
        if item.isdigit():
            found = [installed[int(item)]] if int(item) < len(installed) else []
            # A number means the card; of one that is cut, its first slice.
            found = [(slices[g.index] or (g,))[0] if g.index in slices else g for g in found]
        else:
            by_number = False
            found = [g for g in everything if item and (g.uuid or "").startswith(item)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return tuple(chosen), by_number


def _interconnect(probe: Probe, gpus: Sequence[NvidiaGpu]) -> Interconnect | None:
    cards = sorted({g.index for g in gpus})
    if len(cards) < 2:
        return None
    links = _topology(probe.run(TOPOLOGY) or "", cards)
    if links is None:
        return _by_status(probe.run(LINKS) or "", cards)
    joined = [re.fullmatch(r"NV\d+", link) is not None for link in links]
    return "nvlink" if all(joined) else "mixed" if any(joined) else "pcie"


def _topology(text: str, cards: Sequence[int]) -> list[str] | None:
    """The entries between all pairs of cards of `nvidia-smi topo -m`, None where one is missing."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # the head is underlined
    lines = [line.split() for line in plain.splitlines() if line.strip()]
    head = next((line for line in lines if line[0] == "GPU0"), None)
    if head is None:
        return None
    columns = {name: i + 1 for i, name in enumerate(head) if re.fullmatch(r"GPU\d+", name)}
    rows = {line[0]: line for line in lines if line is not head and line[0] in columns}
    found = []
    for i, a in enumerate(cards):
        for b in cards[i + 1 :]:
            row, column = rows.get(f"GPU{a}", []), columns.get(f"GPU{b}", 1 << 30)
            if column >= len(row):
                return None
            found.append(row[column])
    return found


def _by_status(text: str, cards: Sequence[int]) -> Interconnect | None:
    """From `nvidia-smi nvlink --status`, which says of each card whether links are up, not to whom."""
    up: dict[int, bool] = {}
    card = -1
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            card = int(head.group(1))
        elif re.match(r"\s+Link \d+: [\d.]+ GB/s", line):
            up[card] = True
    return "nvlink" if all(up.get(c, False) for c in cards) else None


def _capability(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else None


def _said(text: str) -> str | None:
    return None if text in ("", "[N/A]", "N/A", "[Not Supported]") else text
