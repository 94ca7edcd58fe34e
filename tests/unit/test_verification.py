"""Setup verification: healthy backends pass, planted faults fail, and every finding says what to do.

The float64 reference that ships is compared with the one of tests/reference, written on its own.

Run: python -m pytest tests/unit/test_verification.py
"""

import ctypes
import json
import os
import signal
import sys

import numpy as np
import pytest

import backends
from core.backend import Availability
from core.config.load import load
from core.errors import PippinError
from core.machine.detect import machine_facts
from core.params import param_specs
from core.training.verification import Request, forward, reference, surroundings, updates, verify
from core.training.verification import bench as benches
from core.training.verification.bench import Bench, batch_of, setting, weights_of
from core.training.verification.report import Check, Printer, Report, measured, worst
from core.training.verification.selftests import Subject, run_apart, run_here
from tests.fake_mps import create_fake_mps, fake_mps_memory
from tests.machines.recorded import recorded
from tests.reference import model_np, optim_np

BACKENDS = ("cpu", "mlx")


@pytest.fixture(autouse=True, scope="module")
def give_memory_back():
    """What a CPU backend freed is kept for its next step, and would hide what later tests allocate."""
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def bench(name, tmp_path, **changes):
    return Bench(name, backends.load(name), tmp_path, **changes)


def failures(checks):
    return {c.name for c in checks if c.status == "fail"}


# The reference


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_reference_equals_the_one_of_the_tests(dropout, tmp_path):
    config = setting(bench("cpu", tmp_path), model__dropout=dropout)
    p = {n: v.astype(np.float64) for n, v in weights_of(param_specs(config.model)).items()}
    batch = batch_of(config, packed=True)
    ours = reference.logits(p, batch.tokens, config.model, segments=batch.segments)
    theirs = model_np.logits(p, batch.tokens, config.model, segments=batch.segments)
    assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()
    normalizer = float(batch.weights.sum())
    expected = model_np.loss(p, batch, config.model, normalizer=normalizer, seed=11, step=3)
    assert reference.loss(p, batch, config.model, seed=11, step=3) == pytest.approx(
        expected, rel=1e-12
    )


def test_the_reference_orthogonalises_as_the_tests_do():
    matrix = np.random.default_rng(0).standard_normal((7, 4))
    assert np.allclose(reference.newton_schulz(matrix, 5), optim_np.newton_schulz(matrix, 5))


def test_the_slope_of_memory_by_hand():
    assert updates.steady_slope(np.array([10.0, 13.0, 16.0, 19.0])) == 3.0
    jump = np.array([0.0] * 25 + [1e9] + [0.0] * 25)
    assert updates.steady_slope(jump) == 0.0
    assert updates.steady_slope(np.arange(51) * 4096.0 + np.sin(np.arange(51))) == pytest.approx(
        4096, abs=1
    )


def test_not_a_number_never_passes():
    assert measured("g", "n", float("nan"), 1.0, remedy="").status == "fail"
    assert measured("g", "n", float("inf"), 1.0, remedy="").status == "fail"
    assert measured("g", "n", 1.0, 1.0, remedy="").status == "pass"
    assert np.isnan(worst([1.0, float("nan"), 2.0])) and worst([1.0, 3.0, 2.0]) == 3.0
    assert benches.relative(np.array([np.nan]), np.array([1.0])) == float("inf")


# The self-tests


@pytest.mark.parametrize("name", BACKENDS)
def test_a_healthy_backend_passes_every_test(name):
    opener = backends.open_checkpoint
    subject = Subject(name, backends.load, opener, (".npz", ".pt"), False, False, False)
    checks = list(run_apart(subject))
    assert not failures(checks), [c for c in checks if c.status == "fail"]
    names = {c.name for c in checks if c.status == "pass"}
    for words in (
        "no leak without gradients, float16",
        "no leak in training, bfloat16",
        "attention, bfloat16",
        "attention of packed rows, float32",
        "decoding with a cache, float32",
        "gradients, float32",
        "Muon's update against float64",
        "AdamW's update against float64",
        "grouped heads equal expanded, gradients",
        "loss in chunks against float64",
        "lookup in 32,003 rows, gradient",
        "norm of the gradients",
        "clip of the norm",
        "dropout after saving and loading",
        "conversion .npz to .pt and back",
        "memory over 50 steps",
    ):
        assert words in names


