"""Machines as files: what each would answer to every command and file that detection reads.

A file `NAME.json` here holds raw answers; `recorded("NAME")` is a probe that gives them. A command is
written as it would be typed ("metal" is the question to Metal), its answer as lines; `{"fails": [...]}`
is a command that ends with an error after printing those lines. What is absent is not on that machine.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.machine.probe import Battery
from core.machine.system import METAL_COMMAND, SystemMemory

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


class RecordedProbe:
    """A machine of recorded answers."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.system: str = answers["platform"]["system"]
        self.architecture: str = answers["platform"]["architecture"]
        self.asked: list[str] = []

    def run(self, command: Sequence[str], *, partial: bool = False) -> str | None:
        name = "metal" if tuple(command) == METAL_COMMAND else " ".join(command)
        self.asked.append(name)
        answer = self.answers["commands"].get(name)
        if isinstance(answer, dict):
            answer = answer["fails"] if partial else None
        return None if answer is None else "\n".join(answer) + "\n"

    def read(self, path: str) -> str | None:
        lines = self.answers["files"].get(path)
        return None if lines is None else "\n".join(lines) + "\n"

    def environ(self, name: str) -> str | None:
        value: str | None = self.answers["environ"].get(name)
        return value

    def system_version(self) -> str | None:
        version: str | None = self.answers["platform"]["version"]
        return version

    def memory(self) -> SystemMemory | None:
        m = self.answers["memory"]
        return None if m is None else SystemMemory(**m)

    def cpu_count(self, *, logical: bool) -> int | None:
        count: int | None = self.answers["cpu_count"]["logical" if logical else "physical"]
        return count

    def affinity(self) -> int | None:
        count: int | None = self.answers["affinity"]
        return count

    def battery(self) -> Battery | None:
        b = self.answers["battery"]
        return None if b is None else Battery(b["percent"], b["plugged"])

    def disk_free(self, path: str) -> int | None:
        free: int | None = self.answers["disk_free"]
        return free


def recorded(name: str, **changes: Any) -> RecordedProbe:
    """The machine of a file; `changes` replace whole answers, such as `environ`."""
    answers = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return RecordedProbe(answers | changes)
