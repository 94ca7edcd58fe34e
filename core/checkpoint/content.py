"""The content of a checkpoint against the parameter table, and the checkpoint of a fresh start."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from core.checkpoint.meta import Checkpoint, Meta, is_parameter
from core.config.schema import RunConfig
from core.errors import PippinError, all_problems
from core.params import ParamSpec, SlotSpec, initial_values


class InitialCheckpoint:
    """Step 0 in memory: every tensor is drawn when it is read, the same bits on every machine."""

    def __init__(self, meta: Meta, specs: Sequence[ParamSpec], seed: int) -> None:
        self.meta = meta
        self.names = tuple(spec.name for spec in specs)
        self._specs = {spec.name: spec for spec in specs}
        self._seed = seed

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._specs[name].shape

    def dtype(self, name: str) -> str:
        """Storage dtype of a tensor."""
        return self._specs[name].dtype

    def read(self, name: str) -> NDArray[Any]:
        """Draw the initial values of a tensor."""
        return initial_values(self._specs[name], self._seed)

    def close(self) -> None:
        """Nothing is held."""


def initial_checkpoint(
    config: RunConfig,
    specs: Sequence[ParamSpec],
    *,
    tokenizer: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The checkpoint of a fresh start: no optimizer state, checksums left to the writer."""
    dump = config.model_dump(mode="json")
    meta = Meta(
        step=0,
        tokens_seen=0,
        model=dump["model"],
        config=dump,
        tokenizer=dict(tokenizer or {}),
        data=dict(data or {}),
        optimizer=config.train.optimizer,
        loop={},
        dtypes={spec.name: spec.dtype for spec in specs},
        shapes={spec.name: spec.shape for spec in specs},
    )
    return InitialCheckpoint(meta, specs, config.train.seed)


def check_checkpoint(
    ckpt: Checkpoint, specs: Sequence[ParamSpec], slots: Sequence[SlotSpec] | None
) -> None:
    """Compare names, shapes and dtypes with the tables; every difference is reported at once.

    Args:
        ckpt: An open checkpoint.
        specs: The parameter table of the model.
        slots: Optimizer and averaged state that must be there, or None to ignore such state. A
            checkpoint of step 0 may have none: missing state means zeros at step 0 only.

    Raises:
        PippinError: P304 for differences, P302 where state is needed and the file has none.
    """
    wanted = {s.name: (s.shape, s.dtype) for s in specs}
    present = set(ckpt.names)
    has_state = not all(is_parameter(name) for name in ckpt.names)
    if slots is None:
        present = {name for name in present if is_parameter(name)}
    elif has_state:
        wanted |= {s.key: (s.shape, s.dtype) for s in slots}
    problems = [
        f"missing: {name} {list(wanted[name][0])}" for name in wanted if name not in present
    ]
    for name in ckpt.names:
        if name not in present:
            continue
        found = (ckpt.shape(name), ckpt.dtype(name))
        if name not in wanted:
            problems.append(f"unexpected: {name} {list(found[0])}")
        elif found != wanted[name]:
            problems.append(f"{name}: found {_text(found)}, needed {_text(wanted[name])}")
    if problems:
        raise all_problems(
            "P304",
            problems,
            what=f"the checkpoint of step {ckpt.meta.step} (optimizer {ckpt.meta.optimizer}) is "
            f"not of this model; differences: {len(problems)}.",
            remedy="use the configuration that it was trained with (config.json beside it)",
        )
    if slots and not has_state and ckpt.meta.step > 0:
        raise PippinError(
            "P302",
            f"the checkpoint of step {ckpt.meta.step} has no optimizer state to resume from.",
            found=f"kind {ckpt.meta.kind!r}; needed {len(slots)} tensors optim/...",
            remedy="resume from the training checkpoint that it was made of",
        )


def _text(found: tuple[tuple[int, ...], str]) -> str:
    return f"{list(found[0])} {found[1]}"


def verify(ckpt: Checkpoint) -> None:
    """Read every tensor, so that every checksum is compared.

    Raises:
        PippinError: P303 naming the damaged tensor.
    """
    for name in ckpt.names:
        ckpt.read(name)