def test_the_path_of_mps_passes_with_the_device_faked(monkeypatch, tmp_path):
    fake_mps_memory(monkeypatch)
    test = Bench("mps", create_fake_mps, tmp_path)
    found = [
        *forward.causal(test),
        *forward.against_float64(test),
        *forward.grouped_heads(test),
        *updates.backward(test),
        *updates.adamw(test),
        *updates.muon(test),
    ]
    assert not failures(found), found
    assert {c.group for c in found} == {"backend mps"} and len(found) == 20


def torch_layers():
    from backends.torch_common import backend, device, layers, losses, model, optim

    return backend, device, layers, losses, model, optim


def leaky(monkeypatch):
    """What pytorch #195910 does: without gradients the mask is not applied."""
    import torch

    _, device, *_ = torch_layers()
    healthy = device.CpuPolicy.attention

    def attention(self, q, k, v, mask, *, from_start):
        if torch.is_grad_enabled() or q.shape[2] == 1:
            return healthy(self, q, k, v, mask, from_start=from_start)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=q.shape[1] != k.shape[1]
        )

    monkeypatch.setattr(device.CpuPolicy, "attention", attention)


def leaky_in_training(monkeypatch):
    import torch

    _, device, *_ = torch_layers()
    healthy = device.CpuPolicy.attention

    def attention(self, q, k, v, mask, *, from_start):
        if not torch.is_grad_enabled():
            return healthy(self, q, k, v, mask, from_start=from_start)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    monkeypatch.setattr(device.CpuPolicy, "attention", attention)


def wrong_groups(monkeypatch):
    """Key/value heads handed out in turn instead of in blocks (a fault of early GQA kernels)."""
    import torch

    _, device, *_ = torch_layers()
    healthy = device.CpuPolicy.attention

    def attention(self, q, k, v, mask, *, from_start):
        times = q.shape[1] // k.shape[1]
        k, v = (torch.cat([x] * times, dim=1) for x in (k, v))
        return healthy(self, q, k, v, mask, from_start=from_start)

    monkeypatch.setattr(device.CpuPolicy, "attention", attention)


def no_bias_correction(monkeypatch):
    *_, optim = torch_layers()
    healthy = optim.Optimizer._columns

    def columns(self, stack, hyper):
        active, idle = healthy(self, stack, hyper)
        if len(active) == 7:
            active[5] = 1.0
        return active, idle

    monkeypatch.setattr(optim.Optimizer, "_columns", columns)


def other_coefficients(monkeypatch):
    *_, optim = torch_layers()
    monkeypatch.setattr(optim, "NS_COEFFICIENTS", (3.4445 * 1.01, -4.7750, 2.0315))


def no_clip(monkeypatch):
    import torch

    backend, *_ = torch_layers()
    healthy = backend.TorchBackend._train_step

    def step(self, optimizer, micro, hyper):
        from dataclasses import replace

        return healthy(self, optimizer, micro, replace(hyper, max_grad_norm=0.0))

    monkeypatch.setattr(backend.TorchBackend, "_train_step", step)
    assert torch


def clamped_lookup(monkeypatch):
    """Rows past 2^14 read as that row, as an index that is too narrow would."""
    import torch

    _, device, *_ = torch_layers()
    monkeypatch.setattr(
        device.CpuPolicy,
        "lookup",
        lambda self, weight, tokens: torch.nn.functional.embedding(
            tokens.clamp(max=1 << 14), weight
        ),
    )


def half_the_last_chunk(monkeypatch):
    _, _, _, losses, *_ = torch_layers()
    healthy = losses._HeadLoss.forward

    def forward(ctx, hidden, weight, targets, weights, coefficient, chunk):
        if hidden.shape[0] > chunk:
            weights = weights.clone()
            weights[chunk:] *= 0.5
        return healthy(ctx, hidden, weight, targets, weights, coefficient, chunk)

    monkeypatch.setattr(losses._HeadLoss, "forward", staticmethod(forward))


def fresh_masks(monkeypatch):
    """Dropout keyed by the framework's generator, which no checkpoint holds."""
    import torch

    backend, *_ = torch_layers()
    monkeypatch.setattr(
        backend,
        "dropout_row_keys",
        lambda seed, step, row0, rows: torch.randint(1 << 31, (rows,)).numpy().astype(np.uint32),
    )


def leaking_memory(monkeypatch):
    backend, *_ = torch_layers()
    healthy, kept = backend.TorchBackend.train_step, []

    def step(self, micro, hyper):
        kept.append(np.ones(1 << 18))  # 2 MB a step
        return healthy(self, micro, hyper)

    monkeypatch.setattr(backend.TorchBackend, "train_step", step)


