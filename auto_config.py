"""What `python train.py` would decide on this machine, as `python auto_config.py` or from Python.

    from auto_config import auto_configure

    configurator = auto_configure()                 # detects everything, measures the speed
    configurator.print_config()                     # shows what it found
    model_config = configurator.get_model_config()  # the architecture

The same as `core.machine.auto_configure`, with this project's backends to measure with.
"""

import json
import sys
from typing import Any

from core.environment import use_environment

if __name__ == "__main__":
    use_environment()

import backends
from core.cli import guarded, make_parser
from core.machine import AutoConfigurator
from core.machine import auto_configure as _auto_configure

__all__ = ["AutoConfigurator", "auto_configure"]


def auto_configure(**options: Any) -> AutoConfigurator:
    """See `core.machine.auto_configure`; the speed is measured on the backend."""
    return _auto_configure(backends, **options)


def main(argv: list[str] | None = None) -> int:
    """Print the decisions; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv

    def run() -> int:
        parser = make_parser("auto_config.py", __doc__)
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set any key")
        parser.add_argument("--config", default="quickstart", metavar="NAME|PATH", help="a preset")
        parser.add_argument("--depth", type=int, metavar="N", help="as train.py --depth")
        parser.add_argument("--time-budget", metavar="TIME", help="as train.py --time-budget")
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
        parser.add_argument("--debug", action="store_true", help="show tracebacks")
        given = parser.parse_mixed_args(args)
        found = auto_configure(
            config=given.config,
            overrides=given.overrides,
            depth=given.depth,
            time_budget=given.time_budget,
        )
        if given.json:
            print(json.dumps(found.as_object()))
        else:
            found.print_config()
        return 0

    return guarded(run, debug="--debug" in args)


if __name__ == "__main__":
    sys.exit(main())
