"""What the torch policies decide, with the devices faked, and how the backend explains failures."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backends.cuda.policy import CudaPolicy
from backends.torch_common import create
from backends.torch_common.backend import TorchBackend
from backends.torch_common.device import CpuPolicy
from backends.torch_common.failures import explain
from backends.torch_mps.policy import MAX_ELEMENTS, MpsPolicy, has_native_bf16
from core.checkpoint import initial_checkpoint
from core.errors import PippinError
from core.params import param_specs
from tests.fake_mps import COUNTERS, create_fake_mps, fake_mps_memory
from tests.helpers import (
    ArrayCheckpoint,
    assert_same_bits,
    random_batch,
    snapshot,
    step_hyper,
    tiny_config,
)


def train(backend, step=1):
    batch = random_batch(backend.config)
    return backend.train_step([batch], step_hyper(backend.config, step, [batch]))


def fresh(config, policy=None):
    specs = param_specs(config.model)
    if policy is None:
        backend = create(config, specs, mode="train")
    else:
        backend = TorchBackend(config, specs, policy, mode="train")
    backend.load(initial_checkpoint(config, specs))
    return backend


def test_cpu_has_no_counters():
    policy = CpuPolicy(tiny_config())
    memory = policy.memory(reset_peak=False)
    assert (memory.active_bytes, memory.peak_bytes, memory.cached_bytes) == (None, None, None)
    info = policy.info()
    assert info.backend == "cpu" and info.framework == f"torch {torch.__version__}"
    assert info.budget_bytes is None


@pytest.mark.parametrize(
    ("available", "operators", "native"),
    [
        (True, {"_is_mkldnn_bf16_supported": lambda: True}, True),
        (True, {}, False),  # as in the wheels for macOS
        (False, {"_is_mkldnn_bf16_supported": lambda: True}, False),
    ],
)
def test_cpu_without_onednn_has_no_native_bf16(monkeypatch, available, operators, native):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operators))
    assert CpuPolicy(tiny_config()).info().native_bf16 is native


def test_mps_bounds_its_memory(monkeypatch):
    calls = fake_mps_memory(monkeypatch)
    MpsPolicy(tiny_config(train__memory_fraction=0.5), device="cpu")
    MpsPolicy(tiny_config(train__memory_fraction=1.0), device="cpu")
    assert calls == [
        ("set_per_process_memory_fraction", (0.5,)),
        ("set_per_process_memory_fraction", (0.9,)),
    ]
    assert "PYTORCH_ENABLE_MPS_FALLBACK" not in os.environ
    assert "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in os.environ


def test_mps_keeps_its_own_peak(monkeypatch):
    fake_mps_memory(monkeypatch)
    policy = MpsPolicy(tiny_config(), device="cpu")
    driver = COUNTERS["driver_allocated_memory"]
    first = policy.memory(reset_peak=False)
    assert first.active_bytes == COUNTERS["current_allocated_memory"]
    assert first.cached_bytes == driver - first.active_bytes
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 9 * driver)
    policy.release()
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: driver)
    assert policy.memory(reset_peak=True).peak_bytes == 9 * driver
    assert policy.memory(reset_peak=False).peak_bytes == driver


def test_mps_gives_memory_back_after_other_shapes(monkeypatch, tmp_path):
    calls = fake_mps_memory(monkeypatch)
    config = tiny_config(train__backend="mps")
    specs = param_specs(config.model)
    backend = create_fake_mps(config, specs, mode="train")
    backend.load(initial_checkpoint(config, specs))

    def released():
        count = sum(name == "empty_cache" for name, _ in calls)
        calls.clear()
        return count

    train(backend), train(backend, 2)
    assert released() == 0
    backend.score(random_batch(config)), backend.score(random_batch(config))
    assert released() == 0
    train(backend, 3), train(backend, 4)
    assert released() == 1
    backend.save(tmp_path / "a.npz", ArrayCheckpoint(config, {}).meta).result()
    assert released() == 1


def test_mps_without_the_dtype_is_refused(monkeypatch):
    fake_mps_memory(monkeypatch)

    def refuse(*args, **kwargs):
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(PippinError) as caught:
        MpsPolicy(tiny_config(train__precision="bfloat16"), device="cpu")
    assert caught.value.code == "P502" and "macOS 14" in caught.value.found


def test_mps_attention_never_makes_a_huge_tensor(monkeypatch):
    fake_mps_memory(monkeypatch)
    policy = MpsPolicy(tiny_config(), device="cpu")
    for rows, heads, length in ((1, 4, 64), (8, 12, 2048), (64, 32, 32_768)):
        q = torch.empty(rows, heads, length, 8, device="meta")
        block = policy._block(q, q)
        assert 1 <= block and rows * heads * block * length <= MAX_ELEMENTS
    assert policy._block(*[torch.empty(2, 4, 2048, 8, device="meta")] * 2) == 256


def test_mps_bias_is_finite_and_causal(monkeypatch):
    fake_mps_memory(monkeypatch)
    policy = MpsPolicy(tiny_config(train__precision="float16"), device="cpu")
    assert policy.prepare_mask(None, 1) is None
    policy.prepare_mask(None, 9)
    for bias in (policy.prepare_mask(None, 7), policy.prepare_mask(None, 11)):
        assert bias.dtype == torch.float32 and bool(torch.isfinite(bias.half()).all())
        n = bias.shape[0]
        assert torch.equal(bias == 0, torch.ones(n, n, dtype=torch.bool).tril())
    mask = torch.tensor([[[[True, False], [True, True]]]])
    assert torch.equal(policy.prepare_mask(mask, 2) == 0, mask)


@pytest.mark.parametrize(
    ("chip", "native"),
    [("Apple M1", False), ("Apple M2 Ultra", False), ("Apple M3 Pro", True), ("Apple M10", True)],
)
def test_bf16_is_native_from_m3_on(chip, native):
    assert has_native_bf16(chip) is native


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA policy with the device's answers faked and the global switches restored."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 16 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    yield lambda **overrides: CudaPolicy(tiny_config(train__backend="cuda", **overrides))
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def test_cuda_settings(cuda):
    policy = cuda()
    assert torch.get_float32_matmul_precision() == "highest"
    # With warnings alone, fused attention would still add with atomics in its backward pass.
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is False
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert policy.device == torch.device("cuda", 0)
    assert policy.info().native_bf16 is False and policy.info().budget_bytes == 16 << 30
    cuda(train__tf32=True)
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("found", [None, ":1024:8"])
def test_cuda_sets_a_workspace_that_repeats_results(cuda, monkeypatch, found):
    """Torch refuses matmuls under any other."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    if found:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found)
    cuda()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_cuda_bounds_its_memory(cuda, monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *args: calls.append(args)
    )
    cuda(train__memory_fraction=0.5)
    assert calls == [(0.5, torch.device("cuda", 0))]


