"""Every ATen operator of the MPS path has an MPS kernel, by PyTorch's own table.

The path runs on the CPU under the choices of the MPS policy while each operator below autograd is
recorded. PyTorch's packaged `native_functions.yaml` says which kernels there are: "MPS", or a
composite, which passes if its parts are known and pass. float64, which MPS lacks, is refused as well,
and so are operands of different floating dtypes, since MPS does not promote everywhere.
"""

from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from core.checkpoint import initial_checkpoint
from core.params import param_specs
from tests.fake_mps import create_fake_mps, fake_mps_memory
from tests.helpers import random_batch, step_hyper, tiny_config

# Composites that the path uses, with the operators that each calls below the recorder, which does not
# see them: read in aten/src/ATen/native. Any other composite is refused until its parts are named here.
# One that was recorded although it is CompositeImplicitAutograd has a CPU kernel of its own: what MPS
# would do was then not seen.
AGNOSTIC = {"CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
VIEW, EMPTY, FILL = {"as_strided"}, {"empty.memory_format"}, {"empty.memory_format", "fill_.Scalar"}
PARTS = {
    "_foreach_mul_.Tensor": {"mul_.Tensor"},
    "_foreach_sub_.List": {"sub_.Tensor"},
    "_to_copy": {"empty_strided", "copy_"},
    "_unsafe_view": {"view"},
    "abs": {"abs.out"},
    "alias": set(),
    "arange": EMPTY | {"arange.start_out"},
    "bitwise_and.Scalar": {"bitwise_and.Tensor_out", "fill_.Scalar"},
    "clone": {"empty_like", "copy_"},
    "copy_": {"_copy_from"},
    "detach": set(),
    "embedding": {"index_select", "view"},
    "empty_like": EMPTY | {"empty_strided"},
    "expand": VIEW,
    "full": FILL,
    "index_put_": {"_index_put_impl_"},
    "lift_fresh": set(),
    "logical_not": EMPTY | {"logical_not.out"},
    "logsumexp": {"amax.out", "abs.out", "eq.Scalar_out", "masked_fill_.Scalar", "sub.out"}
    | {"exp.out", "sum.IntList_out", "log.out", "add.out"},
    "masked_fill.Scalar": {"clone", "masked_fill_.Scalar"},
    "mv": EMPTY | {"addmv.out"},
    "ones": FILL,
    "ones_like": {"empty_like", "fill_.Scalar"},
    "select.int": VIEW,
    "slice.Tensor": VIEW,
    "slice_backward": {"zeros", "slice.Tensor", "copy_"},
    "split.Tensor": {"slice.Tensor"},
    "squeeze.dim": VIEW,
    "stack": {"unsqueeze", "cat.out"},
    "sum": {"sum.IntList_out"},
    "t": {"transpose.int"},
    "transpose.int": VIEW,
    "unbind.int": {"select.int"},
    "unsqueeze": VIEW,
    "zeros": EMPTY | {"zero_"},
    "zeros_like": {"empty_like", "zero_"},
}
COPIES = {"copy_", "_to_copy"}


def load_table():
    path = resources.files("torchgen") / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].split("(")[0]: entry for entry in entries}


@pytest.fixture(scope="module")
def table():
    return load_table()


def problem(name, table):
    """Why MPS cannot run an operator, or None."""
    if name not in table:
        return "not in the table"
    entry = table[table[name].get("structured_delegate", name)]
    keys = {k.strip() for keys in entry.get("dispatch", {}) for k in keys.split(",")}
    if "MPS" in keys:
        return None
    if not keys & AGNOSTIC:
        return f"kernels for {', '.join(sorted(keys)) or 'a composite only'}"
    if name not in PARTS:
        return "a composite of unknown parts"
    found = {part: problem(part, table) for part in sorted(PARTS[name])}
    return "; ".join(f"{part}: {why}" for part, why in found.items() if why) or None


class Recorder(TorchDispatchMode):
    """Names of the operators met, and what is wrong with the dtypes of some."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            name = func._schema.name.removeprefix("aten::")
            overload = func._schema.overload_name
            name = f"{name}.{overload}" if overload else name
            self.names.add(name)
            if any(x.dtype == torch.float64 for x in tensors(result)):
                self.dtypes[name] = "makes float64"
            kinds = {x.dtype for x in tensors(args) if x.is_floating_point() and x.ndim > 0}
            if len(kinds) > 1 and name not in COPIES:
                self.dtypes[name] = f"mixes {sorted(map(str, kinds))}"
        return result


def tensors(values):
    """Tensors in arguments or results, lists of them included."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [x for v in values for x in tensors(v)] if isinstance(values, tuple | list) else []


