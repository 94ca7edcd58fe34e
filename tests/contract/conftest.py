"""Every test here runs on every backend of PIPPIN_TEST_BACKENDS (see tests/conftest.py).

A backend that is named and cannot be imported fails its tests: it is never skipped. Beside "cpu" also
runs "fake_mps": the MPS backend with every choice of its policy, on the CPU.
"""

from collections.abc import Callable

import pytest

import backends
from core.backend import Backend
from core.config.schema import RunConfig
from core.params import param_specs
from tests.conftest import BACKENDS
from tests.fake_mps import create_fake_mps, fake_mps_memory
from tests.helpers import ArrayCheckpoint, random_params, tiny_config

NAMES = (*BACKENDS, *(["fake_mps"] if "cpu" in BACKENDS else []))


@pytest.fixture(params=NAMES)
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name for `backends.load` and `train.backend`."""
    if request.param != "fake_mps":
        return str(request.param)
    fake_mps_memory(monkeypatch)
    # Tiny rows in several blocks.
    monkeypatch.setattr("backends.torch_mps.policy.MIN_BLOCK", 4)
    monkeypatch.setattr(backends, "load", lambda name: create_fake_mps)
    return "mps"


@pytest.fixture
def make(backend_name: str) -> Callable[..., Backend]:
    """`make(mode="train", params=None, backend_state=None, model__dropout=0.2, ...)`.

    The backend holds `params`, or random ones that are far from their initial values.
    """

    def make_backend(
        *, mode="train", params=None, backend_state=None, config=None, **overrides
    ) -> Backend:
        config = config or make_config(backend_name, **overrides)
        specs = param_specs(config.model)
        backend = backends.load(backend_name)(config, specs, mode=mode)
        tensors = random_params(specs) if params is None else params
        backend.load(ArrayCheckpoint(config, tensors, backend_state=backend_state))
        return backend

    return make_backend


def make_config(backend_name: str, **overrides) -> RunConfig:
    return tiny_config(train__backend=backend_name, **overrides)
