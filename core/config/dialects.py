"""Configurations written for other projects, translated by the table of `core.config.dialect_table`.

A file is recognised by its shape: its sections and the names of its keys. What fits two projects and
would mean two things is an error that shows both readings. Every translation is told in one line;
nothing is dropped without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.dialect_table import (
    ANARCHOBOT_KEYS,
    FLAT,
    NANOGPT,
    Dialect,
    Values,
    short,
    told,
)
from core.config.nearest import did_you_mean, nearest_names
from core.config.schema import SECTIONS, key_names
from core.errors import PippinError, all_problems


@dataclass
class Reading:
    """A file in Pippin's own sections.

    Attributes:
        data: Sections with keys.
        lines: Line of every key, by its own name.
        notes: One line per translation.
        problems: Names that are not known, each with its place.
    """

    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, line: int) -> None:
        """Set one dotted key."""
        section, _, name = key.partition(".")
        self.data.setdefault(section, {})[name] = value
        self.lines[key] = line


def translate_file(data: Mapping[str, Any], lines: Mapping[str, int], path: Path) -> Reading:
    """A file in Pippin's own sections, whatever project it was written for.

    Args:
        data: The file's content.
        lines: Line of every key, `section.key` where there are sections.
        path: The file, for messages.

    Returns:
        The reading; a file in Pippin's own form comes back as it is, without notes.

    Raises:
        PippinError: P011 for a file that fits two projects and would mean two things.
    """
    if _is_nanogpt(data):
        if clash := [s for s in ("data", "train") if s in data]:
            raise _ambiguous(
                path,
                f"sections training or device, or n_embd, are {NANOGPT.name}'s",
                f"section {' and '.join(clash)} is Pippin's",
            )
        return _translated(NANOGPT, _dotted(data), lines, path)
    if data and not set(data) & set(SECTIONS) and not _nested(data):
        fitting = _flat_dialects(data)
        if fitting:
            readings = [_translated(d, data, lines, path) for d in fitting]
            first, rest = readings[0], readings[1:]
            for dialect, other in zip(fitting[1:], rest):
                if other.data != first.data:
                    raise _ambiguous(
                        path,
                        f"{fitting[0].name}: {_shown(first)}",
                        f"{dialect.name}: {_shown(other)}",
                    )
            return first
    return _own(data, lines, path)


def _nested(data: Mapping[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in data.values())


def _dotted(data: Mapping[str, Any]) -> Values:
    out: Values = {}
    for section, body in data.items():
        if isinstance(body, dict):
            out |= {f"{section}.{name}": value for name, value in body.items()}
        else:
            out[section] = body
    return out


def _is_nanogpt(data: Mapping[str, Any]) -> bool:
    """By its sections, or by two of its names where none of Pippin's own stands beside them."""
    if any(isinstance(data.get(section), dict) for section in ("training", "device")):
        return True
    model = data.get("model")
    if not isinstance(model, dict):
        return False
    # n_layer and n_head alone are Pippin's names with a letter left out.
    names, own = set(model), {"n_layers", "d_model", "n_heads", "max_seq_len"}
    theirs = {"n_layer", "n_embd", "n_head", "block_size"} & names
    return not own & names and len(theirs) >= 2 and bool({"n_embd", "block_size"} & theirs)


def _flat_dialects(data: Mapping[str, Any]) -> list[Dialect]:
    """Projects whose names the file uses: all that know every key, else those that know most."""
    known = {d.name: sum(key in d.terms for key in data) for d in FLAT}
    most = max(known.values())
    return [d for d in FLAT if known[d.name] == most] if most else []


def _translated(
    dialect: Dialect, flat: Mapping[str, Any], lines: Mapping[str, int], path: Path
) -> Reading:
    reading = Reading()
    reading.notes.append(f"{path.name} is written as for {dialect.name}; read here as:")
    for name, value in flat.items():
        line = lines.get(name, 1)
        term = dialect.terms.get(name)
        if term is None:
            hint = did_you_mean(nearest_names(name, dialect.terms))
            reading.problems.append(f"{path}:{line}: unknown key {name} of {dialect.name}{hint}")
            continue
        values, why = term.read(value, flat)
        for key, made in values.items():
            reading.set(key, made, line)
        reading.notes.append(told(name, value, values, why))
    values, why = dialect.adds(flat)
    for key, made in values.items():
        if key not in reading.lines:
            reading.set(key, made, 1)
            reading.notes.append(f"{key} = {made:.4g}: {why}")
    return reading


def _own(data: Mapping[str, Any], lines: Mapping[str, int], path: Path) -> Reading:
    """Pippin's own form, with the keys of AnarchoBot's sections translated."""
    reading = Reading(lines=dict(lines))
    flat = _dotted(data)
    own = set(key_names())
    for section, body in data.items():
        if not isinstance(body, dict):
            reading.data[section] = body
            continue
        reading.data.setdefault(section, {})
        for name, value in body.items():
            key = f"{section}.{name}"
            term = ANARCHOBOT_KEYS.get(key)
            if term is None or key in own:
                reading.data[section].setdefault(name, value)
                continue
            values, why = term.read(value, flat)
            given = [k for k in values if k in flat]
            for made_key, made in values.items():
                if made_key not in given:
                    reading.set(made_key, made, lines.get(key, 1))
            if given:
                values, why = {}, f"left out: {given[0]} is given"
            reading.notes.append(told(f"{path.name}: {key}", value, values, why))
    return reading


def _shown(reading: Reading) -> str:
    pairs = [f"{s}.{k} = {short(v)}" for s, body in reading.data.items() for k, v in body.items()]
    return ", ".join(pairs) or "nothing"


def _ambiguous(path: Path, first: str, second: str) -> PippinError:
    return all_problems(
        "P011",
        [first, second],
        what=f"{path} can be read in two ways, which mean two things:",
        remedy="write it in Pippin's own form: sections model, data, train "
        "(python train.py --print-config shows every key)",
    )
