"""Turn text into shards that every backend trains on: checked, hashed, resumable.

    python tools/prepare_data.py my_texts/ --tokenizer tokenizer.model --out shards/mine
    python tools/prepare_data.py 'data/*.jsonl.zst' --tokenizer bpe --vocab-size 32000 --out shards/big
    python tools/prepare_data.py hf:allenai/c4 --config en --max-tokens 1e9 --tokenizer T --out shards/c4
    python tools/prepare_data.py plan my_texts/ --for tiny_shakespeare_cpu
    python tools/prepare_data.py info shards/mine      what the folder holds
    python tools/prepare_data.py verify shards/mine    read everything and compare the hashes
    python tools/prepare_data.py stats shards/mine     token statistics, with a plot
    python tools/prepare_data.py show shards/mine --rows 3    rows with their trained tokens
    python tools/prepare_data.py import nanogpt/data/ --tokenizer tokenizer.json --out shards/old

After Ctrl-C or a kill the same command goes on where it was and gives the very same shards. The
result does not depend on --workers.
"""

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from core.environment import use_environment

    use_environment()

from importlib import import_module

from core.cli import guarded
from tools.preparing.flags import in_flags

# Imported when called: the processes that encode read this file too, and need none of them.
VERBS = {
    "make": ("making", "main"),
    "plan": ("planning", "main"),
    "verify": ("looking", "verify"),
    "info": ("looking", "info"),
    "stats": ("looking", "stats"),
    "show": ("looking", "show"),
    "import": ("importing", "main"),
}


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    verb = given.pop(0) if given and given[0] in VERBS else "make"
    return guarded(
        lambda: in_flags(lambda: _run(verb, given)),
        debug="--debug" in given,
        aborted="stopped; the same command goes on from here.",
    )


def _run(verb: str, given: list[str]) -> int:
    module, function = VERBS[verb]
    code: int = getattr(import_module(f"tools.preparing.{module}"), function)(given)
    return code


if __name__ == "__main__":
    sys.exit(main())
