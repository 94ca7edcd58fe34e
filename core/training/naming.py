"""What the names of other projects mean for a run: its file, its folder, and whether it goes on."""

import shlex
from dataclasses import replace
from pathlib import Path

from core.checkpoint import list_checkpoints
from core.errors import PippinError
from core.paths import is_safe_name
from core.training.console import Console
from core.training.options import Options
from core.training.runfolder import RUNS_DIR

# Presets of Blueberry, whose --max-steps counts something else.
OF_BLUEBERRY = ("dev", "moe", "rtx4090", "rtx5090")


def settle(options: Options, console: Console) -> Options:
    """The options with `--config_file`, `--resume-from` and `--model_name` as Pippin's own.

    `--model_name NAME` is the run folder checkpoints/NAME. A run that is there goes on, as MyPT does,
    and that is said; `--overwrite` begins it anew.

    Raises:
        PippinError: P012 for two flags that say two things, or a name that is none.
    """
    options = own_names(options)
    if options.max_steps is not None and options.config in OF_BLUEBERRY:
        console.fact(
            "length",
            f"--max-steps {options.max_steps} counts the optimizer's steps; Blueberry counts forward "
            "passes, several of which are one step",
        )
    name = options.model_name
    if name is None:
        return options
    if not is_safe_name(name):
        raise PippinError(
            "P012",
            f"--model_name {name!r} cannot be a folder's name.",
            found="letters, digits, . _ - and not more than 64 of them, a letter or digit first",
            kept="nothing was started.",
        )
    folder = RUNS_DIR / name
    if options.save_dir is not None and Path(options.save_dir).resolve() != folder.resolve():
        raise PippinError(
            "P012",
            f"--model_name {name} is the folder {folder}, and --save-dir is {options.save_dir}.",
            remedy="leave out one of them",
            kept="nothing was started.",
        )
    if options.resume is not None:
        if options.resume == "":
            return replace(options, resume=str(folder), model_name=None)
        raise PippinError(
            "P012",
            f"--model_name {name} goes on with the run of that name, and --resume names another.",
            remedy="leave out one of them",
            kept="nothing was started.",
        )
    if list_checkpoints(folder) and not options.overwrite:
        console.fact("resume", f"{folder} holds a run, so it goes on; --overwrite begins it anew")
        return replace(options, resume=str(folder), model_name=None)
    console.fact("run", f"--model_name {name}: a new run in {folder}")
    flag = f"--model_name {name}"
    return replace(options, save_dir=str(folder), save_dir_flag=flag, model_name=None)


def own_names(options: Options) -> Options:
    """The options with `--config_file` and `--resume-from` as `--config` and `--resume`.

    Raises:
        PippinError: P012 where both of a pair are given.
    """
    options = _one(options, "config_file", "config")
    return _one(options, "resume_from", "resume")


def _one(options: Options, foreign: str, own: str) -> Options:
    """Give the foreign flag's value to our own flag."""
    value, mine = getattr(options, foreign), getattr(options, own)
    if "" in (value, mine) and own == "config":
        raise PippinError(
            "P012",
            f"--{foreign if value == '' else own} has no value.",
            remedy="python tools/show_configs.py   (every preset)",
            kept="nothing was started.",
        )
    if value is None:
        return options
    if mine is not None:
        flags = [
            f"--{name.replace('_', '-')} {shlex.quote(v)}"
            for name, v in ((foreign, value), (own, mine))
        ]
        raise PippinError(
            "P012",
            f"{flags[0]} and {flags[1]} say the same thing twice.",
            remedy="leave out one of them",
            kept="nothing was started.",
        )
    locked = options.locked or foreign == "config_file"
    return replace(options, **{own: value, foreign: None, "locked": locked})