def half_gain_gradient(monkeypatch):
    _, _, layers, *_ = torch_layers()
    healthy = layers._RMSNormFunction.backward

    def backward(ctx, grad):
        x, weight, eps = healthy(ctx, grad)
        return x, weight * 1.001, eps

    monkeypatch.setattr(layers._RMSNormFunction, "backward", staticmethod(backward))


@pytest.mark.parametrize(
    ("fault", "test", "name"),
    [
        (leaky, forward.causal, "no leak without gradients, float32"),
        (leaky_in_training, forward.causal, "no leak in training, float32"),
        (leaky, forward.against_float64, "attention, float32"),
        (wrong_groups, forward.against_float64, "attention, bfloat16"),
        (half_gain_gradient, updates.backward, "gradients, float32"),
        (no_bias_correction, updates.adamw, "AdamW's update against float64"),
        (other_coefficients, updates.muon, "Muon's update against float64"),
        (no_clip, updates.clip, "clip of the norm"),
        (clamped_lookup, forward.large_vocabulary, "lookup in 32,003 rows"),
        (half_the_last_chunk, forward.large_vocabulary, "loss in chunks against scores"),
        (wrong_groups, forward.grouped_heads, "grouped heads equal expanded, forward"),
        (leaking_memory, updates.memory_slope, "memory over 50 steps"),
    ],
)
def test_a_planted_fault_is_caught(fault, test, name, monkeypatch, tmp_path):
    checks = bench("cpu", tmp_path, quick=False)
    if name == "no leak without gradients, float32" or name == "no leak in training, float32":
        checks = bench("cpu", tmp_path, quick=True)
    fault(monkeypatch)
    found = list(test(checks))
    assert name in failures(found)
    assert all(c.remedy for c in found if c.status == "fail")


def test_masks_that_no_checkpoint_holds_are_caught(monkeypatch, tmp_path):
    fresh_masks(monkeypatch)
    found = list(updates.dropout(bench("cpu", tmp_path), backends.open_checkpoint))
    assert failures(found) == {"dropout against float64", "dropout after saving and loading"}


def test_a_loss_of_bits_in_a_checkpoint_is_caught(monkeypatch, tmp_path):
    from backends.torch_common.backend import TorchBackend

    healthy = TorchBackend.tensors

    def rounded(self, *, optimizer=True):
        for name, value in healthy(self, optimizer=optimizer):
            yield name, value.astype(np.float16).astype(np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "tensors", rounded)
        found = list(
            updates.conversion(bench("cpu", tmp_path), backends.open_checkpoint, (".npz", ".pt"))
        )
    assert failures(found) == {"conversion .npz to .pt and back"}


def test_an_mlx_whose_norms_are_naive_is_caught(monkeypatch, tmp_path):
    """Pitfall X36: MLX on a CPU sums naively."""
    from backends.mlx import layers

    monkeypatch.setattr(layers, "FSUM_BLOCK", 1 << 40)
    assert "norm of the gradients" in failures(updates.clip(bench("mlx", tmp_path)))


def test_a_compiled_step_that_computes_something_else_is_caught(monkeypatch, tmp_path):
    import mlx.core as mx

    def faulty(function):
        def step(*args):
            *state, metrics = function(*args)
            return (*state, metrics | {"grad_norm": metrics["grad_norm"] * 1.001})

        return step

    import backends.mlx.backend  # noqa: F401 - its own imports compile

    test = bench("mlx", tmp_path, compiles=True)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    assert not failures(updates.compiled(test))
    monkeypatch.setattr(mx, "compile", faulty)
    assert failures(updates.compiled(test)) == {"compiled step equals eager"}
    (skipped,) = updates.compiled(bench("cpu", tmp_path))
    assert skipped.status == "skipped"


@pytest.mark.skipif(updates.malloc_bytes() is None, reason="needs glibc 2.33")
def test_mallocs_count_is_exact():
    before = updates.malloc_bytes()
    block = np.ones(1 << 20)
    assert updates.malloc_bytes() - before == pytest.approx(block.nbytes, abs=1 << 16)


# Processes of their own


def subject(load, **changes):
    fields = {
        "backend": "cpu",
        "load": load,
        "open_checkpoint": backends.open_checkpoint,
        "suffixes": (".npz", ".pt"),
        "is_gpu": False,
        "compiles": False,
        "quick": True,
    }
    return Subject(**(fields | changes))


def crashing_load(name):
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging_load(name):
    signal.pause()


