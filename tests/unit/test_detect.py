"""Detection on recorded machines: every field of each, against values worked out by hand.

The files of tests/machines hold raw answers of commands; their `about` says what machine it is. The
expected figures come from the vendors' data sheets (cores, memory, architecture), from the raw
answers by a calculator (GiB, MiB), and from macOS's rule (2/3 up to 32 GiB, 3/4 above).

Run: python -m pytest tests/unit/test_detect.py
"""

import json
from dataclasses import fields, is_dataclass

import pytest

from core.backend import Availability
from core.errors import PippinError
from core.machine import configurator
from core.machine.detect import (
    budget_bytes,
    describe,
    device_facts,
    machine_facts,
    native_bf16,
)
from core.machine.facts import (
    AppleFacts,
    CpuFacts,
    Limits,
    MachineFacts,
    NvidiaFacts,
    NvidiaGpu,
    Power,
)
from core.machine.nvidia import architecture, gpu_kind
from core.machine.probe import SystemProbe
from tests.machines.recorded import FOLDER, NAMES, recorded

METAL, RULE = "Metal's recommended working set", "macOS's default share"
FREE, MAINS = Limits(None, None), Power(True, None)
GIB = 1 << 30


def uuid(number):
    return f"GPU-{number:08d}-1c2d-4e5f-8a9b-0123456789ab"


def mac(version, cpu, memory, available, swap, apple, power, disk, architecture="arm64"):
    return MachineFacts(
        "macOS",
        version,
        architecture,
        cpu,
        memory,
        available,
        swap,
        FREE,
        apple,
        None,
        power,
        ".",
        disk,
    )


def apple_cpu(name, fast, slow, *, bf16, sme):
    cores = fast + slow
    return CpuFacts(name, cores, cores, fast, slow, cores, bf16, False, False, sme)


def linux(cpu, memory, disk, *, nvidia=None, limits=FREE, power=MAINS, swap=0, arch="x86_64"):
    total, available = memory
    version = "6.8.0-45-generic"
    return MachineFacts(
        "Linux",
        version,
        arch,
        cpu,
        total,
        available,
        swap,
        limits,
        None,
        nvidia,
        power,
        ".",
        disk,
    )


def x86(name, cores, threads, *, usable=None, bf16=False, avx512=False, amx=False, kinds=None):
    fast, slow = kinds or (None, None)
    usable = usable or threads
    return CpuFacts(name, cores, threads, fast, slow, usable, bf16, avx512, amx, False)


def card(index, name, mib, capability, arch, kind):
    return NvidiaGpu(index, uuid(index + 1), name, mib << 20, capability, arch, kind, False)


def cards(*gpus, installed=None, driver="570.124.06", link=None, certain=True):
    return NvidiaFacts(gpus, installed or len(gpus), driver, link, certain)


H100 = ("NVIDIA H100 80GB HBM3", 81559, (9, 0), "Hopper", "datacenter")
RTX3090 = ("NVIDIA GeForce RTX 3090", 24576, (8, 6), "Ampere", "consumer")
EPYC = "AMD EPYC 7763 64-Core Processor"
THREADRIPPER = "AMD Ryzen Threadripper 3960X 24-Core Processor"
M4_24 = AppleFacts("Apple M4", 4, 10, 24 * GIB, 19069468672, METAL, False, 14302101504, False)

