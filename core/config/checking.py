"""Values against the schema: types and ranges of single keys, then what does not fit together.

Every problem names where its value came from, and the override or line that corrects it where one is
known.
"""

import functools
import json
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from core.config import rules
from core.config.dialect_table import as_bool
from core.config.draft import Draft
from core.config.json_schema import SCHEMA_NAME
from core.config.nearest import nearest_names
from core.config.schema import SECTIONS, is_auto_key
from core.config.yaml_text import parse_yaml
from core.errors import PippinError, all_problems
from core.paths import CONFIGS_DIR


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        text: What, and where it was written.
        fix: The override that corrects it (`model.d_model=64`), or what to write in the file; empty
            where there is more than one way.
    """

    text: str
    fix: str = ""


def invalid(problems: Sequence[Problem], *, what: str = "") -> PippinError:
    """P010 with every problem, and the correction where there is one problem with one correction.

    Args:
        problems: At least one.
        what: The first line; by default that the configuration has problems.
    """
    count = "a problem" if len(problems) == 1 else "problems"
    general = f"correct what is listed; every key with its range: {CONFIGS_DIR / SCHEMA_NAME}"
    return all_problems(
        "P010",
        [problem.text for problem in problems],
        what=what or f"the configuration has {count}:",
        remedy=(problems[0].fix if len(problems) == 1 else "") or general,
        kept="nothing was started.",
    )


def check(draft: Draft) -> list[Problem]:
    """Every problem of a draft: types and ranges first, then what does not fit together.

    Numbers are brought to their declared type in place (an int for a float key).
    """
    problems = []
    bad = set()
    for name in draft.values:
        if draft.is_auto(name):
            continue
        problem, fixed = check_key(draft, name)
        if problem is None:
            draft.values[name] = fixed
        else:
            bad.add(name)
            problems.append(problem)
    known = {k: v for k, v in draft.values.items() if k not in bad and not draft.is_auto(k)}
    if draft.sources["model.head_dim"].kind == "auto":
        del known["model.head_dim"]  # d_model // n_heads, which hides that a rest was left
    for found in rules.contradictions(known):
        problems.append(Problem(_where(draft, found.key) + found.text, found.fix))
    return problems


def check_key(draft: Draft, name: str) -> tuple[Problem | None, Any]:
    """What is wrong with the value of one key, if anything, and the value in its declared type."""
    source = draft.sources[name]
    text, value, better = check_value(name, draft.values[name])
    if text is None:
        return None, value
    fix = f"{name}={better}" if better else ""
    if fix and source.kind == "file":
        # A command line does not hide what is wrong in a file.
        fix = f"set {name} to {better} in {source.where}"
    return Problem(_where(draft, name) + text, fix), value


def _where(draft: Draft, name: str) -> str:
    source = draft.sources[name]
    return f"{source.where}: " if source.where and source.kind != "preset" else ""


def check_value(name: str, value: Any) -> tuple[str | None, Any, str]:
    """One value by the schema.

    Args:
        name: Dotted key.
        value: As it was read.

    Returns:
        What is wrong, or None; the value in its declared type; and the nearest value that is
        allowed, as it would be typed, or nothing.
    """
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
            return check_value(name, number)
    try:
        return None, _adapter(name).validate_python(value), ""
    except ValidationError as error:
        detail = error.errors()[0]["msg"]
        detail = detail[0].lower() + detail[1:]
        expected = _expected(annotation, auto=is_auto_key(name))
        plain = _without_underscores(value) if annotation in (int, float) else ""
        better = plain or _nearest_allowed(name, value)
        if better and check_value(name, parse_yaml(better))[0] is not None:
            plain = better = ""
        hint = f" Write {plain}, without underscores." if plain else ""
        return f"{name} = {_shown(value)}: {detail}; expected {expected}.{hint}", None, better


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


def _without_underscores(value: Any) -> str:
    """`1_000`, which YAML 1.2 reads as a text, as `1000`; nothing for what is no such number."""
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,3}(_\d{3})+(\.\d+)?", value)
    return value.replace("_", "") if is_number else ""


def _nearest_allowed(name: str, value: Any) -> str:
    """The allowed value that was meant, or the end of the range that was left; nothing if unknown."""
    section, _, key = name.partition(".")
    info = SECTIONS[section].model_fields[key]
    annotation: Any = info.annotation
    if typing.get_origin(annotation) is Literal:
        names = [str(a) for a in typing.get_args(annotation)]
        near = nearest_names(str(value), names, share=1.0)
        return near[0] if len(near) == 1 else ""
    if annotation is bool:
        meant = as_bool(value)
        return "" if meant is None else str(meant).casefold()
    if annotation not in (int, float) or isinstance(value, bool):
        return ""
    if not isinstance(value, (int, float)):
        return ""
    for limit in info.metadata:
        least, most = getattr(limit, "ge", None), getattr(limit, "le", None)
        if least is not None and value < least:
            return f"{least:.12g}"
        if most is not None and value > most:
            return f"{most:.12g}"
    return ""


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