def missing_load(name):
    raise PippinError("P501", "backend cpu does not load: no.", remedy="pip install torch")


def test_a_crash_is_a_failed_check():
    (check,) = run_apart(subject(crashing_load))
    assert (check.status, check.name) == ("fail", "self-tests") and "signal 11" in check.figure


def test_a_test_that_hangs_is_a_failed_check():
    (check,) = run_apart(subject(hanging_load), timeout_s=4)
    assert check.status == "fail" and "no answer in 4 s" in check.figure


def test_a_backend_that_does_not_load_says_what_to_do():
    (check,) = run_here(subject(missing_load))
    assert (check.status, check.remedy) == ("fail", "pip install torch")


def test_an_error_in_one_test_leaves_the_others(monkeypatch):
    def broken(bench):
        raise RuntimeError("Placeholder storage has not been allocated on MPS device!")

    monkeypatch.setattr(updates, "muon", broken)
    found = list(run_here(subject(backends.load)))
    assert failures(found) == {"Muon's update"}
    assert "Placeholder storage" in next(c.figure for c in found if c.status == "fail")
    assert found[-1].name == "AdamW's update against float64"


# The surroundings


def draft(*overrides, config="quickstart"):
    return load(config=config, overrides=list(overrides))


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("m2_air_16gb", set()),
        ("old_laptop", set()),
        ("h100_x8", set()),
        ("m1_rosetta", {"Python for this chip"}),
        ("mixed_cards", {"NVIDIA cards"}),
    ],
)
def test_what_stands_in_the_way_on_a_machine(name, failing):
    assert failures(surroundings.machine(machine_facts(recorded(name)))) == failing


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        (
            "h100_x8",
            "NVIDIA cards",
            "8 x NVIDIA H100 80GB HBM3, 79.6 GiB each, Hopper 9.0, datacenter, nvlink",
        ),
        (
            "container_v2",
            "processor and memory",
            "AMD EPYC 9R14, 32 cores, bf16, AVX-512, 251.5 GiB limited to 8 GiB",
        ),
        (
            "m2_air_16gb",
            "unified memory",
            "11.8 GiB for the GPU (Metal's recommended working set), largest array 8.9 GiB, "
            "10 GPU cores",
        ),
    ],
)
def test_the_facts_of_a_machine_in_words(name, line, words):
    found = {c.name: c.figure for c in surroundings.machine(machine_facts(recorded(name)))}
    assert found[line] == words


def test_an_old_macos_fails():
    probe = recorded(
        "m2_air_16gb", platform={"system": "Darwin", "architecture": "arm64"} | {"version": "13.7"}
    )
    found = list(surroundings.machine(machine_facts(probe)))
    assert failures(found) == {"macOS"}


def states(**reasons):
    """Every backend: "" can run, "absent" is not here, "old" is here in a wrong version."""
    return {
        n: Availability(
            n, not why, why, f"get {n}" if why else "", code="P502" if why == "old" else "P501"
        )
        for n, why in reasons.items()
    }


def test_absent_backends_are_skipped_and_wrong_ones_fail():
    some = states(mlx="absent", mps="old", cpu="")
    present, checks = surroundings.backends_here(some, None)
    assert present == ["cpu"]
    assert [c.status for c in checks] == ["skipped", "fail", "pass"]
    present, checks = surroundings.backends_here(some, "mlx")
    assert present == [] and failures(checks) == {"mlx"}
    assert failures(surroundings.backends_here(states(cpu="absent"), None)[1]) == {
        "one that can run"
    }


def test_a_text_that_is_not_there(tmp_path):
    check, size = surroundings.dataset(draft(f"data.input_file={tmp_path}/no.txt"), online=False)
    assert check.status == "fail" and "no.txt" in check.figure and size == 0


def test_a_text_that_can_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time.\n" * 1000)
    check, size = surroundings.dataset(draft(f"data.input_file={tmp_path}/a.txt"), online=False)
    assert check.status == "pass" and size == 18_000


