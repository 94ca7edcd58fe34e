"""Flags of other projects' train.py, translated by the same table as their files.

Next to `--config_file`, MyPT's way, flags of the architecture are ignored with a warning: the file
defines the model. Next to `--config`, Blueberry's way, they win.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from core.config.dialect_table import (
    BLUEBERRY,
    MYPT,
    Term,
    Values,
    as_bool,
    told,
    typed_device,
)
from core.config.yaml_text import parse_yaml
from core.errors import PippinError

NUM_EXPERTS = 8


@dataclass(frozen=True)
class Flag:
    """One flag of another project; `switch` takes no value."""

    term: Term
    what: str
    switch: bool = False


def _model_type(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    if value == "standard":
        return {"model.n_experts": 0}, ""
    if value != "moe":
        raise PippinError(
            "P012",
            f"--model-type is {value!r}.",
            choices=("standard", "moe"),
            kept="nothing was started.",
        )
    if near.get("num_experts") is not None or near.get("model.n_experts"):
        return {}, "as many experts as are given"
    return {"model.n_experts": NUM_EXPERTS}, "Blueberry's number"


def _num_experts(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    if near.get("model_type") == "standard":
        return {}, "left out: --model-type standard has no experts"
    return {"model.n_experts": value}, ""


def _amp_off(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    return {"train.precision": "float32"}, ""


def _fp8_off(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    return {}, "nothing here is in FP8, so there is nothing to turn off"


def _flag(dialect: Any, name: str, what: str) -> Flag:
    return Flag(dialect.terms[name], what)


FLAGS: Mapping[str, Flag] = {
    "n_layer": _flag(MYPT, "n_layer", "layers"),
    "n_head": _flag(MYPT, "n_head", "heads"),
    "n_embd": _flag(MYPT, "n_embd", "width"),
    "block_size": _flag(MYPT, "block_size", "context"),
    "dropout": _flag(MYPT, "dropout", "dropout"),
    "bias": _flag(MYPT, "bias", "no layer has one here"),
    "vocab_size": _flag(MYPT, "vocab_size", "vocabulary"),
    "tokenization": _flag(MYPT, "tokenization", "tokenizer"),
    "max_iters": _flag(MYPT, "max_iters", "steps in all"),
    "learning_rate": _flag(MYPT, "learning_rate", "as --lr"),
    "eval_interval": _flag(MYPT, "eval_interval", "steps between validations"),
    "eval_iters": _flag(MYPT, "eval_iters", "batches of one validation"),
    "warmup_iters": _flag(MYPT, "warmup_iters", "steps of warm-up, or a share"),
    "weight_decay": _flag(MYPT, "weight_decay", "weight decay"),
    "grad_clip": _flag(MYPT, "grad_clip", "clip of the gradient norm"),
    "use_amp": _flag(MYPT, "use_amp", "False is float32"),
    "device": Flag(Term(make=typed_device), "as --backend"),
    "d_model": _flag(BLUEBERRY, "d_model", "width"),
    "n_layers": _flag(BLUEBERRY, "n_layers", "layers"),
    "n_heads": _flag(BLUEBERRY, "n_heads", "heads"),
    "d_ff": _flag(BLUEBERRY, "d_ff", "width of the MLP"),
    "max_seq_len": _flag(BLUEBERRY, "max_seq_len", "context"),
    "batch_size": _flag(BLUEBERRY, "batch_size", "as --micro-batch-size"),
    "model_type": Flag(Term(make=_model_type, architecture=True), "standard or moe"),
    "num_experts": Flag(Term(make=_num_experts, architecture=True), "experts of a block"),
    "num_documents": _flag(BLUEBERRY, "num_documents", "stories to train on"),
    "max_tokens": _flag(BLUEBERRY, "max_tokens", "tokens of stories to train on"),
    "no_amp": Flag(Term(make=_amp_off), "float32", switch=True),
    "no_fp8": Flag(Term(make=_fp8_off), "nothing is in FP8 here", switch=True),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag to a parser, in a group of its own. Values are texts, read as YAML later."""
    group = parser.add_argument_group("names of other projects (MyPT, Blueberry), translated")
    for name, flag in FLAGS.items():
        if flag.switch:
            group.add_argument(f"--{name}", action="store_const", const="true", help=flag.what)
        else:
            group.add_argument(f"--{name}", metavar="X", help=flag.what)


def given_flags(args: argparse.Namespace) -> dict[str, str]:
    """The flags of the table that were typed, as texts."""
    return {n: str(v) for n in FLAGS if (v := getattr(args, n, None)) is not None}


def translate_flags(
    given: Mapping[str, str],
    values: Mapping[str, Any],
    *,
    locked: bool,
    note: Callable[[str], None],
    warn: Callable[[str], None],
) -> dict[str, tuple[str, Any]]:
    """Keys and values of flags, each with the flag it came from.

    Args:
        given: Flags as typed, without dashes in front.
        values: Every key as defaults, file and Pippin's own flags have it.
        locked: Whether a file defines the architecture (`--config_file`).
        note: Told how each was read.
        warn: Told of each that is ignored.

    Raises:
        PippinError: P012 for a value that cannot be read or a flag that cannot be followed.
    """
    out: dict[str, tuple[str, Any]] = {}
    parsed = {name: _parsed(name, text) for name, text in given.items()}
    stated = dict(values)
    for name in [n for n in given if locked and FLAGS[n].term.architecture]:
        value = parsed.pop(name)
        now = ", ".join(f"{k} = {values[k]}" for k in _touched(FLAGS[name].term, value, stated))
        warn(
            f"--{name} {given[name]} is ignored next to --config_file, which defines the model"
            + (f" ({now})" if now else "")
            + "; next to --config flags win"
        )
    # Flags that others are computed from come first.
    for name in sorted(parsed, key=lambda n: FLAGS[n].term.make is not None):
        flag, shown = FLAGS[name], "--" + name
        if flag.switch and as_bool(parsed[name]) is False:
            continue
        made, why = flag.term.read(parsed[name], {**stated, **parsed})
        for key, value in made.items():
            if flag.term.to and key in out and out[key][1] != value:
                raise PippinError(
                    "P012",
                    f"{out[key][0]} and {shown} both give {key}.",
                    remedy="leave out one of them",
                    kept="nothing was started.",
                )
            out[key] = (shown, value)
            stated[key] = value
        note(told(shown, given[name] if not flag.switch else "", made, why))
    return out


def _touched(term: Term, value: Any, near: Mapping[str, Any]) -> Values:
    try:
        return term.read(value, near)[0]
    except PippinError:
        return {}


def _parsed(name: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise PippinError(
            "P012",
            f"the value of --{name} cannot be read: {shown!r}.",
            found="it is read as YAML: a text with brackets or colons stands in quotes of its own",
            kept="nothing was started.",
        ) from error
