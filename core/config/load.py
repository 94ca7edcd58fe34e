"""From files, presets and flags to a draft of an experiment, with the source of every value.

`load` reads, checks every key and reports all problems at once. What is left "auto" is resolved by
`core.machine.resolve_auto`, and `build` then makes the `RunConfig`. No framework is imported.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from core.config import rates
from core.config.checking import Problem, check, check_key, check_value, invalid
from core.config.dialect_flags import translate_flags
from core.config.dialect_table import BLUEBERRY, MYPT, short
from core.config.dialects import translate_file
from core.config.draft import AUTO, Draft, Source
from core.config.nearest import did_you_mean, nearest_names, typing_errors
from core.config.presets import TRAIN_COMMAND, find_config
from core.config.schema import SECTIONS, RunConfig, key_names
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
        remedy=f"correct {path}; an example of the form: {CONFIGS_DIR / 'quickstart.yaml'}",
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
            remedy="python train.py --help   (every flag)",
            kept="nothing was started.",
        )
    name = name.strip().replace("-", "_")
    try:
        return name, parse_yaml(value)
    except (yaml.YAMLError, RecursionError) as error:
        shown = value if len(value) <= 60 else value[:57] + "..."
        raise PippinError(
            "P012",
            f"the value of {name} cannot be read: {shown!r}.",
            found="it is read as YAML: a text with brackets or colons stands in quotes of its own",
            remedy=_readable(name, shown),
            kept="nothing was started.",
        ) from error


def _readable(name: str, value: str) -> str:
    """An override that can be read: the text in quotes where the key takes one, else its default."""
    values = defaults().values
    if name not in values:
        return "python train.py --help   (every flag)"
    if check_value(name, value)[0] is None:
        return shlex.quote(f"{name}={json.dumps(value, ensure_ascii=False)}")
    return f"{name}={short(values[name])}"


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
    command: str = TRAIN_COMMAND,
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
        command: The program with the flag before the configuration's name, for a remedy.
        note: Told how each foreign name was read.
        warn: Told of each foreign flag that is ignored.

    Returns:
        A draft whose values have the right types; some may be "auto".

    Raises:
        PippinError: P010 with every problem, or P011, P012.
    """
    draft = defaults()
    problems: list[Problem] = []
    in_file: dict[str, Problem] = {}
    if config is not None:
        path = find_config(config, command=command)
        if config != path.stem and not Path(config).is_file():
            note(f"{config} is the preset {path.stem}, {path}")
        data, lines = read_config_file(path)
        is_preset = path.parent == CONFIGS_DIR
        reading = translate_file(data, lines, path)
        for text in reading.notes:
            note(text)
        problems += map(Problem, reading.problems)
        _merge_file(
            draft, reading.data, reading.lines, path, is_preset=is_preset, problems=problems
        )
        in_file = _problems_of_file(draft)
    old_lr = draft.values["train.lr"]
    for name, value in (flags or {}).items():
        where = (typed or {}).get(name, "--" + name.partition(".")[2])
        draft.set(name, value, Source("flag", where))
    parsed, broken = _parsed(overrides)
    stated = {**draft.values, **{name: value for _, name, value in parsed}}
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
    for text, name, value in parsed:
        if name not in draft.values:
            near, words = _unknown(name)
            fix = shlex.quote(f"{near}={text.partition('=')[2]}") if near else ""
            problems.append(Problem(f"{text}: {words}", fix))
            continue
        draft.set(name, value, Source("flag", text))
    # A file is wrong also where the command line hides it.
    problems += [p for name, p in in_file.items() if draft.sources[name].kind == "flag"]
    problems += check(draft)
    if not problems and not broken and draft.sources["train.lr"].kind == "flag":
        problems += _follow_lr(draft, old_lr)
    _raise_all(problems, broken)
    return draft


def _parsed(
    overrides: Sequence[str],
) -> tuple[list[tuple[str, str, Any]], list[PippinError]]:
    """Text, key and value of every override, and the errors of those that are none."""
    parsed, broken = [], []
    for text in overrides:
        try:
            parsed.append((text, *parse_override(text)))
        except PippinError as error:
            broken.append(error)
    return parsed, broken


def _raise_all(problems: Sequence[Problem], broken: Sequence[PippinError]) -> None:
    """One error of everything that is wrong, if anything is."""
    if problems:
        raise invalid([*problems, *(Problem(error.what) for error in broken)])
    if len(broken) == 1:
        raise broken[0]
    if broken:
        raise all_problems(
            "P012",
            [error.what for error in broken],
            what="the command line has problems:",
            remedy=broken[0].remedy,
            kept="nothing was started.",
        )


def _problems_of_file(draft: Draft) -> dict[str, Problem]:
    """Keys of a file whose values are wrong whatever stands beside them."""
    found = {}
    for name, source in draft.sources.items():
        if source.kind != "default" and not draft.is_auto(name):
            problem, _ = check_key(draft, name)
            if problem is not None:
                found[name] = problem
    return found


def _follow_lr(draft: Draft, file_lr: Any) -> list[Problem]:
    """Scale the group rates of the file or preset by the flag's `train.lr`; returns problems."""
    _, old_lr, _ = check_value("train.lr", file_lr)
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
    problems: list[Problem],
) -> None:
    kind: Literal["preset", "file"] = "preset" if is_preset else "file"
    for section, body in data.items():
        at = f"{path}:{lines.get(section, 1)}"
        if section not in SECTIONS:
            near = nearest_names(section, SECTIONS)
            hint = did_you_mean(near) if near else f"; sections are {', '.join(SECTIONS)}."
            fix = f"write {near[0]} instead of {section} in {at}" if len(near) == 1 else ""
            problems.append(Problem(f"{at}: unknown section {section}{hint}", fix))
            continue
        if not isinstance(body, dict):
            problems.append(Problem(f"{at}: section {section} is not a mapping of keys."))
            continue
        for name, value in body.items():
            key = f"{section}.{name}"
            where = f"{path}:{lines.get(key, 1)}"
            if key not in draft.values:
                meant, words = _unknown(key)
                other = meant.removeprefix(f"{section}.")
                fix = f"write {other} instead of {name} in {where}" if other else ""
                problems.append(Problem(f"{where}: {words}", fix))
                continue
            draft.set(key, value, Source(kind, path.stem if is_preset else where))


def _unknown(key: str) -> tuple[str, str]:
    """The key that was meant, where it can be only one, and the problem in words."""
    section, _, tail = key.rpartition(".")
    if key in SECTIONS:
        examples = [k for k in key_names() if k.startswith(f"{key}.")][:3]
        return "", f"{key} is a section, not a key; its keys are {', '.join(examples)} and others."
    near = nearest_names(key, key_names())
    if not near or typing_errors(key, near[0]) > 1:
        near = _foreign(section, tail) or near
    if not near:
        near = [k for k in key_names() if k.rpartition(".")[2] == tail][:1]
    return near[0] if len(near) == 1 else "", f"unknown key {key}{did_you_mean(near)}"


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
            kept="nothing was started.",
        )
    problems = check(draft)
    if problems:
        raise invalid(problems)
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
