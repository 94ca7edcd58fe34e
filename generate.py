"""Continue a text with a trained model, on any backend.

A run's name or a checkpoint's path alone suffices: `python generate.py --model_name stories-1
--prompt "Once"`, `python generate.py model.pt --prompt -` (stdin). Without either, the newest run.
"""

import sys

from core.environment import use_environment

if __name__ == "__main__":
    use_environment()

import argparse
import shlex
from pathlib import Path

import backends
from backends.fallback import FLAG as FALLBACK_FLAG
from backends.fallback import set_cpu_fallback, tell_moved_operators
from core.checkpoint import Checkpoint
from core.cli import guarded, make_parser
from core.errors import PippinError
from core.inference.model import Model, checkpoint_candidates, load_model
from core.inference.sampling import Sampling
from core.inference.terminal import Request, write_texts
from core.machine import remembered
from core.machine.choose import choose_backend
from core.machine.system import on_apple_silicon
from core.training.runfolder import find_run, run_names


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Arguments; flags take dashes or underscores.

    Raises:
        PippinError: P012 for what is not understood.
    """
    parser = make_parser("generate.py", __doc__)
    add = parser.add_argument
    add(
        "model", nargs="?", metavar="RUN|CHECKPOINT", help="run name, run folder or checkpoint file"
    )
    add("--model-name", metavar="RUN", help="the same, as a flag")
    add("--checkpoint", metavar="PATH", help="the same, as a flag")
    add("--prompt", default="", metavar="TEXT", help="text to continue; - reads stdin")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="the most to write (256)")
    add("--num-samples", type=int, default=1, metavar="N", help="texts to write (1)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest; 0 is off")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest of mass P")
    add("--seed", type=int, default=1, help="the same seed gives the same text (1)")
    add("--backend", default="auto", choices=("auto", *backends.MODULES), help="where to compute")
    add("--precision", choices=("float32", "bfloat16", "float16"), help="default: as trained")
    add("--tokenizer", metavar="PATH", help="default: the one beside the checkpoint")
    add(FALLBACK_FLAG, action="store_true", help="let the CPU compute what MPS has no kernel for")
    add("--json", action="store_true", help="one JSON object a line on stdout")
    add("--quiet", action="store_true", help="the text only")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    given = [v for v in (args.model, args.model_name, args.checkpoint) if v is not None]
    if len(given) > 1:
        raise PippinError(
            "P012",
            f"{len(given)} models were given; one is needed.",
            choices=given,
            remedy=f"python generate.py {shlex.quote(given[0])}",
        )
    if given and not given[0].strip():
        raise PippinError(
            "P012",
            "the model's name is empty.",
            choices=run_names(),
            remedy="python generate.py --model_name RUN, or leave it out for the newest run",
        )
    if args.num_samples < 1:
        raise PippinError(
            "P601",
            f"num_samples is {args.num_samples}; it must be 1 or more.",
            remedy="--num-samples 1",
            kept="nothing was written.",
        )
    args.model = given[0] if given else None
    return args


def open_model(args: argparse.Namespace) -> Model:
    """The model that the arguments name.

    Raises:
        PippinError: P302 for an unknown run, P3xx for its files, P5xx for the backend.
    """
    path = _model_path(args.model)
    candidates = checkpoint_candidates(path, _open_checkpoint)
    if (name := args.backend) == "auto":
        name = _choose(args.quiet)
    return load_model(
        candidates,
        open_checkpoint=_open_checkpoint,
        create=backends.load(name),
        backend_name=name,
        precision=args.precision,
        tokenizer_path=None if args.tokenizer is None else Path(args.tokenizer),
    )


def _choose(quiet: bool) -> str:
    """What `auto` means here: the measured order of GPU backends where there is one, as in training."""
    available = backends.available()
    found, note = remembered.fastest(available)
    if note and not quiet:
        print(f"! {note}", file=sys.stderr)
    if found is not None:
        return found[0]
    return choose_backend(available, is_apple_silicon=on_apple_silicon())[0]


def _model_path(name: str | None) -> Path:
    if name is not None:
        return Path(name) if Path(name).is_file() else find_run(name)
    names = run_names()
    if not names:
        raise PippinError("P302", "there is no run below ./checkpoints.", remedy="python train.py")
    print(f"[newest run: {names[0]}]", file=sys.stderr)
    return find_run(names[0])


def _open_checkpoint(path: Path) -> Checkpoint:
    return backends.checkpoint_format(path.suffix).open(path)


def _read_stdin() -> str:
    getattr(sys.stdin, "reconfigure", lambda **_: None)(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PippinError(
            "P202",
            f"the prompt on stdin is not UTF-8: {error}.",
            remedy="iconv -f latin1 -t utf-8 FILE | python generate.py --prompt -",
        ) from error


def _tell(note: str) -> None:
    print(f"[{note}]", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Generate; returns the exit code."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    prompt = _read_stdin() if args.prompt == "-" else args.prompt
    note = set_cpu_fallback(allowed=args.allow_cpu_fallback)
    if note is not None:
        _tell(note)
    if args.allow_cpu_fallback:
        tell_moved_operators(_tell)
    model = open_model(args)
    try:
        for note in model.notes:
            print(f"[{note}]", file=sys.stderr)
        request = Request(
            prompt, args.num_samples, args.max_new_tokens, sampling, args.json, args.quiet
        )
        write_texts(model, request)
    finally:
        model.backend.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows a ? instead
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    return guarded(lambda: run(parse_args(args)), debug="--debug" in args)


if __name__ == "__main__":
    sys.exit(main())
