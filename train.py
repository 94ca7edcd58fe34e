"""Train a model; without a flag everything is decided from this machine and the text.

`python train.py --help` lists the flags, `--print-config` every key, and any key can be set:
`python train.py model.d_model=256 train.lr=1e-3`. From here it goes: arguments -> resolved configuration
-> backend -> `core.training`.
"""

import shlex
import sys

from core.environment import use_environment

if __name__ == "__main__":
    use_environment()


import backends
from backends.fallback import FLAG as FALLBACK_FLAG
from backends.fallback import set_cpu_fallback, tell_moved_operators
from core import __version__
from core.cli import guarded, make_parser
from core.config.dialect_flags import add_flags, given_flags
from core.training.console import Console
from core.training.naming import own_names, settle
from core.training.options import Options
from core.training.session import Session
from core.training.sweep import Sweep


def rows(text: str) -> int | str:
    """Rows at once, or "auto"; argparse names this function where the text is neither."""
    return text if text == "auto" else int(text)


def parse_args(argv: list[str]) -> tuple[Options, bool]:
    """Options of the session, and whether tracebacks are wanted.

    Raises:
        PippinError: P012 for an unknown flag.
    """
    parser = make_parser("train.py", __doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="set any key")
    add("--config", metavar="NAME|PATH", help="a preset of configs/ or a file")
    add("--config_file", metavar="NAME|PATH", help="the same; flags of the model are ignored")
    add("--model_name", metavar="NAME", help="run folder checkpoints/NAME; goes on if it is there")
    add("--lr", action="append", metavar="X", help="learning rate; several times: a run each")
    add("--input_file", metavar="PATH", help="text file, .jsonl or folder; default: stories")
    add("--backend", choices=("auto", *backends.MODULES), help="where to compute")
    add("--minutes", type=float, help="time to train where nothing gives a length (5)")
    add("--time-budget", metavar="TIME", help="time to train: 90s, 30m, 2h, 1h30m")
    add("--depth", type=int, metavar="N", help="one dial: size, batch, rates and length")
    add(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop at this step; the length where none is given",
    )
    add("--save_dir", metavar="FOLDER", help="run folder (default: checkpoints/<text>-N)")
    add("--seed", type=int, help="seed of weights, data order and dropout")
    add("--micro-batch-size", type=rows, metavar="ROWS", help="rows of one forward pass, or auto")
    add("--resume", nargs="?", const="", metavar="RUN|CHECKPOINT", help="go on where it stopped")
    add("--resume-from", metavar="CHECKPOINT", help="as --resume CHECKPOINT")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--manual-config", action="store_true", help="nothing automatic")
    add("--print-config", action="store_true", help="print every key, its value and source")
    add("--dry-run", action="store_true", help="decide, forecast, and stop before training")
    add("--validate-setup", action="store_true", help="verify machine and config; trains nothing")
    add("--force", action="store_true", help="train although the forecast does not fit")
    add(FALLBACK_FLAG, action="store_true", help="let the CPU compute what MPS has no kernel for")
    add("--log", choices=("spaced", "every"), default="spaced", help="rows in the terminal")
    add("--quiet", action="store_true", help="warnings and the summary only")
    add("--json", action="store_true", help="JSON lines on stdout, text on stderr")
    add("--debug", action="store_true", help="show tracebacks")
    add_flags(parser)
    parser.usage = "train.py [flags] [section.key=value ...]"
    args = parser.parse_mixed_args(argv)
    args.foreign = given_flags(args)
    fields = {
        n: v for n in Options.__dataclass_fields__ if (v := getattr(args, n, None)) is not None
    }
    return Options(**fields), args.debug


def _settle_fallback(options: Options, console: Console) -> None:
    """Before torch is imported: whether the CPU may compute what MPS cannot."""
    note = set_cpu_fallback(allowed=options.allow_cpu_fallback)
    if note is not None:
        console.warn(note)
    if options.allow_cpu_fallback:
        console.fact("fallback", f"{FALLBACK_FLAG}: operators without an MPS kernel run on the CPU")
        tell_moved_operators(console.warn)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv

    def run() -> int:
        options = own_names(parse_args(args)[0])
        console = Console(
            # The table alone is on stdout, so that it can be kept.
            stream=sys.stderr if options.print_config else None,
            quiet=options.quiet,
            as_json=options.json,
            every_row=options.log == "every",
        )
        if not options.print_config:
            console.banner(__version__)
        _settle_fallback(options, console)
        if options.validate_setup:
            from core.training.verification import command as verification  # not at every start

            return verification.run_verification(
                verification.request_of(options), backends, as_json=options.json
            )
        if len(options.lr) > 1:
            command = shlex.join(["python", "train.py", *args])
            return Sweep(options, backends, console, command=command).run()
        return Session(settle(options, console), backends, console, argv=args).run()

    aborted = "aborted; nothing was saved by this."
    return guarded(run, debug="--debug" in args, aborted=aborted)


if __name__ == "__main__":
    sys.exit(main())