EXPECTED = {
    "m1_air_8gb": mac(
        "14.5",
        apple_cpu("Apple M1", 4, 4, bf16=False, sme=None),
        8589934592,
        2147483648,
        2147483648,
        AppleFacts("Apple M1", 1, 7, 8589934592, 5726633984, METAL, False, 4294967296, False),
        Power(False, 43),
        31 * 10**9,
    ),
    "m2_air_16gb": mac(
        "15.5",
        apple_cpu("Apple M2", 4, 4, bf16=True, sme=False),
        17179869184,
        8589934592,
        0,
        AppleFacts("Apple M2", 2, 10, 17179869184, 12713115648, METAL, False, 9534832640, False),
        Power(True, 100),
        210 * 10**9,
    ),
    "m4_air_24gb": mac(
        "15.4",
        apple_cpu("Apple M4", 4, 6, bf16=True, sme=True),
        25769803776,
        12884901888,
        0,
        M4_24,
        Power(True, 88),
        400 * 10**9,
    ),
    "m4_mini_24gb": mac(
        "15.4",
        apple_cpu("Apple M4", 4, 6, bf16=True, sme=True),
        25769803776,
        12884901888,
        0,
        M4_24,
        MAINS,
        120 * 10**9,
    ),
    "m3_pro_18gb": mac(
        "14.2",
        apple_cpu("Apple M3 Pro", 5, 6, bf16=True, sme=False),
        19327352832,
        9663676416,
        0,
        AppleFacts("Apple M3 Pro", 3, 14, 19327352832, 12884901888, RULE, True, None, False),
        Power(None, 71),
        55 * 10**9,
    ),
    "m3_max_36gb": mac(
        "15.1",
        apple_cpu("Apple M3 Max", 10, 4, bf16=True, sme=False),
        38654705664,
        19327352832,
        0,
        AppleFacts(
            "Apple M3 Max", 3, 30, 38654705664, 30150672384, METAL, False, 22613000192, False
        ),
        Power(True, 100),
        512 * 10**9,
    ),
    "m4_max_64gb": mac(
        "15.5",
        apple_cpu("Apple M4 Max", 12, 4, bf16=True, sme=True),
        68719476736,
        34359738368,
        0,
        AppleFacts(
            "Apple M4 Max", 4, 40, 68719476736, 55662788608, METAL, False, 41747087360, False
        ),
        MAINS,
        700 * 10**9,
    ),
    # The limit was raised to 114688 MiB, and Metal says the same.
    "m4_max_128gb": mac(
        "26.0",
        apple_cpu("Apple M4 Max", 12, 4, bf16=True, sme=True),
        137438953472,
        68719476736,
        0,
        AppleFacts(
            "Apple M4 Max", 4, 40, 137438953472, 120259084288, METAL, False, 86586540032, False
        ),
        Power(True, 97),
        1500 * 10**9,
    ),
    # 3/4 of 512 GiB is 384 GiB.
    "m3_ultra_512gb": mac(
        "15.3",
        apple_cpu("Apple M3 Ultra", 24, 8, bf16=True, sme=False),
        549755813888,
        494780232499,
        0,
        AppleFacts("Apple M3 Ultra", 3, 80, 549755813888, 412316860416, RULE, True, None, False),
        MAINS,
        3000 * 10**9,
    ),
    "m1_max_32gb_wired": mac(
        "14.6",
        apple_cpu("Apple M1 Max", 8, 2, bf16=False, sme=None),
        34359738368,
        17179869184,
        0,
        AppleFacts(
            "Apple M1 Max",
            1,
            None,
            34359738368,
            27262976000,
            "sysctl iogpu.wired_limit_mb",
            False,
            None,
            False,
        ),
        Power(True, 55),
        90 * 10**9,
    ),
    "m1_rosetta": mac(
        "14.5",
        apple_cpu("Apple M1", 4, 4, bf16=False, sme=None),
        17179869184,
        8589934592,
        0,
        AppleFacts("Apple M1", 1, 8, 17179869184, 11453251584, METAL, False, 8589934592, True),
        Power(True, 60),
        80 * 10**9,
        architecture="x86_64",
    ),
    "intel_mac": mac(
        "13.6",
        CpuFacts(
            "Intel(R) Core(TM) i9-9900K CPU @ 3.60GHz",
            8,
            16,
            None,
            None,
            16,
            None,
            False,
            False,
            False,
        ),
        42949672960,
        21474836480,
        0,
        None,
        MAINS,
        200 * 10**9,
        architecture="x86_64",
    ),
    "t4": linux(
        x86("Intel(R) Xeon(R) CPU @ 2.00GHz", 2, 4, avx512=True),
        (15642984448, 13900000000),
        60 * 10**9,
        nvidia=cards(card(0, "Tesla T4", 15360, (7, 5), "Turing", "datacenter")),
    ),
    "t400": linux(
        x86("Intel(R) Core(TM) i5-12500", 6, 12),
        (33400000000, 28000000000),
        200 * 10**9,
        nvidia=cards(card(0, "NVIDIA T400 4GB", 4096, (7, 5), "Turing", "workstation")),
    ),
    "rtx_4090": linux(
        x86("AMD Ryzen 9 7950X 16-Core Processor", 16, 32, bf16=True, avx512=True),
        (67247022080, 60000000000),
        800 * 10**9,
        nvidia=cards(card(0, "NVIDIA GeForce RTX 4090", 24564, (8, 9), "Ada", "consumer")),
    ),
    # 8 performance cores of two threads (0-15), 16 efficiency cores of one (16-31).
    "rtx_5090": linux(
        x86("Intel(R) Core(TM) i9-14900K", 24, 32, kinds=(8, 16)),
        (67158900736, 58000000000),
        900 * 10**9,
        nvidia=cards(card(0, "NVIDIA GeForce RTX 5090", 32607, (12, 0), "Blackwell", "consumer")),
    ),
    "a100_80gb": linux(
        x86(EPYC, 64, 128),
        (1081827328000, 1000000000000),
        2000 * 10**9,
        nvidia=cards(
            card(0, "NVIDIA A100-SXM4-80GB", 81920, (8, 0), "Ampere", "datacenter"),
            driver="535.183.01",
        ),
    ),
    "a100_mig": linux(
        x86(EPYC, 64, 128),
        (540000000000, 500000000000),
        100 * 10**9,
        nvidia=cards(
            NvidiaGpu(
                0,
                "MIG-00000002-aaaa-5bbb-8ccc-0123456789ab",
                "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
                10 * 10**9,
                (8, 0),
                "Ampere",
                "datacenter",
                True,
            )
        ),
    ),
    "h100": linux(
        x86("Intel(R) Xeon(R) Platinum 8480+", 26, 52, bf16=True, avx512=True, amx=True),
        (270000000000, 250000000000),
        1000 * 10**9,
        nvidia=cards(card(0, *H100)),
    ),
    "h100_x8": linux(
        x86("Intel(R) Xeon(R) Platinum 8480CL", 104, 208, bf16=True, avx512=True, amx=True),
        (2164000000000, 2000000000000),
        7000 * 10**9,
        nvidia=cards(*(card(i, *H100) for i in range(8)), link="nvlink"),
    ),
    "rtx_3090_x2_pcie": linux(
        x86(THREADRIPPER, 24, 48),
        (135000000000, 120000000000),
        500 * 10**9,
        nvidia=cards(card(0, *RTX3090), card(1, *RTX3090), link="pcie"),
    ),
    # Visible are 2, 0 and 3: 2-3 share a bridge, 0-2 and 0-3 do not.
    "rtx_3090_x4_bridges": linux(
        x86(THREADRIPPER, 24, 48),
        (135000000000, 120000000000),
        500 * 10**9,
        nvidia=cards(*(card(i, *RTX3090) for i in (2, 0, 3)), installed=4, link="mixed"),
    ),
    # By CUDA's own numbers the second card is the slower one, whatever nvidia-smi calls it.
    "mixed_cards": linux(
        x86("AMD Ryzen 7 7800X3D 8-Core Processor", 8, 16, bf16=True, avx512=True),
        (67000000000, 60000000000),
        500 * 10**9,
        nvidia=cards(
            NvidiaGpu(
                1,
                None,
                "NVIDIA GeForce RTX 3060 or NVIDIA GeForce RTX 4090",
                12288 << 20,
                (8, 6),
                "Ampere",
                "consumer",
                False,
            ),
            installed=2,
            certain=False,
        ),
    ),
    "v100_old_driver": linux(
        x86("Intel(R) Xeon(R) CPU E5-2698 v4 @ 2.20GHz", 20, 40),
        (250000000000, 230000000000),
        90 * 10**9,
        nvidia=cards(
            card(0, "Tesla V100-SXM2-16GB", 16160, None, None, "datacenter"),
            card(1, "Tesla V100-SXM2-16GB", 16160, None, None, "datacenter"),
            driver="450.80.02",
            link="nvlink",
        ),
    ),
    "xeon_amx_cpu": linux(
        x86("Intel(R) Xeon(R) Platinum 8488C", 8, 16, bf16=True, avx512=True, amx=True),
        (33000000000, 31000000000),
        40 * 10**9,
    ),
    "old_laptop": linux(
        x86("Intel(R) Core(TM) i5-6200U CPU @ 2.30GHz", 2, 4),
        (8225000000, 3000000000),
        9 * 10**9,
        power=Power(False, 61.0),
        swap=1500000000,
    ),
    "container_v2": linux(
        x86("AMD EPYC 9R14", 32, 64, usable=2, bf16=True, avx512=True),
        (270000000000, 200000000000),
        20 * 10**9,
        limits=Limits(8589934592, 2.0),
    ),
    "container_v1": linux(
        x86("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", 16, 32, usable=1),
        (67000000000, 60000000000),
        20 * 10**9,
        limits=Limits(4294967296, 0.5),
    ),
    "gb10": linux(
        CpuFacts("aarch64", 20, 20, None, None, 20, True, False, False, False),
        (128000000000, 110000000000),
        3000 * 10**9,
        arch="aarch64",
        nvidia=NvidiaFacts(
            (
                NvidiaGpu(
                    0, uuid(1), "NVIDIA GB10", None, (12, 1), "Blackwell", "workstation", False
                ),
            ),
            1,
            "580.95.05",
            None,
            True,
        ),
    ),
}


