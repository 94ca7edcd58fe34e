"""How many processor threads may be used, by the affinity and by the control groups.

Run: pytest tests/unit/test_cores.py
"""

import os

import pytest

from core import cores
from core.data.preparing.prepare import default_workers
from core.data.reading.sources import StorySource
from core.data.tokenizers.base import num_threads

V2 = {cores.CGROUPS: "0::/box/inner\n"}
V1 = {cores.CGROUPS: "4:memory:/box\n3:cpu,cpuacct:/box\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (V2, None),
        ({**V2, "/sys/fs/cgroup/box/inner/cpu.max": "max 100000"}, None),
        ({**V2, "/sys/fs/cgroup/box/inner/cpu.max": "250000 100000"}, 2.5),
        (
            {
                **V2,
                "/sys/fs/cgroup/box/inner/cpu.max": "400000 100000",
                "/sys/fs/cgroup/cpu.max": "150000 100000\n",
            },
            1.5,
        ),
        (
            {
                **V1,
                "/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "300000\n",
                "/sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                **V1,
                "/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_quota(files: dict[str, str], quota: float | None) -> None:
    assert cores.cpu_quota(files.get) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "wanted"),
    [(64, None, 64), (64, 2.0, 2), (64, 0.5, 1), (3, 8.0, 3), (1, None, 1)],
)
def test_a_container_decides_and_not_the_machine(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, wanted: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda _: quota)
    assert cores.usable_cores() == wanted
    assert num_threads() == default_workers(StorySource(10**9, 1, 0, 0)) == min(8, wanted)


def test_without_affinity_the_machine_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda _: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cores.usable_cores() == 10
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.usable_cores() == 1
