"""A trained model from a run folder or a checkpoint file: everything else is found from there.

The checkpoint holds its configuration and its tokenizer's fingerprint; the tokenizer lies beside
it, or in a run below `./checkpoints` for a checkpoint that was moved or converted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.backend import Backend, CreateBackend
from core.checkpoint import Checkpoint, OpenCheckpoint, list_checkpoints, step_of, with_intact
from core.config.load import build, from_resolved
from core.config.schema import Precision, RunConfig
from core.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from core.errors import PippinError
from core.params import param_specs
from core.paths import BEST_FILES

# What a file can be that another one of its folder makes up for.
PASSED_OVER = ("P303", "P304", "P305", "P306")


@dataclass(frozen=True)
class Model:
    """A model that can write.

    Attributes:
        backend: Backend with the weights loaded.
        tokenizer: Its tokenizer.
        config: The resolved configuration it runs with.
        checkpoint: File of the weights.
        step: Optimizer steps they were trained for.
        notes: One line for each newer file that was damaged and passed over.
    """

    backend: Backend
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path
    step: int
    notes: tuple[str, ...]


def checkpoint_candidates(path: Path, open_checkpoint: OpenCheckpoint) -> tuple[Path, ...]:
    """Files to try: a file itself, or a run folder's best, then its steps from the newest.

    Raises:
        PippinError: P302 for a folder without a checkpoint.
    """
    if not path.is_dir():
        return (path,)
    best = [path / name for name in BEST_FILES if (path / name).is_file()]
    # Both are there where a run that went on with another framework was cut short: a later best is
    # the better one. Times of files say nothing, a copy of a folder changes them.
    best.sort(key=lambda p: step_of(p, open_checkpoint) or 0, reverse=True)
    found = (*best, *list_checkpoints(path))
    if not found:
        raise PippinError(
            "P302",
            f"the run folder {path} holds no checkpoint yet.",
            found=f"looked for {', '.join(BEST_FILES)} and step_NNNNNN.npz or .pt",
            remedy="wait until the run saves its first one",
        )
    return found


def load_model(
    candidates: Sequence[Path],
    *,
    open_checkpoint: OpenCheckpoint,
    create: CreateBackend,
    backend_name: str,
    precision: Precision | None = None,
    tokenizer_path: Path | None = None,
    runs_dir: Path = Path("checkpoints"),
) -> Model:
    """Load the first intact checkpoint for inference.

    Args:
        candidates: Files in the order in which they are tried; those that cannot be read are passed over.
        open_checkpoint: Opens a checkpoint of either suffix.
        create: The backend's `create`.
        backend_name: Name of that backend.
        precision: Compute dtype; by default the one the model was trained with.
        tokenizer_path: Tokenizer file or folder; by default it is found.
        runs_dir: Where runs lie, searched for the tokenizer of a checkpoint that was moved.

    Raises:
        PippinError: P303 to P306 if none can be read, P301 if the tokenizer is another one or missing.
    """
    notes: list[str] = []
    for path in candidates:
        try:
            ckpt = open_checkpoint(path)
            try:
                config = _inference_config(ckpt, path, backend_name, precision)
                tokenizer = _tokenizer_of(ckpt, path, tokenizer_path, runs_dir)
                backend = _loaded(ckpt, config, create)
            finally:
                ckpt.close()
        except PippinError as error:
            if error.code not in PASSED_OVER:
                raise
            if len(candidates) == 1:
                command = "python generate.py --checkpoint {}"
                raise with_intact(error, path, open_checkpoint, command) from error
            reason = " ".join([error.what, *error.found.splitlines()])
            notes.append(f"{path.name} was passed over: {error.code} {reason}")
            continue
        return Model(backend, tokenizer, config, path, ckpt.meta.step, tuple(notes))
    raise PippinError(
        "P303",
        f"no checkpoint in {candidates[0].parent} can be read.",
        found="\n".join(notes),
        remedy="put back a copy of one, or another run: python generate.py --model_name RUN",
        kept="nothing was changed.",
    )


def _loaded(ckpt: Checkpoint, config: RunConfig, create: CreateBackend) -> Backend:
    backend = create(config, param_specs(config.model), mode="infer")
    try:
        backend.load(ckpt, optimizer=False)
    except BaseException:
        backend.close()
        raise
    return backend


def _inference_config(
    ckpt: Checkpoint, path: Path, backend_name: str, precision: Precision | None
) -> RunConfig:
    """The checkpoint's configuration on this backend; compiling is for training's fixed shapes."""
    config = build(from_resolved(ckpt.meta.config, str(path)))
    changes: dict[str, object] = {"backend": backend_name, "compile": False}
    if precision is not None:
        changes["precision"] = precision
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _tokenizer_of(ckpt: Checkpoint, path: Path, given: Path | None, runs_dir: Path) -> Tokenizer:
    wanted = ckpt.meta.tokenizer.get("sha256")
    found: list[str] = []
    for place in (given,) if given is not None else _tokenizer_places(path, runs_dir):
        try:
            tokenizer = load_tokenizer(place)
        except PippinError as error:
            if given is not None:
                raise
            if place == path.parent:
                found.append(error.what)
            continue
        if tokenizer.fingerprint == wanted:
            return tokenizer
        if given is not None or place == path.parent:
            size = f"{tokenizer.vocab_size:,} ids"
            found.append(f"{place} has sha256 {tokenizer.fingerprint[:12]}... ({size})")
    size = ckpt.meta.tokenizer.get("vocab_size", "?")
    raise PippinError(
        "P301",
        f"the tokenizer of {path} is not here.",
        found="\n".join([f"it was trained with sha256 {str(wanted)[:12]}... ({size} ids)", *found]),
        remedy="--tokenizer PATH   (it lies in the run folder in which the model was trained)",
    )


def _tokenizer_places(path: Path, runs_dir: Path) -> Iterator[Path]:
    yield path.parent
    if runs_dir.is_dir():
        yield from sorted(p for p in runs_dir.iterdir() if p.is_dir() and p != path.parent)
