"""What a person should know now, and before it is too late."""

from collections.abc import Sequence

from core.machine.pressure import PRESSURE_NAMES, WARNING
from core.training.watch import Snapshot
from tools.monitoring.history import History
from tools.monitoring.words import duration, gigabytes

# A system with less than this share of its memory free is about to swap or to kill.
LOW_FRACTION = 0.1
STALE_S = 120.0
# Swap added within this time, as a share of the machine's memory, that is worth a word.
SWAP_WINDOW_S = 300.0
SWAP_FRACTION = 0.03
# A pace that fills what there is later than this is no news.
SOON_S = 1800.0
# A run that needs this much more than was predicted was predicted wrongly; less than this many
# bytes is what a process holds besides.
ABOVE_PLAN = 1.1
ABOVE_BYTES = 300_000_000


def is_above(most: float, predicted: float) -> bool:
    """Whether a run needs clearly more than was predicted."""
    return most > ABOVE_PLAN * predicted and most > predicted + ABOVE_BYTES


def is_mixed(snapshot: Snapshot) -> bool:
    """Whether the run's memory has in it what an earlier run of the same process left."""
    return snapshot.after is not None and (snapshot.plan is None or snapshot.plan.is_shared)


def shares(snapshot: Snapshot) -> dict[str, tuple[float, float]]:
    """(in use, limit) in bytes of whatever has a limit, by name."""
    system, gpu = snapshot.system, snapshot.gpu
    found = {
        "system": (float(system.total_bytes - system.available_bytes), float(system.total_bytes))
    }
    run = snapshot.run_bytes
    if gpu is not None:
        used = (
            gpu.used_bytes
            if gpu.used_bytes is not None
            else snapshot.metrics.get("memory_active_bytes")
        )
        if used is not None:
            found["GPU"] = (float(used), float(gpu.budget_bytes))
    if run is not None and snapshot.plan is not None:
        found["run"] = (float(run), budget_bytes(snapshot) or float(system.total_bytes))
    return found


def budget_bytes(snapshot: Snapshot) -> float | None:
    """What the run may use by its own configuration, None where that is not known."""
    if snapshot.plan is None:
        return None
    gpu = snapshot.gpu
    # A run on a CPU beside a card has the machine's memory.
    on_gpu = gpu is not None and "memory_active_bytes" in snapshot.metrics
    whole = gpu.budget_bytes if gpu is not None and on_gpu else snapshot.system.total_bytes
    return snapshot.plan.memory_fraction * whole


def alerts(snapshot: Snapshot, alert_at: float | None) -> list[str]:
    """What is at or above the share of its limit that was asked for."""
    if alert_at is None:
        return []
    names = {"system": "the system's memory", "GPU": "the GPU's memory", "run": "the run's budget"}
    return [
        f"{names[name]} is at {100 * used / limit:.0f} % ({gigabytes(used)} of {gigabytes(limit)})"
        for name, (used, limit) in shares(snapshot).items()
        if used >= alert_at * limit
    ]


def warnings(snapshot: Snapshot, now: float, history: History | None = None) -> list[str]:
    """What is wrong, or will be soon."""
    system, gpu, notes = snapshot.system, snapshot.gpu, []
    if system.available_bytes < LOW_FRACTION * system.total_bytes:
        notes.append(f"only {gigabytes(system.available_bytes)} of memory are left")
    if snapshot.pressure is not None and snapshot.pressure >= WARNING:
        notes.append(f"macOS says memory pressure: {PRESSURE_NAMES[snapshot.pressure]}")
    peak = snapshot.metrics.get("memory_peak_bytes")
    if gpu is not None and peak is not None and peak > gpu.budget_bytes:
        notes.append("the run's peak is above what the GPU may use: a smaller micro-batch is safer")
    plan, most = snapshot.plan, snapshot.run_peak_bytes
    above = plan is not None and most is not None and is_above(most, plan.predicted_bytes)
    if plan is not None and most is not None and above and not is_mixed(snapshot):
        notes.append(
            f"the run needs {gigabytes(most)}, more than the predicted "
            f"{gigabytes(plan.predicted_bytes)}"
        )
    notes += _course(snapshot, history or History())
    stamp = snapshot.metrics.get("timestamp")
    if snapshot.status.state == "running" and stamp is not None and now - stamp > STALE_S:
        notes.append(f"the run has logged nothing for {duration(now - stamp)}")
    if notes and snapshot.others and _is_short(snapshot):
        first = snapshot.others[0]
        notes.append(f"closing {first.name} would free {gigabytes(first.memory_bytes)}")
    return notes


def _is_short(snapshot: Snapshot) -> bool:
    system = snapshot.system
    pressed = snapshot.pressure is not None and snapshot.pressure >= WARNING
    return pressed or system.available_bytes < 2 * LOW_FRACTION * system.total_bytes


def _course(snapshot: Snapshot, history: History) -> Sequence[str]:
    notes = []
    grown, seconds = history["swap"].growth(SWAP_WINDOW_S)
    if grown > SWAP_FRACTION * snapshot.system.total_bytes:
        notes.append(f"swap grew by {gigabytes(grown)} in {duration(seconds)}: steps get slow")
    limit = budget_bytes(snapshot)
    for name, bound, words in (
        ("process", limit, "the run's budget"),
        ("system", float(snapshot.system.total_bytes), "the machine's memory"),
    ):
        left = None if bound is None else history[name].seconds_to(bound)
        if left is not None and left < SOON_S:
            notes.append(f"at this pace {words} is full in {duration(left)}")
            break
    return notes