def test_a_hub_name_needs_the_library_and_no_network(monkeypatch):
    given = draft("data.input_file=hf:roneneldan/TinyStories")
    monkeypatch.setattr(surroundings.importlib.util, "find_spec", lambda name: None)
    check, _ = surroundings.dataset(given, online=False)
    assert check.status == "fail" and "pip install" in check.remedy
    monkeypatch.setattr(surroundings.importlib.util, "find_spec", lambda name: name)
    assert surroundings.dataset(given, online=False)[0].status == "pass"


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows(tmp_path):
    from core.data.tokenizers.tokenizer import ByteTokenizer

    made = ByteTokenizer()
    path = made.save(tmp_path)
    good = surroundings.tokenizer(draft(f"data.tokenizer={path}", "model.vocab_size=400"))
    assert good.status == "pass" and "stay unused" in good.figure
    bad = surroundings.tokenizer(draft(f"data.tokenizer={path}", "model.vocab_size=100"))
    assert bad.status == "fail" and bad.remedy == f"model.vocab_size={made.vocab_size}"
    lost = surroundings.tokenizer(draft(f"data.tokenizer={tmp_path}/no.model"))
    assert lost.status == "fail"


def device(budget_gb):
    from core.machine.autoconfig import DeviceFacts

    return DeviceFacts("cpu", "", False, False, int(budget_gb * 1e9))


def test_memory_that_does_not_fit_says_what_fits():
    given = draft("model.d_model=1024", "model.n_layers=16", "train.micro_batch_size=64")
    small = surroundings.memory(given, surroundings.plan(given, device(8), 0))
    assert small.status == "fail" and small.value > small.tolerance == int(8e9 * 0.8)
    rows, parts = (int(w.split("=")[1]) for w in small.remedy.split()[:2])
    assert rows < 64 and rows * parts == 64
    overrides = [w for w in small.remedy.split() if "=" in w]
    mended = draft("model.d_model=1024", "model.n_layers=16", *overrides)
    assert surroundings.memory(mended, surroundings.plan(mended, device(8), 0)).status == "pass"
    none = surroundings.memory(given, surroundings.plan(given, device(0.5), 0))
    assert none.status == "fail" and "a smaller model" in none.remedy
    large = surroundings.memory(given, surroundings.plan(given, device(4000), 0))
    assert large.status == "pass"


def test_a_disk_that_is_too_small():
    planned = surroundings.plan(draft(), device(16), 10_000_000)
    assert surroundings.disk(planned, lambda folder: 1000).status == "fail"
    assert surroundings.disk(planned, lambda folder: None).status == "skipped"
    good = surroundings.disk(planned, lambda folder: 10**12)
    assert good.status == "pass" and good.value > 10_000_000


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    given = draft(f"train.save_dir={tmp_path}/file/run", f"data.shards_dir={tmp_path}/new/shards")
    found = list(surroundings.folders(given))
    assert failures(found) == {"run folder writable"}
    assert not (tmp_path / "new").exists()  # looking leaves nothing behind


# The whole


def quietly(request, **changes):
    return verify(request, changes.pop("backends", backends), **changes)


def test_a_broken_configuration_is_a_failed_check_with_every_problem(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  n_layerz: 3\ntrain:\n  lr: fast\n")
    request = Request(config=str(path), backend="cpu", quick=True, apart=False)
    report = quietly(request)
    (check,) = [c for c in report.checks if c.group == "config"]
    assert check.status == "fail" and "n_layerz" in check.figure and "train.lr" in check.figure
    assert report.exit_code == 1


def test_a_configuration_that_is_not_there_is_bad_usage():
    with pytest.raises(PippinError) as caught:
        quietly(Request(config="nothing"))
    assert caught.value.code == "P011" and caught.value.exit_code == 2


def test_a_report_as_json_is_one_object():
    report = Report({"system": "Linux"}, "a machine")
    report.checks += [
        Check("g", "good", "pass", "0", 0.0, 1.0),
        Check("g", "bad", "fail", "inf", float("inf"), 1.0, "mend it"),
    ]
    found = json.loads(report.to_json())
    assert found["ok"] is False and found["counts"] == {"pass": 1, "fail": 1, "skipped": 0}
    assert found["checks"][1]["value"] is None and found["checks"][1]["remedy"] == "mend it"


def test_the_printed_report_names_the_failure_and_the_remedy():
    lines = []
    printer = Printer(lines.append, width=70)
    bad = Check(
        "backend cpu", "no leak", "fail", "0.9, at most 0.0001 " * 4, remedy="train on the CPU"
    )
    printer.check(bad)
    printer.end(Report({}, "", [bad]))
    text = "\n".join(lines)
    assert "FAIL no leak" in text and "try: train on the CPU" in text and "1 failed" in text
    assert all(len(line) <= 70 for line in text.splitlines())


def test_core_verification_needs_no_framework():
    import subprocess

    code = (
        "import sys, core.training.verification.command; print({'torch','mlx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
