"""The summary that seed 001 promises, on recorded machines; and that nothing is asked too early.

Run: python -m pytest tests/unit/test_system_info.py
"""

import ctypes
import subprocess
import sys
import types

import pytest

from core.errors import PippinError
from core.machine.detect import machine_facts
from core.machine.info import SystemConfig, print_system_info
from core.machine.system import METAL_QUERY, metal_limits
from tests.machines.recorded import recorded


def config(name):
    return SystemConfig(lambda: machine_facts(recorded(name)))


@pytest.mark.parametrize(
    ("name", "architecture", "device", "fp8", "bf16", "dtype"),
    [
        ("rtx_5090", "blackwell", "NVIDIA GeForce RTX 5090", True, True, "bfloat16"),
        ("h100", "hopper", "NVIDIA H100 80GB HBM3", True, True, "bfloat16"),
        ("rtx_4090", "ada", "NVIDIA GeForce RTX 4090", True, True, "bfloat16"),
        ("a100_80gb", "ampere", "NVIDIA A100-SXM4-80GB", False, True, "bfloat16"),
        ("t4", "turing", "Tesla T4", False, False, "float32"),
        ("t400", "turing", "NVIDIA T400 4GB", False, False, "float32"),
        ("v100_old_driver", "unknown", "Tesla V100-SXM2-16GB", False, False, "float32"),
        ("m1_air_8gb", "apple m1", "Apple M1", False, False, "float32"),
        ("m4_max_64gb", "apple m4", "Apple M4 Max", False, True, "bfloat16"),
        ("xeon_amx_cpu", "cpu", "Intel(R) Xeon(R) Platinum 8488C", False, True, "float32"),
    ],
)
def test_the_summary_of_a_machine(name, architecture, device, fp8, bf16, dtype):
    summary = config(name)
    lines = []
    print_system_info(summary, write=lines.append)
    assert lines[:4] == [
        "\N{LEFT-POINTING MAGNIFYING GLASS} GPU System Configuration:",
        f"   Architecture: {architecture}",
        f"   Device: {device}",
        f"   FP8 Support: {fp8}",
    ]
    assert summary.supports_feature("bf16") is bf16 and summary.get_optimal_dtype() == dtype
    info = summary.get_info()
    assert (info["architecture"], info["has_fp8_support"]) == (architecture, fp8)


def test_several_cards_are_not_one_large_one():
    lines = []
    print_system_info(config("h100_x8"), write=lines.append)
    assert "   GPU Memory: 8 x 79.6 GiB" in lines
    assert config("h100_x8").get_info()["gpu_memory_bytes"] == 85520809984
    assert config("h100_x8").supports_feature("nvlink")
    assert not config("rtx_3090_x2_pcie").supports_feature("nvlink")


def test_an_unknown_feature_is_refused():
    with pytest.raises(PippinError):
        config("t4").supports_feature("int3")


def test_importing_asks_nothing_and_loads_no_framework():
    code = (
        "import sys, subprocess\n"
        "def refuse(*a, **k): raise SystemExit('asked too early')\n"
        "subprocess.run = refuse\n"
        "from core.machine import SYSTEM_CONFIG, print_system_info\n"
        "print({'torch', 'mlx'} & set(sys.modules), callable(print_system_info))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set() True", done.stdout + done.stderr
    with pytest.raises(ImportError):
        exec("from core.machine import no_such_name", {})


class FakeLibrary:
    """Metal and the Objective-C runtime, as far as the question to Metal uses them."""

    def __init__(self, path):
        self.path = path
        self.MTLCreateSystemDefaultDevice = types.SimpleNamespace(restype=None)
        self.sel_registerName = types.SimpleNamespace(restype=None, argtypes=None)


def test_the_question_to_metal_asks_for_both_limits(monkeypatch, capsys):
    """Only a Mac runs it: here with the libraries replaced, so that at least it is a program."""
    asked, loaded = [], []

    def library(path):
        loaded.append(path)
        lib = FakeLibrary(path)

        def create():
            return 7

        def register(name):
            return name

        lib.MTLCreateSystemDefaultDevice = create
        lib.sel_registerName = register
        return lib

    def prototype(*types_):
        assert types_ == (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)

        def bound(symbol):
            assert symbol[0] == "objc_msgSend" and symbol[1].path == "/usr/lib/libobjc.A.dylib"

            def send(device, selector):
                asked.append((device, selector))
                return {b"recommendedMaxWorkingSetSize": 1000, b"maxBufferLength": 600}[selector]

            return send

        return bound

    fake = types.SimpleNamespace(
        CDLL=library,
        CFUNCTYPE=prototype,
        c_uint64=ctypes.c_uint64,
        c_void_p=ctypes.c_void_p,
        c_char_p=ctypes.c_char_p,
    )
    monkeypatch.setitem(sys.modules, "ctypes", fake)
    exec(METAL_QUERY, {})
    monkeypatch.undo()
    assert metal_limits(lambda _: capsys.readouterr().out) == (1000, 600)
    assert [device for device, _ in asked] == [7, 7]
    assert loaded[0].endswith("CoreGraphics") and loaded[1].endswith("Metal")
