"""`pippin train|convert|generate|monitor|explain`: the entry points under one command."""

import importlib
import sys
from pathlib import Path

COMMANDS = {
    "train": ("train", "train a model"),
    "convert": ("convert", "convert a checkpoint between .npz and .pt"),
    "generate": ("generate", "continue a text"),
    "monitor": ("tools.memory_monitor", "watch memory and a run"),
    "configs": ("tools.show_configs", "show the presets"),
    "parity": ("tools.parity", "compare two backends step by step"),
    "benchmark": ("tools.benchmark", "measure speed on this machine"),
    "explain": ("", "explain an error code, for example: pippin explain P301"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    # In a wheel everything lies below this package, in a clone beside it.
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "core").is_dir() else here.parent))
    if not args or args[0] not in COMMANDS:
        print("usage: pippin COMMAND [ARGUMENTS]\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<10} {text}")
        return 0 if not args or args[0] in ("-h", "--help") else 2
    if args[0] == "explain":
        return explain(args[1:])
    module = importlib.import_module(COMMANDS[args[0]][0])
    return int(module.main(args[1:]) or 0)


def explain(codes: list[str]) -> int:
    """Print the long form of error codes; without any, list them."""
    from core.errors import CODES

    unknown = [c for c in codes if c.upper() not in CODES]
    for code in codes or list(CODES):
        if code.upper() in CODES:
            title, text = CODES[code.upper()]
            print(f"{code.upper()} {title}" + (f"\n  {text}" if codes else ""))
    for code in unknown:
        print(f"no error has the code {code}; pippin explain lists them", file=sys.stderr)
    return 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