def differences(found, expected, path=""):
    """Fields that differ, by name."""
    if is_dataclass(found) and type(found) is type(expected):
        return [
            d
            for f in fields(found)
            for d in differences(
                getattr(found, f.name), getattr(expected, f.name), f"{path}.{f.name}"
            )
        ]
    return [] if found == expected else [f"{path}: {found!r}, expected {expected!r}"]


def test_every_recorded_machine_is_expected():
    assert set(NAMES) == set(EXPECTED) and len(NAMES) >= 12


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_field_of_a_machine(name):
    assert not differences(machine_facts(recorded(name)), EXPECTED[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_where_its_answers_come_from(name):
    answers = json.loads((FOLDER / f"{name}.json").read_text())
    assert answers["about"] and "composed" in answers["provenance"]


# What a run would use

BUDGETS = {
    # The memory that one replica has: a card's, never the sum; a container's, never the host's.
    ("h100_x8", "cuda"): 85520809984,
    ("rtx_3090_x2_pcie", "cuda"): 25769803776,
    ("container_v2", "cpu"): 8589934592,
    ("h100", "cpu"): 270000000000,
    ("m1_air_8gb", "mlx"): 5726633984,
    ("m1_air_8gb", "cpu"): 8589934592,
    ("m3_ultra_512gb", "mps"): 412316860416,
    ("mixed_cards", "cuda"): 12884901888,
    # One memory for processor and GPU: nvidia-smi names none.
    ("gb10", "cuda"): 128000000000,
    ("old_laptop", "cpu"): 8225000000,
}


@pytest.mark.parametrize(("name", "backend"), sorted(BUDGETS))
def test_the_budget_of_one_replica(name, backend):
    assert budget_bytes(backend, machine_facts(recorded(name))) == BUDGETS[name, backend]


@pytest.mark.parametrize(
    ("name", "backend", "native"),
    [
        ("m1_air_8gb", "mlx", False),
        ("m2_air_16gb", "mlx", False),
        ("m3_pro_18gb", "mps", True),
        ("m4_air_24gb", "mlx", True),
        ("t4", "cuda", False),
        ("v100_old_driver", "cuda", False),
        ("a100_80gb", "cuda", True),
        ("rtx_4090", "cuda", True),
        ("xeon_amx_cpu", "cpu", False),
        ("m4_air_24gb", "cpu", False),
    ],
)
def test_where_bfloat16_is_native(name, backend, native):
    assert native_bf16(backend, machine_facts(recorded(name))) is native


CUDA_BUILD, CPU_BUILD = ("mlx", "mlx-cuda-12"), ("mlx", "mlx-cpu")


@pytest.mark.parametrize(
    ("name", "backend", "packages", "on_gpu"),
    [
        ("h100", "mlx", CPU_BUILD, False),
        ("h100", "mlx", CUDA_BUILD, True),
        ("h100", "mlx", ("mlx", "mlx-cuda-13"), True),
        ("t4", "mlx", CUDA_BUILD, True),
        ("xeon_amx_cpu", "mlx", CUDA_BUILD, False),
        ("m4_air_24gb", "mlx", ("mlx",), True),
        ("m4_air_24gb", "mps", ("torch",), True),
        ("m4_air_24gb", "cpu", ("torch",), False),
        ("h100", "cuda", ("torch",), True),
        ("h100", "cpu", ("torch",), False),
    ],
)
def test_every_figure_is_of_the_processor_that_computes(name, backend, packages, on_gpu):
    """The card's memory and bfloat16 count only where the backend computes on it."""
    available = {backend: Availability(backend, True, versions=dict.fromkeys(packages, "1"))}
    facts = machine_facts(recorded(name))
    found = device_facts(backend, available, probe=recorded(name))
    device = found.device
    host = facts.usable_memory_bytes
    card = facts.nvidia.replica_memory_bytes if facts.nvidia else None
    own = facts.apple.recommended_working_set_bytes if facts.apple else card
    assert device.is_gpu is on_gpu
    assert device.budget_bytes == (own if on_gpu else host)
    assert device.memory_bytes == (card if on_gpu and card else host)
    assert device.native_bf16 is (on_gpu and name != "t4")
    shown = facts.nvidia.gpus[0].name if facts.nvidia else "for the GPU"
    assert (shown in found.machine) is on_gpu


def test_mlx_s_ordinary_build_beside_a_card_plans_for_the_processor(monkeypatch):
    installed = {"mlx": "0.32.4", "mlx-cpu": "0.32.4", "torch": "2.13.0"}
    monkeypatch.setattr(configurator, "_version", installed.get)

    def planned():
        found = configurator.auto_configure(
            probe=recorded("h100"), overrides=["train.backend=mlx"], measure=lambda config: 1e5
        )
        return found.config.train.precision, found.device.budget_bytes

    assert planned() == ("float32", 270000000000)
    installed["mlx-cuda-13"] = "0.32.4"
    assert planned() == ("bfloat16", 85520809984)


@pytest.mark.parametrize("backend", [None, "cuda"])
def test_a_card_that_shares_the_memory_is_named(backend):
    line = describe(machine_facts(recorded("gb10")), backend)
    assert line.startswith("NVIDIA GB10 · aarch64 · 20 cores · 119.2 GiB · Linux")
    assert "GB10" not in describe(machine_facts(recorded("gb10")), "cpu")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "m1_air_8gb",
            "Apple M1 · 8 cores · 8 GiB (5.3 GiB for the GPU) · macOS 14.5 · on battery ",
        ),
        ("h100_x8", "8 x NVIDIA H100 80GB HBM3 · Intel(R) Xeon(R) Platinum 8480CL · 104 cores · "),
        (
            "container_v2",
            "AMD EPYC 9R14 · 32 cores (limited to 2 threads) · 251.5 GiB (limited to 8 GiB) · Linux",
        ),
    ],
)
def test_the_machine_in_one_line(name, line):
    assert describe(machine_facts(recorded(name))).startswith(line)


