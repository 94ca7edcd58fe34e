"""What every command shares: flags, the form of errors, and exit codes."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from core.config.nearest import did_you_mean, nearest_names
from core.environment import take_interrupts
from core.errors import EXIT_FAULT, EXIT_SIGINT, PippinError

__all__ = ["ERROR_LOG", "Parser", "guarded", "make_parser"]

ERROR_LOG = "pippin-error.log"
"""Where an internal fault leaves its traceback, in the working folder."""


class Parser(argparse.ArgumentParser):
    """argparse with our form of errors; in a flag, dashes and underscores are the same."""

    def error(self, message: str) -> NoReturn:
        """Raise P012 instead of printing the usage."""
        end = "" if message.endswith("?") else "."
        raise PippinError("P012", message + end, remedy=f"python {self.prog} --help   (all flags)")

    def parse_mixed_args(self, args: Sequence[str]) -> Any:
        """Parse flags and `overrides`, which may stand between them.

        Raises:
            PippinError: P012 for an unknown flag, with the nearest one.
        """
        found, rest = self.parse_known_args(args)
        found.overrides += [arg for arg in rest if not arg.startswith("-")]
        unknown = next((arg for arg in rest if arg.startswith("-")), None)
        if unknown is not None:
            name = unknown.partition("=")[0].replace("_", "-")
            known = [o for a in self._actions for o in a.option_strings if o.startswith("--")]
            near = nearest_names(name, [o.replace("_", "-") for o in known])
            self.error(f"unknown flag {unknown}{did_you_mean(near)}".removesuffix("."))
        return found

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse after spelling each flag as the parser knows it."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelled(arg) for arg in given], namespace)

    def _spelled(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        if arg.startswith("--"):
            for known in (o for action in self._actions for o in action.option_strings):
                if known.replace("_", "-") == name.replace("_", "-"):
                    return known + equals + value
        return arg


def make_parser(prog: str, doc: str | None) -> Parser:
    """A parser without abbreviations, described by a module docstring's first paragraph.

    Args:
        prog: path of the script from the project's root, as it is typed.
        doc: the script's `__doc__`.
    """
    return Parser(prog=prog, allow_abbrev=False, description=(doc or "").split("\n\n")[0])


def guarded(run: Callable[[], int], *, debug: bool, aborted: str = "") -> int:
    """Run a command; its errors go to stderr in our form.

    Args:
        run: the command, which returns its exit code.
        debug: show tracebacks, as PIPPIN_DEBUG=1 in the environment does.
        aborted: said when Ctrl-C ends the command.

    Returns:
        What `run` returns, a PippinError's exit code, 130 for Ctrl-C, 0 where the reader of a pipe
        has gone, or 1 for a fault of ours, whose traceback is kept in `pippin-error.log`.
    """
    debug = debug or os.environ.get("PIPPIN_DEBUG", "0") not in ("", "0")
    take_interrupts()
    try:
        return run()
    except PippinError as error:
        if debug:
            traceback.print_exc()
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if aborted:
            print(f"\n{aborted}", file=sys.stderr)
        return EXIT_SIGINT
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(_fault(error).render(), file=sys.stderr)
        return EXIT_FAULT


def _fault(error: Exception) -> PippinError:
    remedy = f"report it with {ERROR_LOG}"
    try:
        Path(ERROR_LOG).write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        remedy = "run it again with --debug and report the text"
    return PippinError(
        "P001",
        f"internal fault: {type(error).__name__}: {error}",
        remedy=remedy,
        exit_code=EXIT_FAULT,
    )
