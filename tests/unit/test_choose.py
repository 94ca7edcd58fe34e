"""What `auto` picks. Run: pytest tests/unit/test_choose.py"""

import pytest

from core.backend import Availability
from core.errors import PippinError
from core.machine.choose import Remembered, choose_backend


def machine(*names):
    everything = ("mlx", "mps", "cuda", "cpu")
    return {
        n: Availability(n, n in names, "" if n in names else f"no {n} here", f"pip install {n}")
        for n in everything
    }


@pytest.mark.parametrize(
    ("names", "is_apple_silicon", "expected"),
    [
        (("mlx", "mps", "cpu"), True, "mlx"),
        (("mps", "cpu"), True, "mps"),
        (("cpu",), True, "cpu"),
        (("mlx", "cuda", "cpu"), False, "cuda"),
        (("mlx", "cpu"), False, "cpu"),
        (("mps", "cpu"), False, "mps"),
        (("cuda", "mps", "cpu"), False, "cuda"),
    ],
)
def test_the_best_backend_is_chosen(names, is_apple_silicon, expected):
    name, reason = choose_backend(machine(*names), is_apple_silicon=is_apple_silicon)
    assert name == expected and reason


def test_the_reason_says_what_was_passed_over_on_a_mac():
    _, reason = choose_backend(machine("mps", "cpu"), is_apple_silicon=True)
    assert "not mlx: no mlx here" in reason


def test_mlx_alone_on_another_machine_is_not_chosen_silently():
    with pytest.raises(PippinError) as caught:
        choose_backend(machine("mlx"), is_apple_silicon=False)
    assert caught.value.code == "P501"


def test_nothing_available_says_why_for_each():
    with pytest.raises(PippinError) as caught:
        choose_backend(machine(), is_apple_silicon=True)
    assert all(f"{n}: no {n} here" in caught.value.found for n in ("mlx", "mps", "cuda", "cpu"))
    assert caught.value.remedy


# With a measurement


def measured(date="2026-11-20", **speeds):
    return Remembered(speeds, date, "Mac")


def test_the_faster_of_two_gpu_backends_is_taken_and_it_is_said_since_when():
    here = machine("mlx", "mps", "cpu")
    choice = choose_backend(
        here, is_apple_silicon=True, remembered=measured(mlx=1000.0, mps=1400.0, cpu=10.0)
    )
    assert choice == ("mps", "measured 1.4x mlx on this Mac, 2026-11-20")
    choice = choose_backend(
        here, is_apple_silicon=True, remembered=measured(mlx=1010.0, mps=1000.0)
    )
    assert choice == ("mlx", "measured as fast as mps on this Mac, 2026-11-20")


@pytest.mark.parametrize(
    ("names", "is_apple_silicon", "speeds", "expected"),
    [
        # A CPU that was faster with a small model says nothing of a larger one.
        (("mlx", "mps", "cpu"), True, {"mlx": 2.0, "mps": 1.0, "cpu": 9.0}, "mlx"),
        (("mps", "cpu"), True, {"mps": 1.0, "cpu": 9.0}, "mps"),
        (("cuda", "cpu"), False, {"cuda": 1.0, "cpu": 9.0}, "cuda"),
        # Never mlx elsewhere than on a Mac.
        (("mlx", "cpu"), False, {"mlx": 9.0, "cpu": 1.0}, "cpu"),
        (("mlx", "cuda", "cpu"), False, {"mlx": 9.0, "cuda": 1.0, "cpu": 0.5}, "cuda"),
        # Not all that are here were measured.
        (("mlx", "mps", "cpu"), True, {"mps": 9.0, "cpu": 1.0}, "mlx"),
        # Measured, but no longer here.
        (("mps", "cpu"), True, {"mlx": 9.0, "mps": 1.0}, "mps"),
        (("mlx", "mps"), True, {}, "mlx"),
        (("mlx", "mps"), True, {"tpu": 9.0}, "mlx"),
    ],
)
def test_a_measurement_only_reorders_what_is_chosen_from(names, is_apple_silicon, speeds, expected):
    plain = choose_backend(machine(*names), is_apple_silicon=is_apple_silicon)
    found = choose_backend(
        machine(*names), is_apple_silicon=is_apple_silicon, remembered=measured(**speeds)
    )
    assert found[0] == expected
    if "measured" not in found[1]:
        assert found == plain
