"""The environment that a script runs in, seen to before anything that could be missing is imported.

`./setup.sh` installs into .venv, and every command that is printed begins with a plain `python` (`python3`
where there is no other). A script that is started by another Python goes on with .venv's; where there is
none, one line says what to type.
Standard library only, and nothing that Python 3.8 could not read.
"""

import os
import re
import shlex
import shutil
import signal
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["as_typed", "take_interrupts", "use_environment"]

NEEDED = ("numpy", "pydantic", "yaml", "rich", "psutil", "sentencepiece")
OLDEST = (3, 10)
EXIT_USER = 2
# The id of a process that was handed over, so that it is handed over once; its children may be again.
HANDED_OVER = "PIPPIN_HANDED_OVER"
_COMMAND = re.compile(r"(?<![\w./-])python (?=(?:tools/)?\w+\.py\b|-m )")


def use_environment() -> None:
    """Return where this Python will do, else run the same command with the Python of .venv.

    Where that is no help either, prints P502 and leaves with exit code 2.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    problem = _problem()
    if not problem:
        return
    root = Path(__file__).absolute().parent.parent
    python = str(root / ".venv" / "bin" / "python")
    if os.access(python, os.X_OK) and os.environ.get(HANDED_OVER) != str(os.getpid()):
        os.environ[HANDED_OVER] = str(os.getpid())
        try:
            os.execv(python, [python, *sys.argv])
        except OSError as error:
            problem += f"\n  {python} cannot be started: {error.strerror}"
    setup = os.path.relpath(root / "setup.sh")
    setup = setup if os.sep in setup else f"./{setup}"
    sys.stderr.write(
        f"P502 {problem}\n  try: {shlex.quote(setup)}   (makes .venv, which every command then uses)\n"
        "  nothing was started.\n"
    )
    sys.exit(EXIT_USER)


def take_interrupts() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again: the command itself answers it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    """Ctrl-C while the command is still being imported: nothing was begun, so nothing is told."""
    os._exit(128 + number)


def as_typed(text: str) -> str:
    """A text with its commands as this shell knows them: a stock Mac has `python3` and no `python`."""
    return text if _has_python() else _COMMAND.sub("python3 ", text)


@lru_cache(maxsize=1)
def _has_python() -> bool:
    return shutil.which("python") is not None


def _problem() -> str:
    """What this Python lacks, in a sentence, or nothing."""
    if sys.version_info[:2] < OLDEST:
        needed, found = (".".join(map(str, v[:2])) for v in (OLDEST, sys.version_info))
        return f"Pippin needs Python {needed} or newer; this is {found}, {sys.executable}."
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return ""
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed for {sys.executable}."
