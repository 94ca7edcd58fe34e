"""Convert a checkpoint: .npz for MLX, .pt for MPS, CUDA and CPU; the suffix decides.

Weights, optimizer state and meta are carried over bit by bit, so a run goes on with the other
framework: `python convert.py checkpoints/stories-1 stories-1.pt`. Only a .pt needs torch; MLX is
never needed.
"""

import sys

from core.environment import use_environment

if __name__ == "__main__":
    use_environment()

import argparse
import contextlib
import difflib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import checkpoint_format
from core.checkpoint import (
    Checkpoint,
    Meta,
    is_intact,
    is_parameter,
    meta_summary,
    newest_valid,
    with_intact,
)
from core.checkpoint.atomic import publish, temporary_path
from core.cli import guarded, make_parser
from core.errors import PippinError
from core.paths import TOKENIZER_FILES, is_safe_name


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; flags take dashes or underscores and no abbreviations.

    Raises:
        PippinError: P012 for a wrong command line.
    """
    parser = make_parser("convert.py", __doc__)
    add = parser.add_argument
    add("src", metavar="SRC", help="a checkpoint, a run folder or a run's name (its newest one)")
    add("dst", metavar="DST", type=Path, help="the new file, .npz or .pt")
    add(
        *("--weights-only", "--weights_only"),
        action="store_true",
        help="leave optimizer state out; such a file generates text but cannot be resumed",
    )
    add("--overwrite", action="store_true", help="replace DST if it exists")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def find_source(text: str) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint meant by a path, a run folder, or the name of a run below ./checkpoints.

    Returns:
        Its path, and a line for each newer checkpoint of the folder that is damaged.

    Raises:
        PippinError: P302 if there is none.
    """
    runs = Path("checkpoints")
    path = Path(text)
    if not path.exists() and is_safe_name(text):
        path = runs / text
    if path.is_file():
        return path, ()
    found = newest_valid(path, _open)
    if found is None:
        names = sorted(p.name for p in runs.iterdir() if p.is_dir()) if runs.is_dir() else []
        near = difflib.get_close_matches(text, names, 8, 0.0)
        reason = (
            f"the folder {path} holds no checkpoint."
            if path.is_dir()
            else f"{text} is no file, no folder, and no run below ./checkpoints."
        )
        remedy = f"python convert.py {shlex.quote(near[0])} NEW_FILE" if near else "python train.py"
        raise PippinError("P302", reason, choices=near, remedy=remedy, kept="nothing was written.")
    return found


def _open(path: Path) -> Checkpoint:
    return checkpoint_format(path.suffix).open(path)


def check_destination(src: Path, dst: Path, *, overwrite: bool) -> None:
    """Refuse a destination that is the source, a folder, or there already; make its folder.

    Raises:
        PippinError: P307.
    """
    problem, remedy = "", "name another DST"
    if dst.is_dir():
        problem = "is a folder; DST is a file name with .npz or .pt"
    elif dst.exists() and dst.samefile(src):
        problem = "is the file that is read"
    elif dst.exists() and not overwrite:
        problem, remedy = "exists", "add --overwrite to replace it, or name another DST"
    if problem:
        raise PippinError("P307", f"{dst} {problem}.", remedy=remedy, kept="nothing was written.")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PippinError(
            "P307", f"{dst.parent} cannot be made: {error.strerror}.", kept="nothing was written."
        ) from error


def largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest absolute difference of two stored tensors; 0 means that every bit is equal."""
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return 0.0
    if a.dtype != b.dtype or a.shape != b.shape:
        return float("inf")
    if a.dtype == np.uint16:
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    gap = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
    # Bits differ, so a difference of 0 or NaN (signed zeros, NaN) must not pass for equal.
    return gap if gap > 0 else float("inf")


def convert(src: Path, dst: Path, *, weights_only: bool, overwrite: bool) -> list[str]:
    """Convert one file, read the result again, and describe it.

    Raises:
        PippinError: P303, P305, P306 for the source, P306, P307, P501 for the destination.
    """
    target = checkpoint_format(dst.suffix)
    source = checkpoint_format(src.suffix).open(src)
    copy = temporary_path(dst)
    try:
        check_destination(src, dst, overwrite=overwrite)
        names = [n for n in source.names if is_parameter(n) or not weights_only]
        kind = "weights" if weights_only else source.meta.kind
        try:
            target.write(copy, replace(source.meta, kind=kind), _tensors(source, names))
        except PippinError as error:
            error.what = error.what.replace(str(copy), str(dst))
            raise
        written = target.open(copy)
        try:
            gap = max(largest_difference(source.read(n), written.read(n)) for n in names)
            lines = _report(src, dst, written, copy.stat().st_size, gap)
        finally:
            written.close()
        if gap != 0:
            raise PippinError(
                "P303",
                f"the copy of {src} differs from it by {gap}.",
                remedy="check the disk, and convert again",
                kept=f"{dst} was not written.",
            )
        publish(copy, dst)
    finally:
        source.close()
        with contextlib.suppress(OSError):  # where DST cannot be, there is no copy either
            copy.unlink()
    return lines


def _tensors(ckpt: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in names:
        yield name, ckpt.read(name)


def _report(src: Path, dst: Path, written: Checkpoint, num_bytes: int, gap: float) -> list[str]:
    state = sum(not is_parameter(n) for n in written.names)
    return [
        f"{src} -> {dst}",
        f"  {meta_summary(written.meta)}",
        f"  {num_bytes:,} bytes, {len(written.names)} tensors, {state} of the optimizer",
        f"  read again and compared: largest difference {gap:g}",
        f"next  python {_next_command(src, dst, written.meta, state)}",
    ]


def _next_command(src: Path, dst: Path, meta: Meta, state: int) -> str:
    """What works with the new file: going on where it can, else writing text."""
    shown, total = shlex.quote(str(dst)), meta.config.get("train", {}).get("total_steps")
    if state == 0 and not (meta.step == 0 and meta.kind == "full"):
        has_own, source_has = (
            any((folder / name).is_file() for name in TOKENIZER_FILES)
            for folder in (dst.parent, src.parent)
        )
        beside = shlex.quote(str(src.parent))
        where = f" --tokenizer {beside}" if source_has and not has_own else ""
        return f"generate.py --checkpoint {shown}{where}"
    finished = total is not None and meta.step >= total
    more = f" train.total_steps={2 * total}" if finished else ""
    return f"train.py --resume {shown}{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = sys.argv[1:] if argv is None else list(argv)

    def run() -> int:
        options = parse_args(args)
        checkpoint_format(options.dst.suffix)
        src, skipped = find_source(options.src)
        for line in skipped:
            print(f"! {line}", file=sys.stderr)
        try:
            lines = convert(
                src, options.dst, weights_only=options.weights_only, overwrite=options.overwrite
            )
        except PippinError as error:
            if error.code != "P303" or is_intact(src, _open):
                raise
            command = f"python convert.py {{}} {shlex.quote(str(options.dst))}"
            raise with_intact(error, src, _open, command) from error
        print("\n".join(lines))
        return 0

    return guarded(run, debug="--debug" in args, aborted="aborted; nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