@pytest.mark.parametrize("masked", [False, True])
def test_cuda_attention_equals_the_cpu_one(cuda, masked):
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 6)
    mask = torch.ones(7, 7, dtype=torch.bool).tril(-1) | torch.eye(7, dtype=torch.bool)
    mask = mask[None, None].clone() if masked else None
    wanted = CpuPolicy(tiny_config()).attention(q, k, v, mask, from_start=True)
    found = cuda().attention(q, k, v, mask, from_start=True)
    assert torch.allclose(found, wanted, atol=1e-6)


def scaled_gradient(loss):
    return 1.1 * loss - (0.1 * loss).detach()


@pytest.mark.parametrize(
    ("change", "trusted"),
    [
        (lambda loss: loss, True),
        (lambda loss: 1.001 * loss, True),
        (lambda loss: 1.05 * loss, False),
        (scaled_gradient, False),
        (lambda loss: loss * float("nan"), False),
    ],
)
def test_mps_compares_a_compiled_step_with_an_eager_one(monkeypatch, change, trusted):
    fake_mps_memory(monkeypatch)
    calls = []

    def compiler(function):
        def compiled(*args):
            calls.append(args[1].shape)
            loss, balance = function(*args)
            return change(loss), balance

        return compiled

    monkeypatch.setattr("backends.torch_mps.policy.compile_static", compiler)
    config = tiny_config(train__backend="mps", train__compile=True)
    backend = fresh(config, MpsPolicy(config, device="cpu"))
    before = snapshot(backend)
    if not trusted:
        with pytest.raises(PippinError) as caught:
            train(backend)
        assert caught.value.code == "P502" and "eager" in caught.value.found
        assert_same_bits(before, snapshot(backend))
        assert all(p.grad is None for p in backend.model.parameters())
        return
    train(backend), train(backend, 2)
    one = random_batch(config, rows=1)
    backend.train_step([one], step_hyper(config, 3, [one]))
    assert [shape[0] for shape in calls] == [2, 2, 2, 1, 1]  # twice where the shape is new


