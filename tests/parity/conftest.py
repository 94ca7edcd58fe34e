"""Both frameworks must be there: parity is never skipped."""

from collections.abc import Iterator

import pytest

import backends


@pytest.fixture(scope="session", autouse=True)
def both_frameworks() -> Iterator[None]:
    missing = [
        f"{n}: {a.reason}"
        for n, a in backends.available().items()
        if n in ("cpu", "mlx") and not a.ok
    ]
    assert not missing, f"parity needs torch and mlx: {missing}"
    import torch

    # Tiny tensors: a second thread costs more than it brings.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
