"""Which backends can run here, with the machine faked.

Run: pytest tests/unit/test_backends.py
"""

import platform
import sys
from types import SimpleNamespace

import pytest

import backends
from core.errors import PippinError


@pytest.fixture
def mac(monkeypatch):
    """`mac("14.2")`: this machine is a Mac of that system, and every framework is installed."""

    gpu, none = (SimpleNamespace(is_available=lambda x=x: x) for x in (True, False))
    torch = SimpleNamespace(backends=SimpleNamespace(mps=gpu), cuda=none)

    def be(version):
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
        monkeypatch.setattr(backends, "_version", lambda package: "99.0")
        monkeypatch.setattr(backends.importlib, "import_module", lambda name: torch)

    return be


@pytest.mark.parametrize("name", ["mlx", "mps"])
def test_a_mac_before_macos_14_has_no_gpu_backend(mac, name):
    mac("13.7.1")
    with pytest.raises(PippinError) as caught:
        backends.load(name)
    assert caught.value.code == "P502" and "macOS >= 14, found 13.7.1" in caught.value.what
    assert "--backend cpu" in caught.value.remedy
    assert backends.available()["cpu"].ok


@pytest.mark.parametrize(
    ("name", "installed", "code"),
    [
        ("mlx", {}, "P501"),
        ("mlx", {"mlx": "0.31.0", "mlx-cpu": "0.31.0"}, "P502"),
        ("mlx", {"mlx": "0.32.4"}, "P501"),
        ("cpu", {}, "P501"),
        ("cpu", {"torch": "2.10.1"}, "P502"),
        ("mps", {"torch": "2.11.0"}, "P501"),  # no Mac: its version does not matter
    ],
)
def test_what_is_absent_and_what_is_wrong_have_codes_of_their_own(
    monkeypatch, name, installed, code
):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backends, "_version", installed.get)
    assert backends.available()[name].code == code
    with pytest.raises(PippinError) as caught:
        backends.load(name)
    assert caught.value.code == code


def test_the_build_of_mlx_on_linux_is_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    cuda = {"mlx": "0.32.4", "mlx-cuda-13": "0.32.4"}
    monkeypatch.setattr(backends, "_version", cuda.get)
    assert backends.available()["mlx"].versions == cuda


@pytest.mark.parametrize("version", ["14.0", "15.6.1", "26.1", "10.16", ""])
def test_newer_and_unknown_systems_pass(mac, version):
    mac(version)
    found = backends.available()
    assert found["mlx"].ok and found["mps"].ok
