"""Every test here runs on every backend of PIPPIN_TEST_BACKENDS, by default "cpu,mlx,fake_mps".

A backend that is named and cannot be imported fails its tests: it is never skipped. "fake_mps" is
the MPS backend with every choice of its policy, on the CPU.
"""

import os
from collections.abc import Callable

import pytest

import backends
from core.backend import Backend
from core.config.schema import RunConfig
from core.params import param_specs
from tests.fake_mps import create_fake_mps, fake_mps_memory
from tests.helpers import ArrayCheckpoint, random_params, tiny_config

NAMES = os.environ.get("PIPPIN_TEST_BACKENDS", "cpu,mlx,fake_mps").split(",")


@pytest.fixture(params=NAMES)
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "fake_mps":
        fake_mps_memory(monkeypatch)
    return str(request.param)


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
        backend = create(backend_name, config, specs, mode=mode)
        tensors = random_params(specs) if params is None else params
        backend.load(ArrayCheckpoint(config, tensors, backend_state=backend_state))
        return backend

    return make_backend


def make_config(backend_name: str, **overrides) -> RunConfig:
    return tiny_config(train__backend=backend_name.removeprefix("fake_"), **overrides)


def create(backend_name: str, config: RunConfig, specs, *, mode: str) -> Backend:
    if backend_name == "fake_mps":
        return create_fake_mps(config, specs, mode=mode)
    return backends.load(backend_name)(config, specs, mode=mode)
