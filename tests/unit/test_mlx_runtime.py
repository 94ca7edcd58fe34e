"""How MLX is imported, and the limits of memory on a Mac, with the Mac faked.

Run: pytest tests/unit/test_mlx_runtime.py
"""

import ast
import ctypes.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from backends.mlx import runtime
from core.paths import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "backends" / "mlx"


def python(code: str, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        env=clean | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return out.stdout.strip()


def test_importing_the_package_imports_no_framework() -> None:
    code = "import sys, backends.mlx; print(any(m.split('.')[0] == 'mlx' for m in sys.modules))"
    assert python(code) == "False"


def test_tf32_is_off_before_mlx_is_there_and_the_configuration_decides() -> None:
    code = (
        "import os; from backends.mlx.runtime import import_mlx; import_mlx({}); "
        "print(os.environ['MLX_ENABLE_TF32'])"
    )
    assert python(code.format("")) == "0"
    assert python(code.format(""), MLX_ENABLE_TF32="1") == "1"
    assert python(code.format("tf32=False"), MLX_ENABLE_TF32="1") == "0"
    assert python(code.format("tf32=True")) == "1"


@pytest.mark.skipif(
    sys.platform != "linux" or not ctypes.util.find_library("openblas"),
    reason="OpenBLAS is put in front of MLX on Linux, where it is installed",
)
@pytest.mark.parametrize(("before", "in_front"), [("sys", True), ("torch", False)])
def test_openblas_is_put_in_front_but_not_beside_torch(before: str, in_front: bool) -> None:
    """Torch would call it from inside its own threads. Numpy's own copy has another name."""
    code = (
        f"import {before}; from backends.mlx.runtime import import_mlx; import_mlx(); "
        "print('/libopenblas' in open('/proc/self/maps').read())"
    )
    assert python(code) == str(in_front)


def test_asking_what_is_there_imports_no_framework() -> None:
    code = "import sys, backends; print(backends.available()['mlx'].ok, 'mlx.core' in sys.modules)"
    assert python(code) == "True False"


def test_the_package_named_mlx_does_not_hide_the_framework() -> None:
    code = "import backends.mlx.layers, mlx.core; print(mlx.core.__file__)"
    assert "site-packages" in python(code)


def test_no_generator_no_implicit_io_and_no_metal_only_call() -> None:
    """Masks are a hash, checkpoints are core's, and only `runtime` asks for Metal."""
    forbidden = {"random", "load", "save", "savez", "save_safetensors", "metal"}
    for path in PACKAGE.glob("*.py"):
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "mx"
        }
        assert not used & (forbidden - ({"metal"} if path.name == "runtime.py" else set())), path


class FakeMx:
    """The part of `mlx.core` that the limits use, with the calls it saw."""

    gpu = "gpu"

    def __init__(self, *, metal: bool = True, gpu: bool = True, wired_fails: bool = False) -> None:
        self.metal = SimpleNamespace(is_available=lambda: metal)
        self.is_gpu, self.wired_fails = gpu, wired_fails
        self.calls: list[tuple[str, int]] = []

    def Device(self, kind: str) -> str:
        return kind

    def default_device(self) -> str:
        return "gpu" if self.is_gpu else "cpu"

    def device_info(self) -> dict[str, Any]:
        return {
            "device_name": "Apple M1",
            "architecture": "applegpu_g13s",
            "max_recommended_working_set_size": 1000,
            "memory_size": 2000,
            "max_buffer_length": 600,
        }

    def set_memory_limit(self, n: int) -> int:
        self.calls.append(("memory", n))
        return 1

    def set_cache_limit(self, n: int) -> int:
        self.calls.append(("cache", n))
        return 2

    def set_wired_limit(self, n: int) -> int:
        if self.wired_fails:
            raise ValueError("above the system's limit")
        self.calls.append(("wired", n))
        return 3


def test_limits_on_metal_and_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_macos_major", lambda: 15)
    mx = FakeMx()
    restore = runtime.limit_memory(mx, fraction=0.8, mode="train")
    assert mx.calls == [("memory", 800), ("cache", 2 << 30), ("wired", 750)]
    mx.calls.clear()
    restore()
    assert mx.calls == [("memory", 1), ("cache", 2), ("wired", 3)]


def test_no_more_than_is_safe_is_used_where_all_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_macos_major", lambda: 15)
    mx = FakeMx()
    runtime.limit_memory(mx, fraction=1.0, mode="train")
    assert dict(mx.calls) == {"memory": 850, "cache": 2 << 30, "wired": 750}


def test_a_smaller_share_is_used_and_wired_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_macos_major", lambda: 26)
    mx = FakeMx()
    runtime.limit_memory(mx, fraction=0.5, mode="infer")
    assert mx.calls == [("memory", 500), ("cache", 256 << 20), ("wired", 500)]


def test_nothing_is_wired_before_macos_15_or_where_the_system_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_macos_major", lambda: 14)
    mx = FakeMx()
    runtime.limit_memory(mx, fraction=0.8, mode="train")()
    assert "wired" not in dict(mx.calls)
    monkeypatch.setattr(runtime, "_macos_major", lambda: 15)
    refusing = FakeMx(wired_fails=True)
    runtime.limit_memory(refusing, fraction=0.8, mode="train")()
    assert [name for name, _ in refusing.calls] == ["memory", "cache", "memory", "cache"]


@pytest.mark.parametrize("fake", [FakeMx(gpu=False), FakeMx(metal=False)])
def test_nothing_is_limited_elsewhere(fake: FakeMx) -> None:
    runtime.limit_memory(fake, fraction=0.8, mode="train")()
    assert fake.calls == []


def test_the_largest_buffer_is_metals() -> None:
    assert runtime.largest_buffer(FakeMx()) == 600
    assert runtime.largest_buffer(FakeMx(gpu=False)) is None
    silent = FakeMx()
    silent.device_info = lambda: {}  # type: ignore[method-assign]
    assert runtime.largest_buffer(silent) is None


def test_what_a_device_is_called() -> None:
    mac = runtime.describe_device(FakeMx())
    assert (mac.device, mac.budget_bytes, mac.native_bf16) == ("Apple M1", 1000, False)
    newer = FakeMx()
    newer.device_info = lambda: {"architecture": "applegpu_g15d"}  # type: ignore[method-assign]
    assert runtime.describe_device(newer).native_bf16
    cpu = runtime.describe_device(FakeMx(gpu=False))
    assert (cpu.budget_bytes, cpu.native_bf16) == (None, False)
