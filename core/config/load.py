"""From files, presets and flags to a draft of an experiment, with the source of every value.

`load` reads, checks every key and reports all problems at once. What is left "auto" is resolved by
`core.machine.resolve_auto`, and `build` then makes the `RunConfig`. No framework is imported.
"""

import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from core.config import rates, rules
from core.config.dialect_flags import translate_flags
from core.config.dialect_table import BLUEBERRY, MYPT, as_bool
from core.config.dialects import translate_file
from core.config.draft import AUTO, Draft, Source
from core.config.json_schema import SCHEMA_NAME
from core.config.nearest import did_you_mean, nearest_names, typing_errors
from core.config.presets import find_config
from core.config.schema import SECTIONS, RunConfig, is_auto_key, key_names
from core.config.yaml_text import key_lines, parse_yaml
from core.errors import PippinError, all_problems
from core.paths import CONFIGS_DIR

MAX_CONFIG_BYTES = 1_000_000
# What checkpoints from before there was such a key were made with.
IMPLICIT = {"data.sampling": "contiguous", "train.lr_router": 0.0}


def read_config_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Sections and line numbers of a configuration file (YAML or JSON).

    Raises:
        PippinError: P011 if it cannot be read or is not a mapping of sections.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise _unreadable(path, f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes.")
        text = path.read_text(encoding="utf-8-sig")
        data = parse_yaml(text)
        lines = key_lines(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise _unreadable(path, f"{path}{at}: {problem}.") from error
    except RecursionError as error:
        raise _unreadable(path, f"{path} cannot be read: it is nested too deeply.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, f"{path} cannot be read: {error}.") from error
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise _unreadable(path, f"{path} is not a mapping of sections.", choices=tuple(SECTIONS))
    if set(data) == {"config", "sources"} and isinstance(data["config"], dict):
        return data["config"], {}  # what --print-config --json wrote
    return data, lines


def _unreadable(path: Path, what: str, *, choices: Sequence[str] = ()) -> PippinError:
    return PippinError(
        "P011",
        what,
        choices=choices,
        remedy=f"mend {path}; an example of the form: {CONFIGS_DIR / 'quickstart.yaml'}",
        kept="nothing was started.",
    )


def parse_override(text: str) -> tuple[str, Any]:
    """`model.d_model=256` as (key, value); the value is read as YAML.

    Raises:
        PippinError: P012 if there is no `=` or the value is broken.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise PippinError(
            "P012",
            f"the argument {text!r} is neither a flag nor an override.",
            found="an override has the form section.key=value, for example train.lr=0.001",
        )
    try:
        return name.strip().replace("-", "_"), parse_yaml(value)
    except (yaml.YAMLError, RecursionError) as error:
        shown = value if len(value) <= 60 else value[:57] + "..."
        raise PippinError("P012", f"the value of {name} cannot be read: {shown!r}.") from error


def defaults() -> Draft:
    """Every key at its default; keys without one are "auto"."""
    draft = Draft()
    for name in key_names():
        section, _, key = name.partition(".")
        info = SECTIONS[section].model_fields[key]
        value = AUTO if info.is_required() else info.default
        draft.set(name, value, Source("default"))
    return draft


def load(
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
    foreign: Mapping[str, str] | None = None,
    locked: bool = False,
    note: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Draft:
    """Read a configuration and check all of it.

    Args:
        config: Preset name or path; None is the defaults alone.
        overrides: `section.key=value` texts; the last of a repeated key wins.
        flags: Dotted keys from first-class flags; they win over the file, and overrides over them.
        typed: How a flag was spelt, where it is not the key's last part.
        foreign: Flags of other projects, as typed; they win over the file too.
        locked: Whether the file defines the architecture, so that foreign flags of it are ignored.
        note: Told how each foreign name was read.
        warn: Told of each foreign flag that is ignored.

    Returns:
        A draft whose values have the right types; some may be "auto".

    Raises:
        PippinError: P010 with every problem, or P011, P012.
    """
    draft = defaults()
    problems: list[str] = []
    if config is not None:
        path = find_config(config)
        if config != path.stem and not Path(config).is_file():
            note(f"{config} is the preset {path.stem}, {path}")
        data, lines = read_config_file(path)
        is_preset = path.parent == CONFIGS_DIR
        reading = translate_file(data, lines, path)
        for text in reading.notes:
            note(text)
        problems += reading.problems
        _merge_file(
            draft, reading.data, reading.lines, path, is_preset=is_preset, problems=problems
        )
    old_lr = draft.values["train.lr"]
    for name, value in (flags or {}).items():
        where = (typed or {}).get(name, "--" + name.partition(".")[2])
        draft.set(name, value, Source("flag", where))
    stated = {**draft.values, **dict(map(parse_override, overrides))}
    made = translate_flags(foreign or {}, stated, locked=locked, note=note, warn=warn)
    for name, (flag, value) in made.items():
        if name in (flags or {}) and (flags or {})[name] != value:
            raise PippinError(
                "P012",
                f"{flag} and {draft.sources[name].where} both give {name}.",
                remedy="leave out one of them",
                kept="nothing was started.",
            )
        draft.set(name, value, Source("flag", flag))
    for text in overrides:
        name, value = parse_override(text)
        if name not in draft.values:
            problems.append(f"{text}: {_unknown(name)}")
            continue
        draft.set(name, value, Source("flag", text))
    problems += check(draft)
    if not problems and draft.sources["train.lr"].kind == "flag":
        problems += _follow_lr(draft, old_lr)
    if problems:
        raise all_problems(
            "P010",
            problems,
            what="the configuration has " + ("a problem:" if len(problems) == 1 else "problems:"),
            remedy=f"mend what is listed; every key with its range: {CONFIGS_DIR / SCHEMA_NAME}",
            kept="nothing was started.",
        )
    return draft


def _follow_lr(draft: Draft, file_lr: Any) -> list[str]:
    """Scale the group rates of the file or preset by the flag's `train.lr`; returns problems."""
    problem, old_lr = _check_value("train.lr", file_lr)
    if problem is not None:
        return [problem]
    given = {n for n, source in draft.sources.items() if source.kind == "flag"}
    rates.scale_rates(draft, old_lr=old_lr, given=given)
    return check(draft)


def _merge_file(
    draft: Draft,
    data: Mapping[str, Any],
    lines: Mapping[str, int],
    path: Path,
    *,
    is_preset: bool,
    problems: list[str],
) -> None:
    kind: Literal["preset", "file"] = "preset" if is_preset else "file"
    for section, body in data.items():
        at = f"{path}:{lines.get(section, 1)}"
        if section not in SECTIONS:
            near = nearest_names(section, SECTIONS)
            hint = did_you_mean(near) if near else f"; sections are {', '.join(SECTIONS)}."
            problems.append(f"{at}: unknown section {section}{hint}")
            continue
        if not isinstance(body, dict):
            problems.append(f"{at}: section {section} is not a mapping of keys.")
            continue
        for name, value in body.items():
            key = f"{section}.{name}"
            where = f"{path}:{lines.get(key, 1)}"
            if key not in draft.values:
                problems.append(f"{where}: {_unknown(key)}")
                continue
            draft.set(key, value, Source(kind, path.stem if is_preset else where))


def _unknown(key: str) -> str:
    section, _, tail = key.rpartition(".")
    if key in SECTIONS:
        examples = [k for k in key_names() if k.startswith(f"{key}.")][:3]
        return f"{key} is a section, not a key; its keys are {', '.join(examples)} and others."
    near = nearest_names(key, key_names())
    if not near or typing_errors(key, near[0]) > 1:
        near = _foreign(section, tail) or near
    if not near:
        near = [k for k in key_names() if k.rpartition(".")[2] == tail][:1]
    return f"unknown key {key}{did_you_mean(near)}"


def _foreign(section: str, tail: str) -> list[str]:
    """The key that another project's name means, or one with at most a typing error or two."""
    terms = {n: t for d in (BLUEBERRY, MYPT) for n, t in d.terms.items() if t.to}
    least = (len(tail) - 1) // 4
    if tail not in terms:
        distances = {n: typing_errors(tail, n, limit=least) for n in terms}
        terms = {n: t for n, t in terms.items() if distances[n] <= least}
        best = min((distances[n] for n in terms), default=0)
        terms = {n: t for n, t in terms.items() if distances[n] == best}
        # A section that was written is meant.
        if section in SECTIONS:
            terms = {n: t for n, t in terms.items() if t.to[0].startswith(f"{section}.")}
        return list(dict.fromkeys(t.to[0] for t in terms.values()))[:1]
    return [terms[tail].to[0]]


def check(draft: Draft) -> list[str]:
    """Every problem of a draft: types and ranges first, then what does not fit together.

    Numbers are brought to their declared type in place (an int for a float key).
    """
    problems = []
    bad = set()
    for name, value in draft.values.items():
        if draft.is_auto(name):
            continue
        problem, fixed = _check_value(name, value)
        if problem is None:
            draft.values[name] = fixed
        else:
            bad.add(name)
            problems.append(_where(draft, name) + problem)
    known = {k: v for k, v in draft.values.items() if k not in bad and not draft.is_auto(k)}
    problems += [_where(draft, name) + text for name, text in rules.contradictions(known)]
    return problems


def _where(draft: Draft, name: str) -> str:
    source = draft.sources[name]
    return f"{source.where}: " if source.where and source.kind != "preset" else ""


def _check_value(name: str, value: Any) -> tuple[str | None, Any]:
    section, _, key = name.partition(".")
    info = SECTIONS[section].model_fields[key]
    annotation: Any = info.annotation
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if annotation is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # 1e6 steps
    if annotation is bool and isinstance(value, str) and value.casefold() in ("true", "false"):
        value = as_bool(value)
    if annotation in (int, float) and isinstance(value, str):
        number = _number(value)
        if number is not None:
            return _check_value(name, number)
    try:
        return None, _adapter(name).validate_python(value)
    except ValidationError as error:
        detail = error.errors()[0]["msg"]
        detail = detail[0].lower() + detail[1:]
        expected = _expected(annotation, auto=is_auto_key(name))
        return f"{name} = {_shown(value)}: {detail}; expected {expected}.", None


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    """The check of one key's value; making it takes longer than using it."""
    section, _, key = name.partition(".")
    info = SECTIONS[section].model_fields[key]
    annotation: Any = info.annotation
    return TypeAdapter(
        typing.Annotated[annotation, info], config={"strict": True, "allow_inf_nan": False}
    )


def _number(text: str) -> int | float | None:
    """A quoted number, which the guides of other projects recommend."""
    value = parse_yaml(text) if re.fullmatch(r"[-+0-9.eE]{1,60}", text) else None
    return value if isinstance(value, (int, float)) else None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(annotation: Any, *, auto: bool) -> str:
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a string",
        dict[str, float]: "a mapping from folder to share",
    }
    origin = typing.get_origin(annotation)
    if origin is Literal:
        text = " or ".join(str(a) for a in typing.get_args(annotation))
    elif origin in (types.UnionType, typing.Union):
        parts = [a for a in typing.get_args(annotation) if a is not type(None)]
        text = " or ".join(names.get(a, str(a)) for a in parts) + " or null"
    else:
        text = names.get(annotation, str(annotation))
    return text + (" or auto" if auto else "")


def unresolved(draft: Draft) -> list[str]:
    """Keys that are still "auto"."""
    return [name for name in draft.values if draft.is_auto(name)]


def build(draft: Draft) -> RunConfig:
    """The resolved configuration.

    Raises:
        PippinError: P010 if keys are left "auto" or contradict each other.
    """
    left = unresolved(draft)
    if left:
        raise all_problems(
            "P010",
            [f"{name} has no value" for name in left],
            what="the configuration is not complete; nothing is automatic here:",
            remedy="give each key a value, or leave out --manual-config",
        )
    problems = check(draft)
    if problems:
        raise all_problems("P010", problems, what="the configuration has problems:")
    return RunConfig.model_validate(nested(draft.values.items()))


def nested(items: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dotted keys as sections."""
    out: dict[str, dict[str, Any]] = {s: {} for s in SECTIONS}
    for name, value in items:
        section, _, key = name.partition(".")
        out[section][key] = value
    return out


def from_resolved(data: Mapping[str, Any], where: str) -> Draft:
    """The draft of a saved, resolved configuration (a checkpoint's), to be overridden on resume."""
    draft = defaults()
    for key, value in IMPLICIT.items():
        draft.set(key, value, Source("checkpoint", where))
    for section, body in data.items():
        for name, value in body.items():
            key = f"{section}.{name}"
            if key in draft.values:
                draft.set(key, value, Source("checkpoint", where))
    return draft
