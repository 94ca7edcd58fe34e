"""A configuration on its way: values by dotted key, where each came from, some still "auto"."""

from dataclasses import dataclass, field
from typing import Any, Literal

from core.config.schema import is_auto_key

AUTO = "auto"


@dataclass(frozen=True)
class Source:
    """Where a value came from: `kind` is default, preset, file, flag, auto or checkpoint."""

    kind: Literal["default", "preset", "file", "flag", "auto", "checkpoint"]
    where: str = ""
    reason: str = ""


@dataclass
class Draft:
    """Values by dotted key, each with its source. A value may still be "auto"."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)

    def set(self, key: str, value: Any, source: Source) -> None:
        """Set one key; later calls win."""
        self.values[key] = value
        self.sources[key] = source

    def is_auto(self, key: str) -> bool:
        """Whether the key still waits for the machine's answer."""
        value: object = self.values[key]
        return isinstance(value, str) and value == AUTO and is_auto_key(key)

    def resolve(self, key: str, value: Any, reason: str) -> None:
        """Answer an "auto" key; a key that is set already keeps its value."""
        if self.is_auto(key):
            self.set(key, value, Source("auto", reason=reason))