def everything(*names):
    return {n: Availability(n, n in names, f"no {n}") for n in ("mlx", "mps", "cuda", "cpu")}


def test_the_device_of_a_run():
    facts = device_facts(None, everything("mlx", "mps", "cpu"), probe=recorded("m3_max_36gb"))
    device = facts.device
    assert (device.backend, device.is_gpu, device.native_bf16) == ("mlx", True, True)
    assert device.budget_bytes == 30150672384 and facts.machine.startswith("Apple M3 Max")
    device = device_facts("cpu", everything("cuda", "cpu"), probe=recorded("t4")).device
    assert (device.backend, device.is_gpu, device.budget_bytes) == ("cpu", False, 15642984448)
    device = device_facts(None, everything("cuda", "cpu"), probe=recorded("t4")).device
    assert (device.backend, device.native_bf16, device.budget_bytes) == ("cuda", False, 15 * GIB)


def test_the_code_of_a_refusal_is_the_state_s():
    available = {"mlx": Availability("mlx", False, "too old", "pip install -U mlx", code="P502")}
    with pytest.raises(PippinError) as caught:
        device_facts("mlx", available, probe=recorded("old_laptop"))
    assert caught.value.code == "P502"


def test_a_backend_that_is_not_here_is_refused():
    with pytest.raises(PippinError) as caught:
        device_facts("cuda", everything("cpu"), probe=recorded("old_laptop"))
    assert caught.value.code == "P501" and caught.value.choices == ("cpu",)


