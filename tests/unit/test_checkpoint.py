"""Checkpoint v1 carries every bit, in both formats, and says everything that is wrong at once.

Run: python -m pytest tests/unit/test_checkpoint.py
"""

import gc
import hashlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import (
    Meta,
    check_checkpoint,
    initial_checkpoint,
    meta_summary,
    verify,
)
from core.errors import PippinError
from core.params import param_specs, slot_specs
from tests.checkpoint_helpers import (
    OPEN,
    SUFFIXES,
    WRITE,
    contents,
    tiny_meta,
    tiny_tensors,
    write_tiny,
)
from tests.helpers import tiny_config

# sha256 over the tensors of `tiny_config()` at seed 7, in the order of the table. A change here means
# that every old experiment would start from other weights.
GOLDEN_INITIAL = "14075187ea1a26912c41202f4875348725b8a6732087e3b3676a54c9f6b66ac5"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_dtype_comes_back_bit_by_bit(tmp_path: Path, suffix: str) -> None:
    ckpt = OPEN[suffix](write_tiny(tmp_path / f"step_000500{suffix}"))
    tensors = tiny_tensors()
    assert ckpt.names == tuple(tensors)
    assert [ckpt.dtype(n) for n in ckpt.names[1:4]] == ["float32", "bfloat16", "float16"]
    for name, array in contents(ckpt):
        assert array.dtype == tensors[name].dtype
        assert array.shape == tensors[name].shape == ckpt.shape(name)
        assert array.tobytes() == tensors[name].tobytes()
        assert array.flags.writeable
    filled = {"dtypes": ckpt.meta.dtypes, "shapes": ckpt.meta.shapes}
    assert replace(tiny_meta(), checksums=ckpt.meta.checksums, **filled) == ckpt.meta


def test_both_formats_and_a_round_trip_have_equal_meta_and_checksums(tmp_path: Path) -> None:
    first = OPEN[".npz"](write_tiny(tmp_path / "a.npz"))
    second = OPEN[".pt"](WRITE[".pt"](tmp_path / "b.pt", first.meta, contents(first)))
    third = OPEN[".npz"](WRITE[".npz"](tmp_path / "c.npz", second.meta, contents(second)))
    assert first.meta == second.meta == third.meta
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    for name, array in tiny_tensors().items():
        assert first.meta.checksums[name] == hashlib.sha256(array.tobytes()).hexdigest()


def test_numpy_reads_the_npz_without_pickle(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.npz")
    with np.load(path, allow_pickle=False) as file:
        assert file.files == [*tiny_tensors(), "__meta__"]
        for name, array in tiny_tensors().items():
            assert file[name].tobytes() == array.tobytes()
            assert file[name].shape == array.shape
        assert Meta.from_json(file["__meta__"].tobytes().decode()).step == 500


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_the_pt_with_native_bfloat16(tmp_path: Path, mmap: bool) -> None:
    import torch

    path = write_tiny(tmp_path / "a.pt")
    payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    assert list(payload) == ["meta", "tensors"]
    assert list(payload["tensors"]) == list(tiny_tensors())
    dtypes = {"<f4": torch.float32, "<u2": torch.bfloat16, "<f2": torch.float16}
    for name, array in tiny_tensors().items():
        tensor = payload["tensors"][name]
        assert tensor.dtype == dtypes[array.dtype.str]
        assert tuple(tensor.shape) == array.shape
        assert tensor.is_contiguous()
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    assert Meta.from_json(payload["meta"]).step == 500


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_memory_layouts_are_stored_in_c_order_little_endian(
    tmp_path: Path, suffix: str
) -> None:
    rng = np.random.default_rng(3)
    big = rng.standard_normal((321, 517)).astype(np.float32)  # above the size hashed in threads
    odd = {"t.weight": big.T, "s.weight": big[::3, 1::2], "b.weight": big[:4].astype(">f4")}
    odd["z.weight"] = np.float32(2.5).reshape(())
    ckpt = OPEN[suffix](WRITE[suffix](tmp_path / f"a{suffix}", tiny_meta(), odd.items()))
    for name, array in odd.items():
        plain = np.ascontiguousarray(array).astype("<f4").tobytes()
        assert ckpt.meta.checksums[name] == hashlib.sha256(plain).hexdigest()
        assert ckpt.read(name).tobytes() == plain
        assert ckpt.shape(name) == array.shape


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_streams(tmp_path: Path, suffix: str) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for i in range(9):
            array = np.full((300, 400), i, np.float32)
            alive.append(weakref.ref(array))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"layers.{i}.weight", array

    WRITE[suffix](tmp_path / f"a{suffix}", tiny_meta(), tensors())
    assert most <= 2


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a.weight", np.zeros(3), "float64"),
        ("a.weight", np.array([None]), "object"),
        ("../evil", np.zeros(3, np.float32), "canonical"),
        ("embed_tokens.weight", np.zeros(3, np.float32), "twice"),
        ("layers.9.weight", np.zeros(3, np.float32), "meta says bfloat16"),
    ],
)
def test_what_is_not_in_the_format_is_not_written(
    tmp_path: Path, name: str, array: np.ndarray, words: str
) -> None:
    tensors = [*tiny_tensors().items(), (name, array)]
    with pytest.raises(PippinError, match=words):
        WRITE[".npz"](
            tmp_path / "a.npz", tiny_meta(dtypes={"layers.9.weight": "bfloat16"}), tensors
        )
    assert list(tmp_path.iterdir()) == []


