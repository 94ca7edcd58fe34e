"""The verification as a command: what `tools/setup_verification.py` and `train.py` print."""

import sys

from core.machine.backends import Backends
from core.training.options import Options
from core.training.verification.report import Check, Printer
from core.training.verification.verifying import Request, verify


def request_of(options: Options) -> Request:
    """What `train.py --validate-setup` verifies: the configuration that these options make."""
    backend = None if options.backend in (None, "auto") else options.backend
    return Request(
        config=options.config or options.config_file,
        backend=backend,
        overrides=tuple(options.overrides),
        flags=options.flags(),
        command="python train.py --validate-setup --config",
    )


def run_verification(request: Request, backends: Backends, *, as_json: bool = False) -> int:
    """Verify and print; returns the exit code: 0, or 1 where a check failed.

    Args:
        request: What is to be verified.
        backends: What `backends` offers.
        as_json: Print one JSON object on stdout, and nothing else there.

    Raises:
        PippinError: P011 or P012 for a wrong command line.
    """
    if as_json:
        report = verify(request, backends)
        print(report.to_json())
        return report.exit_code
    printer = Printer(lambda line: print(line, flush=True))

    def show(check: Check) -> None:
        printer.check(check)

    report = verify(request, backends, show=show)
    printer.end(report)
    if not report.failed and sys.stdout.isatty():
        print("  next: python train.py")
    return report.exit_code
