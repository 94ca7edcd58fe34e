"""What `auto` picks. Run: pytest tests/unit/test_choose.py"""

import pytest

from core.backend import Availability
from core.errors import PippinError
from core.machine.choose import choose_backend


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