# Single rules


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((6, 1), "Pascal"),
        ((7, 0), "Volta"),
        ((7, 2), "Volta"),
        ((7, 5), "Turing"),
        ((8, 0), "Ampere"),
        ((8, 6), "Ampere"),
        ((8, 7), "Ampere"),
        ((8, 9), "Ada"),
        ((9, 0), "Hopper"),
        ((10, 0), "Blackwell"),
        ((10, 3), "Blackwell"),
        ((11, 0), "Blackwell"),
        ((12, 0), "Blackwell"),
        ((12, 1), "Blackwell"),
        ((13, 0), None),
        ((3, 5), None),
        (None, None),
    ],
)
def test_architectures_by_compute_capability(capability, name):
    assert architecture(capability) == name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Tesla T4", "datacenter"),
        ("NVIDIA T4G", "datacenter"),
        ("NVIDIA T400", "workstation"),
        ("NVIDIA T1000 8GB", "workstation"),
        ("Quadro T400", "workstation"),
        ("NVIDIA GeForce GTX 1660", "consumer"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "consumer"),
        ("NVIDIA TITAN RTX", "consumer"),
        ("Quadro RTX 6000", "workstation"),
        ("NVIDIA RTX A6000", "workstation"),
        ("NVIDIA RTX 6000 Ada Generation", "workstation"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "workstation"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "datacenter"),
        ("NVIDIA A10", "datacenter"),
        ("NVIDIA A10G", "datacenter"),
        ("NVIDIA A100-PCIE-40GB", "datacenter"),
        ("NVIDIA A40-48Q", "datacenter"),
        ("NVIDIA A2000", "workstation"),
        ("NVIDIA L4", "datacenter"),
        ("NVIDIA L40S", "datacenter"),
        ("NVIDIA H100 NVL", "datacenter"),
        ("NVIDIA H200", "datacenter"),
        ("NVIDIA GH200 480GB", "datacenter"),
        ("NVIDIA B200", "datacenter"),
        ("Orin (nvgpu)", None),
    ],
)
def test_what_a_card_is_made_for(name, kind):
    assert gpu_kind(name) == kind


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("", None),
        ("-1", None),
        ("3", (3,)),
        ("3,1", (3, 1)),
        (" 2 , 5", (2, 5)),
        ("1,-1,2", (1,)),  # a number that names nothing ends the list
        ("1,9,2", (1,)),
        ("0,0", (0,)),
        ("GPU-00000004", (3,)),
        ("GPU-0000000", None),  # the beginning of several
        ("GPU-00000002,GPU-00000008", (1, 7)),
        ("nonsense", None),
    ],
)
def test_cuda_visible_devices(visible, indices):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = machine_facts(recorded("h100_x8", environ=environ)).nvidia
    assert (None if found is None else tuple(g.index for g in found.gpus)) == indices


