"""The JSON Schema of a configuration file, for editors: completion, ranges, descriptions.

It allows what `load` allows: "auto" where the machine may decide, every section and key optional,
nothing else.
"""

import copy
import json
from typing import Any

from core.config.schema import SECTIONS, is_auto_key

SCHEMA_NAME = "schema.json"


def config_schema() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    sections = {}
    for section, cls in SECTIONS.items():
        made = cls.model_json_schema()
        keys = {}
        for name, info in made["properties"].items():
            info = copy.deepcopy(info)
            info.pop("title", None)
            automatic = bool(info.pop("auto", False))
            if automatic and is_auto_key(f"{section}.{name}"):
                info = _or_auto(info)
            keys[name] = info
        sections[section] = {
            "type": "object",
            "description": (cls.__doc__ or "").strip(),
            "properties": keys,
            "additionalProperties": False,
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Pippin's configuration",
        "description": "Written by: python tools/show_configs.py --write-schema",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
    }


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=True) + "\n"


def _or_auto(info: dict[str, Any]) -> dict[str, Any]:
    """The same key, or the word auto, which is its default."""
    outer = {k: info.pop(k) for k in ("description",) if k in info}
    info.pop("default", None)
    if info.get("type") == "string" and "enum" not in info:
        return {**outer, **info, "default": "auto"}
    return {**outer, "anyOf": [info, {"const": "auto"}], "default": "auto"}