def problems(recorder, table):
    found = {name: problem(name, table) for name in sorted(recorder.names)}
    return {name: why for name, why in found.items() if why} | recorder.dtypes


def exercise(backend):
    """Two steps of two micro-batches, scoring, logits, and decoding with forks and trims."""
    config = backend.config
    for step, segments in ((1, False), (2, True)):
        batches = [random_batch(config, row0=2 * i, segments=segments) for i in range(2)]
        for value in backend.train_step(batches, step_hyper(config, step, batches)).values():
            float(value)
    backend.score(batches[0])
    tokens = batches[0].tokens
    backend.logits(tokens)
    cache = backend.start(2, 20)
    backend.decode(tokens[:, :5], np.array([5, 3], np.int32), cache)
    backend.decode(tokens[:, :1], np.array([1, 1], np.int32), cache)
    cache.keep([1, 0, 1])
    cache.trim(0, 2)
    backend.decode(
        np.concatenate([tokens, tokens[:1]])[:, :2], np.array([2, 1, 2], np.int32), cache
    )
    even = backend.start(2, 9)
    for width in (5, 1, 2):
        backend.decode(tokens[:, :width], np.full(2, width, np.int32), even)
    dict(backend.tensors())
    backend.memory(reset_peak=True)


CASES = [
    {},
    {"model__tie_embeddings": False, "train__gradient_checkpointing": True},
    {"train__precision": "float16", "train__ns_dtype": "bfloat16"},
    {"train__precision": "bfloat16", "train__ns_dtype": "bfloat16", "model__qk_norm": False},
    {"train__optimizer": "adamw", "model__ffn_activation": "gelu", "model__n_kv_heads": 4},
    {"model__n_experts": 5, "train__precision": "bfloat16", "train__ns_dtype": "bfloat16"},
    {"model__n_experts": 3, "model__top_k": 3, "train__gradient_checkpointing": True},
]


@pytest.mark.parametrize("overrides", CASES)
def test_every_operator_has_an_mps_kernel(overrides, table, monkeypatch):
    fake_mps_memory(monkeypatch)
    # Tiny rows in several blocks.
    monkeypatch.setattr("backends.torch_mps.policy.MIN_BLOCK", 4)
    config = tiny_config(train__backend="mps", model__dropout=0.2, **overrides)
    specs = param_specs(config.model)
    with Recorder() as recorder:
        for mode in ("train", "infer"):
            backend = create_fake_mps(config, specs, mode=mode)
            backend.load(initial_checkpoint(config, specs))
            if mode == "train":
                exercise(backend)
            else:
                backend.logits(random_batch(config).tokens)
    assert problems(recorder, table) == {}
    # The recorder saw the forward pass, its gradient, the optimizer and the cache.
    seen = {"mm", "_softmax", "_softmax_backward_data", "searchsorted.Tensor", "index_put_"}
    if config.train.optimizer == "muon":
        seen |= {"baddbmm", "bmm"}
    assert seen <= recorder.names
    assert not any("scaled_dot_product" in name for name in recorder.names)
    assert "embedding_dense_backward" not in recorder.names


def test_planted_operators_are_caught(table, monkeypatch):
    """Kernels for CPU and CUDA alone, a fused CPU kernel, float64, mixed dtypes, an unknown one."""
    x = torch.randn(2, 3, 4, 4)
    with Recorder() as recorder:
        torch.geqrf(x)
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x.double()
        x[0] + x[0].half()
    found = problems(recorder, table)
    assert "CPU" in found["geqrf"]
    assert any("scaled_dot_product" in name for name in found)
    assert found["_to_copy"] == "makes float64"
    assert found["add.Tensor"].startswith("mixes")
    assert problem("no_such_operator", table) == "not in the table"
    assert problem("mul.Tensor", table) is None
    assert problem("block_diag", table) == "a composite of unknown parts"
    monkeypatch.setitem(PARTS, "sum", {"clone", "geqrf"})
    assert problem("sum", table).startswith("geqrf: kernels for CPU")
