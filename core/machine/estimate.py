"""The matmul rate of a GPU that nobody measured, from its siblings: to size a model by, never for MFU.

Apple: the generation's measured chip, by the number of GPU cores. NVIDIA: the maker's data sheet, at the
share of it that measured cards reach; else the card's memory and architecture, as the slowest card of
that kind has them; else the slowest card that trains at all. Each says which it is.
"""

from core.machine.facts import AppleFacts, MachineFacts, NvidiaGpu
from core.machine.resolvers import DeviceFacts
from core.machine.speed import at_precision, peak_flops

# Measured chips with the number of cores of their largest kind: the measurements do not say which kind
# it was, and with fewer cores the rate of each would be higher.
MEASURED_APPLE = {1: ("Apple M1 Pro", 16), 3: ("Apple M3 Max", 40), 4: ("Apple M4", 10)}
# Dense TFLOP/s of NVIDIA's data sheets and architecture papers: (float32, half with float32 sums).
DATA_SHEET_TFLOPS: dict[str, tuple[float, float]] = {
    "NVIDIA GeForce RTX 5090": (104.8, 209.5),
    "NVIDIA GeForce RTX 5080": (56.3, 112.6),
    "NVIDIA GeForce RTX 4080 SUPER": (52.2, 104.4),
    "NVIDIA GeForce RTX 4080": (48.7, 97.5),
    "NVIDIA GeForce RTX 4070 Ti": (40.1, 80.2),
    "NVIDIA GeForce RTX 4070": (29.1, 58.3),
    "NVIDIA GeForce RTX 3090 Ti": (40.0, 80.0),
    "NVIDIA GeForce RTX 3090": (35.6, 71.2),
    "NVIDIA GeForce RTX 3080": (29.8, 59.5),
    "NVIDIA GeForce RTX 3070": (20.3, 40.6),
    "NVIDIA GeForce RTX 3060": (12.7, 25.5),
    "NVIDIA H100 NVL": (60.0, 835.0),
    "NVIDIA H100 PCIe": (51.2, 756.0),
    "NVIDIA A100 80GB PCIe": (19.5, 312.0),
    "NVIDIA A100-PCIE-40GB": (19.5, 312.0),
    "NVIDIA L40S": (91.6, 362.0),
    "NVIDIA RTX 6000 Ada Generation": (91.1, 364.0),
    "NVIDIA RTX A6000": (38.7, 154.8),
    "NVIDIA A40": (37.4, 149.7),
    "NVIDIA L4": (30.3, 121.0),
    "NVIDIA A10": (31.2, 125.0),
    "Tesla V100-SXM2-16GB": (15.7, 125.0),
    "Tesla V100-SXM2-32GB": (15.7, 125.0),
}
# Share of the data sheet that measured cards reach: of GeForce the RTX 4090, of the others the middle of
# four: float32 0.49 (T4), 0.76, 0.78, 0.97 (A100); half 0.65 (T4), 0.79, 0.80, 0.85 (A100).
GEFORCE_SHARE, OTHER_SHARE = (0.67, 1.03), (0.77, 0.80)
# float32 TFLOP/s a GB of the slowest GeForce for its memory, data sheets: RTX 2060 12GB, RTX 3060 12GB,
# RTX 4060 Ti 16GB, RTX 5060 Ti 16GB. Half is twice that in all of them, or more.
GEFORCE_TFLOPS_PER_GB = {"Turing": 0.60, "Ampere": 1.06, "Ada": 1.38, "Blackwell": 1.48}
# Where nothing is known: an M1's, and the T4's as measured.
SLOWEST_FLOPS = {"mlx": 2.1e12, "mps": 2.1e12, "cuda": 4e12}


def estimated_peak(
    device: DeviceFacts, machine: MachineFacts, precision: str, *, tf32: bool = False
) -> tuple[float, str]:
    """FLOP/s of a GPU's large products, and in words what they were estimated from.

    Args:
        device: The device.
        machine: The machine that has it.
        precision: "float32", "bfloat16" or "float16".
        tf32: The configuration's `train.tf32`.
    """
    found = None
    if machine.nvidia is not None and machine.nvidia.gpus:
        found = _nvidia(machine.nvidia.gpus[0])
    elif machine.apple is not None:
        found = _apple(machine.apple)
    if found is None:
        slowest = SLOWEST_FLOPS.get(device.backend, min(SLOWEST_FLOPS.values()))
        return slowest, "the slowest GPU of its kind"
    full, half, how = found
    rate = at_precision(
        full,
        half,
        precision,
        native_bf16=device.native_bf16,
        tf32=tf32 and device.backend == "cuda",
    )
    return rate, how


def _apple(apple: AppleFacts) -> tuple[float, float, str] | None:
    """float32 and half FLOP/s by the cores; None where the chip does not say."""
    known = [g for g in MEASURED_APPLE if g <= (apple.generation or 0)]
    if not known or apple.gpu_cores is None:
        return None
    chip, cores = MEASURED_APPLE[max(known)]
    share = apple.gpu_cores / cores
    full, half = (share * (peak_flops(chip, p) or 0.0) for p in ("float32", "float16"))
    return full, half, f"its {apple.gpu_cores} GPU cores, each as one of an {chip}"


def _nvidia(gpu: NvidiaGpu) -> tuple[float, float, str] | None:
    is_geforce = gpu.kind == "consumer"
    shares = GEFORCE_SHARE if is_geforce else OTHER_SHARE
    sheet, how = DATA_SHEET_TFLOPS.get(gpu.name), f"the data sheet of {gpu.name}"
    a_gb = GEFORCE_TFLOPS_PER_GB.get(gpu.architecture or "")
    if sheet is None and a_gb and gpu.memory_bytes and is_geforce and not gpu.is_mig:
        tflops = a_gb * gpu.memory_bytes / 1e9
        sheet, how = (
            (tflops, 2 * tflops),
            f"its memory, as the slowest GeForce of {gpu.architecture} has it",
        )
    if sheet is None:
        return None
    full, half = (1e12 * share * rate for share, rate in zip(shares, sheet))
    return full, half, how