def test_meta_json_round_trip_and_digest() -> None:
    meta = tiny_meta(dtypes={"w": "float32"}, shapes={"w": (2, 3)}, checksums={"w": "0" * 64})
    values = json.loads(meta.to_json())
    digest = values.pop("digest")
    body = json.dumps(values, separators=(",", ":")).encode()
    assert digest == hashlib.sha256(body).hexdigest() == meta.digest
    assert Meta.from_json(meta.to_json()) == meta


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t.replace('"step":500', '"step":501'), "P303"),
        (lambda t: t.replace('"step":500', '"step": 500'), "P303"),
        (lambda t: t.replace('"step":500', '"step":1,"step":500'), "P303"),
        (lambda t: t.replace('"step":500', '"step":true'), "P306"),
        (lambda t: t.replace('"step":500', '"step":-1'), "P306"),
        (lambda t: t.replace('"step":500', '"step":NaN'), "P306"),
        (lambda t: t.replace('"step":500', '"step":500,"new":1'), "P306"),
        (lambda t: t.replace('"step":500,', ""), "P306"),
        (lambda t: t.replace("pippin-checkpoint", "other"), "P306"),
        (lambda t: t.replace('"version":1', '"version":2'), "P305"),
        (lambda t: t.replace('"version":1', '"version":"1"'), "P306"),
        (lambda t: "[" * 100_000, "P306"),
        (lambda t: "[1]", "P306"),
        (lambda t: "", "P306"),
    ],
)
def test_a_changed_meta_is_refused(change, code: str) -> None:
    with pytest.raises(PippinError) as caught:
        Meta.from_json(change(tiny_meta().to_json()))
    assert caught.value.code == code


def test_a_number_that_is_not_finite_is_refused_when_writing(tmp_path: Path) -> None:
    with pytest.raises(PippinError) as caught:
        write_tiny(tmp_path / "a.npz", loop={"best_val_loss": float("inf")})
    assert caught.value.code == "P001"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_initial_checkpoint_is_golden_and_survives_a_file(tmp_path: Path, suffix: str) -> None:
    config = tiny_config(train__seed=7)
    specs = param_specs(config.model)
    fresh = initial_checkpoint(config, specs, tokenizer={"sha256": "x"}, data={"seed": 7})
    assert (fresh.meta.step, fresh.meta.tokenizer, fresh.meta.data) == (
        0,
        {"sha256": "x"},
        {"seed": 7},
    )
    check_checkpoint(fresh, specs, slot_specs("muon", specs))
    total = hashlib.sha256()
    for name, array in contents(fresh):
        total.update(name.encode() + array.astype("<f4").tobytes())
    assert total.hexdigest() == GOLDEN_INITIAL
    stored = OPEN[suffix](WRITE[suffix](tmp_path / f"a{suffix}", fresh.meta, contents(fresh)))
    verify(stored)
    assert replace(stored.meta, checksums={}) == fresh.meta
    assert "step 0, 10,824 parameters" in meta_summary(stored.meta)


def test_check_lists_every_difference_at_once(tmp_path: Path) -> None:
    config = tiny_config()
    specs = param_specs(config.model)
    slots = slot_specs("muon", specs)
    tensors = {s.name: np.zeros(s.shape, np.float32) for s in specs}
    tensors |= {s.key: np.zeros(s.shape, np.float32) for s in slots}
    del tensors["norm.weight"], tensors["optim/momentum/layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = np.zeros((61, 24), np.float32)
    tensors["embed_tokens.weight"] = np.zeros((59, 24), np.float32)
    tensors["layers.0.mlp.up_proj.weight"] = np.zeros((40, 24), np.float16)
    tensors["ema/norm.weight"] = np.zeros(24, np.float32)
    ckpt = OPEN[".npz"](WRITE[".npz"](tmp_path / "a.npz", tiny_meta(), tensors.items()))
    with pytest.raises(PippinError) as caught:
        check_checkpoint(ckpt, specs, slots)
    assert caught.value.code == "P304"
    lines = caught.value.found.splitlines()
    expected = {
        "missing: norm.weight [24]",
        "missing: optim/momentum/layers.1.mlp.up_proj.weight [40, 24]",
        "unexpected: lm_head.weight [61, 24]",
        "unexpected: ema/norm.weight [24]",
        "embed_tokens.weight: found [59, 24] float32, needed [61, 24] float32",
        "layers.0.mlp.up_proj.weight: found [40, 24] float16, needed [40, 24] float32",
    }
    assert set(lines) == expected
    with pytest.raises(PippinError) as caught:
        check_checkpoint(ckpt, specs, None)
    assert len(caught.value.found.splitlines()) == 4, "state is ignored where none is asked for"


def test_missing_state_is_zeros_at_step_0_only(tmp_path: Path) -> None:
    config = tiny_config()
    specs = param_specs(config.model)
    slots = slot_specs("adamw", specs)
    weights = {s.name: np.zeros(s.shape, np.float32) for s in specs}
    fresh = OPEN[".pt"](WRITE[".pt"](tmp_path / "a.pt", tiny_meta(step=0), weights.items()))
    check_checkpoint(fresh, specs, slots)
    later = OPEN[".pt"](WRITE[".pt"](tmp_path / "b.pt", tiny_meta(step=1), weights.items()))
    check_checkpoint(later, specs, None)
    with pytest.raises(PippinError) as caught:
        check_checkpoint(later, specs, slots)
    assert caught.value.code == "P302"
    some = weights | {slots[0].key: np.zeros(slots[0].shape, np.float32)}
    partly = OPEN[".pt"](WRITE[".pt"](tmp_path / "c.pt", tiny_meta(step=0), some.items()))
    with pytest.raises(PippinError) as caught:
        check_checkpoint(partly, specs, slots)
    assert len(caught.value.found.splitlines()) == len(slots) - 1