def test_bus_order_makes_the_numbers_of_different_cards_certain():
    environ = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    found = machine_facts(recorded("mixed_cards", environ=environ)).nvidia
    assert found.order_is_certain
    assert [(g.name, g.memory_bytes) for g in found.gpus] == [
        ("NVIDIA GeForce RTX 4090", 24564 << 20)
    ]
    both = machine_facts(recorded("mixed_cards", environ={})).nvidia
    assert not both.order_is_certain and both.replica_memory_bytes == 12288 << 20


def test_an_unset_variable_shows_the_first_slice_of_a_card_in_slices():
    found = machine_facts(recorded("a100_mig", environ={})).nvidia
    assert [g.name for g in found.gpus] == ["NVIDIA A100-SXM4-80GB MIG 3g.40gb"]
    assert found.gpus[0].memory_bytes == 40 * 10**9


def test_nothing_known_is_none_and_never_zero():
    nothing = {
        "commands": {},
        "files": {},
        "memory": None,
        "cpu_count": {"physical": None, "logical": None},
        "affinity": None,
        "disk_free": None,
    }
    for name in ("m2_air_16gb", "rtx_4090"):
        facts = machine_facts(recorded(name, **nothing))
        assert facts.memory_bytes is None and facts.usable_memory_bytes is None
        assert facts.disk_free_bytes is None and facts.nvidia is None
        assert facts.cpu.physical_cores is None and facts.cpu.bf16 is None
        assert describe(facts)
        if facts.apple is not None:
            assert facts.apple.recommended_working_set_bytes is None
            assert facts.apple.gpu_cores is None
        with pytest.raises(PippinError):
            budget_bytes("cpu", facts)


@pytest.mark.parametrize("answer", ["", "{}", "[1]", "null", '{"maxBufferLength": 3}', "Traceback"])
def test_metal_that_does_not_answer_leaves_the_rule(answer):
    probe = recorded("m2_air_16gb")
    probe.answers["commands"]["metal"] = [answer]
    apple = machine_facts(probe).apple
    assert apple.recommended_working_set_bytes == 16 * GIB * 2 // 3
    assert apple.working_set_is_estimate and apple.largest_buffer_bytes is None


def test_this_machine_answers_like_psutil():
    import psutil

    facts = machine_facts(SystemProbe())
    assert facts.memory_bytes == psutil.virtual_memory().total
    assert facts.cpu.logical_cores == psutil.cpu_count()
    assert 0 < facts.available_bytes <= facts.memory_bytes
    assert json.loads(json.dumps(facts.as_object()))["system"] == facts.system
