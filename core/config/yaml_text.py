"""YAML as configurations are written in it.

Numbers follow YAML 1.2: `3e-4` and `1e6` are numbers, `010` is ten, `no` is a string, `1:30` is not
ninety. Repeated keys, tags and aliases are refused.
"""

import re
from typing import Any

import yaml

_MAX_DIGITS = 1000  # Python itself refuses to read a longer one than 4,300


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans; no tags, aliases or repeated keys. Private to this module."""

    def get_single_node(self) -> yaml.Node | None:
        """The only document; PyYAML's own says of a second one half a sentence."""
        self.get_event()  # type: ignore[no-untyped-call]
        empty = self.check_event(yaml.StreamEndEvent)
        document = None if empty else self.compose_document()
        if not self.check_event(yaml.StreamEndEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "another document begins here, and a configuration is one", mark
            )
        return document

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse an alias: a few of them can stand for more values than memory holds."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name) is refused; write its value out", mark
            )
        return super().compose_node(parent, index)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        if not isinstance(name, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {name!r} is not a string", key_node.start_mark
            )
        if name in out:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {name} appears twice", key_node.start_mark
            )
        out[name] = loader.construct_object(value_node, deep=True)
    return out


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > _MAX_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits", node.start_mark
        )
    return int(text, 16) if text.lower().startswith("0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document by the rules above.

    Raises:
        yaml.YAMLError: for broken YAML, tags or repeated keys.
    """
    return yaml.load(text, _Loader)


def key_lines(text: str) -> dict[str, int]:
    """Line number, from 1, of every `section.key` in a YAML or JSON document."""
    lines: dict[str, int] = {}
    root = yaml.compose(text, _Loader)
    if not isinstance(root, yaml.MappingNode):
        return lines
    for section, body in root.value:
        lines[str(section.value)] = section.start_mark.line + 1
        if isinstance(body, yaml.MappingNode):
            for name, _ in body.value:
                lines[f"{section.value}.{name.value}"] = name.start_mark.line + 1
    return lines
