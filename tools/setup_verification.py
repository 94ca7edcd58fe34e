"""Verify this machine, the installation and a configuration before a run: what works, and what to do.

    python tools/setup_verification.py                    everything, with what train.py uses
    python tools/setup_verification.py --config 150M      the same for a preset or a file
    python tools/setup_verification.py --backend mlx      the self-tests of one backend only
    python tools/setup_verification.py --quick            seconds: is the installation sound

The exit code is 0 where nothing failed, 1 where a check failed, 2 for a wrong command line. The numbers
of each backend are compared with float64 on the CPU.
"""

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from core.environment import use_environment

    use_environment()

import backends
from core.cli import guarded, make_parser
from core.training.verification import Request
from core.training.verification.command import run_verification


def parse_args(argv: list[str]) -> tuple[Request, bool]:
    """What is to be verified, and whether as JSON.

    Raises:
        PippinError: P012 for an unknown flag.
    """
    parser = make_parser("tools/setup_verification.py", __doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="set any key")
    add("--config", metavar="NAME|PATH", help="a preset of configs/ or a file")
    add("--backend", choices=tuple(backends.MODULES), help="test this one only; it must be here")
    add("--quick", action="store_true", help="only what finds a broken installation in seconds")
    add("--online", action="store_true", help="reach a dataset of the hub")
    add("--in-process", action="store_true", help="no process of its own for each backend")
    add("--json", action="store_true", help="one object on stdout")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_mixed_args(argv)
    request = Request(
        config=args.config,
        backend=args.backend,
        overrides=tuple(args.overrides),
        flags={} if args.backend is None else {"train.backend": args.backend},
        quick=args.quick,
        online=args.online,
        apart=not args.in_process,
    )
    return request, args.json


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        request, as_json = parse_args(given)
        return run_verification(request, backends, as_json=as_json)

    return guarded(run, debug="--debug" in given, aborted="stopped; nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
