"""What backends make of the errors of their frameworks, and operators that MPS has no kernel for.

Run: python -m pytest tests/unit/test_failures.py
"""

import warnings

import numpy as np
import pytest
import torch

from backends import fallback
from backends.mlx import failures as mlx_failures
from backends.torch_common import failures as torch_failures
from backends.torch_common.optim import Optimizer
from core.backend import OutOfMemory
from core.errors import PippinError
from core.params import param_specs
from tests.fake_mps import create_fake_mps, fake_mps_memory
from tests.helpers import ArrayCheckpoint, random_batch, random_params, step_hyper, tiny_config

# As torch 2.13 says it (ATen/mps/MPSFallback.mm).
MISSING = (
    "The operator 'aten::linalg_qr' is not currently implemented for the MPS device. If you want this "
    "op to be considered for addition please comment on the issue. As a temporary fix, you can set the "
    "environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1`"
)
TORCH_SAYS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GiB, other allocations: 1 MiB)"),
    RuntimeError("Invalid buffer size: 48.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    MemoryError("Unable to allocate 9 GiB for an array"),
]
MLX_SAYS = [
    RuntimeError(
        "[metal::malloc] Attempting to allocate 19 bytes which is greater than the maximum"
    ),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)"),
    RuntimeError("[malloc] Unable to allocate 99 bytes."),
    MemoryError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", TORCH_SAYS, ids=str)
def test_torch_out_of_memory(error):
    found = torch_failures.explain(error, backend="cpu", compiling=False, intact=False)
    assert isinstance(found, OutOfMemory) and found.code == "P101" and not found.intact
    assert found.found == str(error)


def test_the_real_allocator_says_what_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert torch_failures.is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    assert torch_failures.is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", MLX_SAYS, ids=str)
def test_mlx_out_of_memory(error):
    found = mlx_failures.explain(error, backend="mlx", compiling=False)
    assert isinstance(found, OutOfMemory) and found.intact


def test_what_is_no_lack_of_memory_is_left_alone():
    for error in (RuntimeError("size mismatch"), ValueError("out of memory, said a ValueError")):
        assert torch_failures.explain(error, backend="cpu", compiling=False) is error
    error = RuntimeError("no kernel")
    assert mlx_failures.explain(error, backend="mlx", compiling=False) is error


def test_too_many_buffers_are_not_mended_by_fewer_rows():
    error = RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")
    found = mlx_failures.explain(error, backend="mlx", compiling=False)
    assert isinstance(found, PippinError) and not isinstance(found, OutOfMemory)
    assert found.code == "P101" and "499000" in found.found


def test_a_bare_failure_holds_no_frames():
    def fail():
        try:
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise OutOfMemory("what", found="found", intact=False) from error

    with pytest.raises(OutOfMemory) as caught:
        fail()
    bare = caught.value.bare()
    assert (bare.what, bare.found, bare.intact) == ("what", "found", False)
    assert bare.__traceback__ is None and bare.__cause__ is None and bare.__context__ is None


@pytest.fixture
def fake_mps(monkeypatch):
    fake_mps_memory(monkeypatch)
    config = tiny_config(train__backend="mps")
    specs = param_specs(config.model)
    backend = create_fake_mps(config, specs, mode="train")
    backend.load(ArrayCheckpoint(config, random_params(specs)))
    return backend


def test_an_operator_without_a_kernel_is_named_wherever_it_is_met(fake_mps, monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError(MISSING)

    monkeypatch.setattr(fake_mps.model, "hidden", missing)
    monkeypatch.setattr(fake_mps, "_loss", missing)
    batch = random_batch(fake_mps.config)
    cache = fake_mps.start(1, 8)
    one = np.ones((1, 1), np.int32)
    for call in (
        lambda: fake_mps.train_step([batch], step_hyper(fake_mps.config, 1, [batch])),
        lambda: fake_mps.score(batch),
        lambda: fake_mps.logits(batch.tokens),
        lambda: fake_mps.decode(one, np.ones(1, np.int32), cache),
    ):
        with pytest.raises(PippinError) as caught:
            call()
        assert caught.value.code == "P504" and "aten::linalg_qr" in caught.value.what
        assert "--allow-cpu-fallback" in caught.value.render()


def test_out_of_memory_while_writing_text_says_what_helps_there(monkeypatch):
    fake_mps_memory(monkeypatch)
    config = tiny_config(train__backend="mps")
    specs = param_specs(config.model)
    backend = create_fake_mps(config, specs, mode="infer")
    backend.load(ArrayCheckpoint(config, random_params(specs)))

    def full(*args, **kwargs):
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(backend.model, "hidden", full)
    with pytest.raises(OutOfMemory) as caught:
        backend.logits(np.ones((1, 3), np.int32))
    assert "--max-new-tokens" in caught.value.remedy


def test_an_update_that_is_cut_short_is_not_intact(fake_mps, monkeypatch):
    batch = random_batch(fake_mps.config)

    def train(step):
        fake_mps.train_step([batch], step_hyper(fake_mps.config, step, [batch]))

    def full(*args, **kwargs):
        raise RuntimeError("MPS backend out of memory")

    real = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", full)
    with pytest.raises(OutOfMemory) as caught:
        train(1)
    assert not caught.value.intact
    monkeypatch.setattr(Optimizer, "step", real)
    train(1)
    monkeypatch.setattr(fake_mps, "_loss", full)
    with pytest.raises(OutOfMemory) as caught:
        train(2)
    assert caught.value.intact


def test_the_variable_counts_only_with_the_flag():
    for before in ("1", "yes"):
        env = {fallback.VARIABLE: before}
        note = fallback.set_cpu_fallback(allowed=False, environ=env)
        assert fallback.VARIABLE not in env
        assert f"{fallback.VARIABLE}={before}" in note and "--allow-cpu-fallback" in note
    for env in ({}, {fallback.VARIABLE: "0"}, {fallback.VARIABLE: ""}):
        assert fallback.set_cpu_fallback(allowed=False, environ=env) is None
        assert fallback.VARIABLE not in env
    env = {}
    assert fallback.set_cpu_fallback(allowed=True, environ=env, loaded=lambda: False) is None
    assert env == {fallback.VARIABLE: "1", fallback.ASKED: "1"}
    fallback.forbid_unasked(env)  # of a process that this one starts
    assert env[fallback.VARIABLE] == "1"
    alone = {fallback.VARIABLE: "1"}
    fallback.forbid_unasked(alone)  # of a tool that has no such flag
    assert alone == {}
    late = fallback.set_cpu_fallback(allowed=True, environ={}, loaded=lambda: True)
    assert "too late" in late


def test_operators_that_moved_are_told_once_and_other_warnings_stay(recwarn):
    told, shown = [], []
    text = (
        "The operator 'aten::{}' is not currently supported on the MPS backend and will fall back to "
        "run on the CPU. This may have performance implications."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest, **more: shown.append(str(message))
        end = fallback.tell_moved_operators(told.append)
        for name in ("median", "median", "kthvalue"):
            warnings.warn(text.format(name), UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        end()
        warnings.warn(text.format("after"), UserWarning, stacklevel=1)
    assert [t.split()[2] for t in told] == ["aten::median", "aten::kthvalue"]
    assert shown[0] == "something else" and "aten::after" in shown[1]