class Failing(CpuPolicy):
    """A CPU whose compiled function fails."""

    def __init__(self, config, error):
        super().__init__(config)
        self.error = error

    def compile(self, function):
        def broken(*args):
            if self.error is not None:
                raise self.error
            return function(*args)

        return broken


def test_failing_compiler_is_an_error_and_not_a_fallback():
    config = tiny_config(train__compile=True)
    backend = fresh(config, Failing(config, RuntimeError("no C++ compiler\ntrace")))
    with pytest.raises(PippinError) as caught:
        train(backend)
    assert caught.value.code == "P502" and "no C++ compiler" in caught.value.found
    assert caught.value.remedy == "train.compile=false"


def test_a_compiler_that_fails_at_a_later_shape_is_the_same_error():
    """A row of the preflight checks is compiled before the batches of the run."""
    config = tiny_config(train__compile=True)
    policy = Failing(config, None)
    backend = fresh(config, policy)
    one = random_batch(config, rows=1)
    backend.train_step([one], step_hyper(config, 1, [one]))
    policy.error = RuntimeError("no such kernel")
    with pytest.raises(PippinError) as caught:
        train(backend)
    assert caught.value.code == "P502"
    with pytest.raises(RuntimeError, match="no such kernel"):
        backend.train_step([one], step_hyper(config, 1, [one]))


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "Invalid buffer size: 48.00 GiB",
        "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ],
)
def test_every_way_to_say_out_of_memory_is_understood(text):
    found = explain(RuntimeError(text), backend="mps", compiling=True)
    assert isinstance(found, PippinError) and found.code == "P101" and found.found == text


def test_out_of_memory_says_what_to_do_and_changes_nothing():
    config = tiny_config(train__compile=True)
    policy = Failing(config, None)
    backend = fresh(config, policy)
    train(backend)
    before = snapshot(backend)
    policy.error = RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
    with pytest.raises(PippinError) as caught:
        train(backend, 2)
    assert caught.value.code == "P101" and "micro_batch_size" in caught.value.remedy
    policy.error = ValueError("something else")
    with pytest.raises(ValueError):
        train(backend, 2)
    assert_same_bits(before, snapshot(backend))
    assert all(p.grad is None for p in backend.model.parameters())


def test_infer_keeps_no_gradients_and_matrices_in_the_compute_dtype():
    config = tiny_config(train__precision="bfloat16")
    backend = create(config, param_specs(config.model), mode="infer")
    dtypes = {n: p.dtype for n, p in backend.model.named_parameters()}
    assert dtypes["norm.weight"] == torch.float32
    assert dtypes["layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert not any(p.requires_grad for p in backend.model.parameters())
    with pytest.raises(PippinError) as caught:
        train(backend)
    assert caught.value.code == "P001"


def test_rope_tables_grow_with_the_cache():
    config = tiny_config(model__max_seq_len=13)
    backend = fresh(config)
    tokens = np.tile(random_batch(config).tokens, (1, 3))
    wanted = fresh(tiny_config(model__max_seq_len=64)).logits(tokens)
    assert np.array_equal(backend.logits(tokens), wanted)
    cache = backend.start(2, 39)
    found = backend.decode(tokens, np.array([39, 39], np.int32), cache)
    assert np.allclose(found, wanted[:, -1], atol=1e-5)


def test_gradient_checkpointing_runs_each_block_twice():
    for checkpointing, runs in ((False, 1), (True, 2)):
        backend = fresh(tiny_config(train__gradient_checkpointing=checkpointing))
        calls = []
        for layer in backend.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        train(backend)
        assert len(calls) == runs * len(backend.model.layers)
        backend.score(random_batch(backend.config))
        assert len(calls) == (runs + 1) * len(backend.model.layers)
