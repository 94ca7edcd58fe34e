"""The meta of a checkpoint: everything but the tensors, as JSON that guards itself.

The JSON is canonical: compact, ASCII, fields in the order of `Meta`, its own sha256 last. Reading
writes it again and compares, so that no changed bit, repeated key or unknown field passes.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import EXIT_FAULT, PippinError

FORMAT = "pippin-checkpoint"
VERSION = 1
# 100 times the meta of a 100-layer model; what is larger is not read into memory.
MAX_META_BYTES = 32 << 20
# Storage dtype -> numpy dtype of what `read` returns; numpy has no bfloat16, so its bits travel.
DTYPES: dict[str, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
TENSOR_NAME = re.compile(r"(optim/[a-z0-9_]+/|ema/)?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z", re.ASCII)
_MAX_NAME = 256
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself.

    The writer fills `dtypes`, `shapes` and `checksums` from the tensors, in their order. Numbers
    must be finite: "no best yet" is None.

    Attributes:
        step: Optimizer steps done; 0 is a fresh initialisation.
        tokens_seen: Trained tokens so far.
        model: Section `model` of the resolved configuration.
        config: The whole resolved configuration.
        tokenizer: `sha256` and `vocab_size` of the tokenizer.
        data: `manifest_sha256` of the shards, and the `seed`.
        optimizer: "muon" or "adamw".
        loop: `best_val_loss`, `best_step`, whatever else the loop must remember.
        backend: `name`, `framework`, `version` of the backend that trained it.
        backend_state: Loss scaler and skip counters.
        dtypes: Tensor name -> key of `DTYPES`.
        checksums: Tensor name -> sha256 of its little-endian C-order bytes, equal in both formats.
        kind: "full"; "weights" without optimizer state, which cannot be resumed; "adapter".
        format: Always `FORMAT`.
        version: Format version.
        shapes: Tensor name -> shape.
    """

    step: int
    tokens_seen: int
    model: dict[str, Any]
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    data: dict[str, Any]
    optimizer: str
    loop: dict[str, Any]
    backend: dict[str, Any] = field(default_factory=dict)
    backend_state: dict[str, float] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    kind: str = "full"
    format: str = FORMAT
    version: int = VERSION
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def _canonical(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            return json.dumps(values, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PippinError(
                "P001", f"the meta of a checkpoint is not JSON: {error}.", exit_code=EXIT_FAULT
            ) from error

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON without the digest itself."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON, ASCII, with the digest as its last field."""
        body = self._canonical()
        digest = hashlib.sha256(body.encode()).hexdigest()
        return f'{body[:-1]},"digest":"{digest}"}}'

    @classmethod
    def from_json(cls, text: str, *, source: str = "the checkpoint") -> "Meta":
        """Parse and check; `source` names the file in messages.

        Raises:
            PippinError: P306 if it is no meta, P305 if newer, P303 if its digest does not fit.
        """
        values = _parse(text, source)
        if values.get("format") != FORMAT:
            raise _not_ours(source, f"format is {values.get('format')!r}, not {FORMAT!r}")
        version = values.get("version")
        if type(version) is not int or version < 1:
            raise _not_ours(source, f"version is {version!r}")
        if version > VERSION:
            raise PippinError(
                "P305",
                f"{source} has format version {version}.",
                found=f"this Pippin reads versions up to {VERSION}.",
                remedy="update Pippin (git pull), then run the same command",
                kept="nothing was changed.",
            )
        digest = values.pop("digest", None)
        problems = _field_problems(values)
        if problems:
            raise _not_ours(source, "\n".join(problems))
        values["shapes"] = {name: tuple(s) for name, s in values["shapes"].items()}
        meta = cls(**values)
        # Comparing the text, not the digest alone, also refuses repeated keys and odd spacing.
        if digest != meta.digest or text != meta.to_json():
            raise PippinError(
                "P303",
                f"the meta of {source} is damaged: it does not fit its digest.",
                found=f"digest in the file {digest!r}, computed {meta.digest}",
                remedy="use an older checkpoint of the run",
            )
        return meta


def _parse(text: str, source: str) -> dict[str, Any]:
    if len(text) > MAX_META_BYTES:
        raise _not_ours(source, f"its meta is {len(text)} bytes, more than {MAX_META_BYTES}")
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _not_ours(source, f"its meta is not JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise _not_ours(source, f"its meta is a JSON {type(values).__name__}, not an object")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _not_ours(source: str, found: str) -> PippinError:
    return PippinError("P306", f"{source} is not a Pippin checkpoint.", found=found)


def _field_problems(values: Mapping[str, Any]) -> list[str]:
    wanted = {f.name: f for f in fields(Meta)}
    problems = [f"meta.{name} is missing" for name in wanted if name not in values]
    problems += [f"meta.{name} is unknown" for name in values if name not in wanted]
    if problems:
        return problems
    for name in ("step", "tokens_seen"):
        if type(values[name]) is not int or values[name] < 0:
            problems.append(f"meta.{name} is {values[name]!r}, not a count")
    for name in ("optimizer", "kind"):
        if not isinstance(values[name], str):
            problems.append(f"meta.{name} is not a string")
    mappings = ("model", "config", "tokenizer", "data", "loop", "backend", "backend_state")
    tables = ("dtypes", "checksums", "shapes")
    problems += [f"meta.{n} is no object" for n in mappings + tables if type(values[n]) is not dict]
    return problems or _table_problems(values)


def _table_problems(values: Mapping[str, Any]) -> list[str]:
    names = list(values["shapes"])
    if list(values["dtypes"]) != names or list(values["checksums"]) != names:
        return ["meta.dtypes, meta.checksums and meta.shapes name different tensors"]
    problems = [
        f"meta.backend_state.{key} is no number"
        for key, value in values["backend_state"].items()
        if type(value) not in (int, float)
    ]
    for name in names:
        shape = values["shapes"][name]
        if len(name) > _MAX_NAME or not TENSOR_NAME.match(name):
            problems.append(f"tensor name {name[:80]!r} is not allowed")
        elif type(shape) is not list or any(type(n) is not int or n < 0 for n in shape):
            problems.append(f"{name}: shape {shape!r}")
        elif not isinstance(values["dtypes"][name], str) or values["dtypes"][name] not in DTYPES:
            problems.append(f"{name}: dtype {values['dtypes'][name]!r}")
        elif not isinstance(values["checksums"][name], str) or not _SHA256.match(
            values["checksums"][name]
        ):
            problems.append(f"{name}: checksum {values['checksums'][name]!r}")
    return problems


class Checkpoint(Protocol):
    """An open checkpoint, of either suffix, or a fresh initialisation in memory."""

    @property
    def meta(self) -> Meta:
        """Everything but the tensors."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names: canonical parameters, `optim/<slot>/<param>`, `ema/<param>`."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> str:
        """A key of `DTYPES`."""
        ...

    def read(self, name: str) -> NDArray[Any]:
        """A fresh array, checksum verified; bfloat16 as its bits in uint16.

        Raises:
            PippinError: P303 if the tensor is damaged.
        """
        ...

    def close(self) -> None:
        """Give back the file."""
        ...


OpenCheckpoint = Callable[[Path], Checkpoint]


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a stored tensor."""
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def is_parameter(name: str) -> bool:
    """Whether a tensor is a weight, not optimizer or averaged state."""
    return not name.startswith(("optim/", "ema/"))


def meta_summary(meta: Meta) -> str:
    """One line for people: step, parameters, tokens, who wrote it, the best validation loss."""
    params = sum(math.prod(s) for name, s in meta.shapes.items() if is_parameter(name))
    parts = [f"step {meta.step}", f"{params:,} parameters", f"{meta.tokens_seen:,} tokens seen"]
    state = any(not is_parameter(name) for name in meta.shapes)
    parts.append(f"{meta.optimizer} state" if state else "no optimizer state")
    if meta.backend:
        words = (meta.backend.get(key) for key in ("name", "framework", "version"))
        parts.append("trained by " + " ".join(str(w) for w in words if w))
    best = meta.loop.get("best_val_loss")
    if isinstance(best, (int, float)):
        parts.append(f"best val loss {best:.4f} at step {meta.loop.get('best_step')}")
    return ", ".join(parts)
