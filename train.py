"""Train a model: arguments -> resolved configuration -> backend -> `core.training`.

`python train.py` with no flag picks everything itself; `python train.py --help` lists the flags, and
`--print-config` every key. Any key can be set: `python train.py model.d_model=256 train.lr=1e-3`.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - a stock Mac's Python is 3.9
    sys.exit(
        "P502 Pippin needs Python 3.10 or newer; this is {}.{}.\n  try: brew install python@3.12   "
        "or   curl -LsSf https://astral.sh/uv/install.sh | sh".format(*sys.version_info[:2])
    )


import backends
from core import __version__
from core.cli import guarded, make_parser
from core.errors import PippinError
from core.training.console import Console
from core.training.options import Options
from core.training.session import Session


def parse_args(argv: list[str]) -> tuple[Options, bool]:
    """Options of the session, and whether tracebacks are wanted.

    Raises:
        PippinError: P012 for an unknown flag.
    """
    parser = make_parser("train.py", __doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="set any key")
    add("--config", metavar="NAME|PATH", help="a preset of configs/ or a file")
    add("--input_file", metavar="PATH", help="text file, .jsonl or folder; default: stories")
    add("--backend", choices=("auto", *backends.MODULES), help="where to compute")
    add("--minutes", type=float, help="time to train where nothing gives a length (5)")
    add("--max-steps", type=int, metavar="N", help="stop there; the length where none is given")
    add("--save_dir", metavar="FOLDER", help="run folder (default: checkpoints/<text>-N)")
    add("--seed", type=int, help="seed of weights, data order and dropout")
    add("--micro-batch-size", type=int, metavar="ROWS", help="rows of one forward pass")
    add("--resume", nargs="?", const="", metavar="RUN|CHECKPOINT", help="go on where it stopped")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--manual-config", action="store_true", help="nothing automatic")
    add("--print-config", action="store_true", help="print every key, its value and source")
    add("--dry-run", action="store_true", help="decide, forecast, and stop before training")
    add("--force", action="store_true", help="train although the forecast does not fit")
    add("--log", choices=("spaced", "every"), default="spaced", help="rows in the terminal")
    add("--quiet", action="store_true", help="warnings and the summary only")
    add("--json", action="store_true", help="JSON lines on stdout, text on stderr")
    add("--debug", action="store_true", help="show tracebacks")
    args, rest = parser.parse_known_args(argv)
    args.overrides += [a for a in rest if not a.startswith("-")]
    unknown = [a for a in rest if a.startswith("-")]
    if unknown:
        raise PippinError(
            "P012", f"unknown flag {unknown[0]}.", remedy="python train.py --help   (all flags)"
        )
    fields = {name: getattr(args, name) for name in Options.__dataclass_fields__}
    return Options(**fields), args.debug


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv

    def run() -> int:
        options, _ = parse_args(args)
        console = Console(
            quiet=options.quiet, as_json=options.json, every_row=options.log == "every"
        )
        if not options.print_config:
            console.banner(__version__)
        return Session(options, backends, console).run()

    aborted = "aborted; nothing was saved by this."
    return guarded(run, debug="--debug" in args, aborted=aborted)


if __name__ == "__main__":
    sys.exit(main())
