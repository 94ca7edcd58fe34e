"""Where things lie: the project's own folders, run folders, and safe names.

Run folders and shards are written below the current directory, never inside the package.
"""

import re
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent
CONFIGS_DIR = PROJECT_ROOT / "configs"

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
# The best checkpoint of a run; there is one of them at a time.
BEST_FILES = ("best.npz", "best.pt")
# A tokenizer beside what was made with it; there is one of them.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.pippin.json", "tokenizer.json")
STEP_FILE = re.compile(r"step_(\d{6,})\.(npz|pt)\Z")


def is_safe_name(name: str) -> bool:
    """Whether `name` can be a folder of its own below another: no separators, no leading dot."""
    return RUN_NAME.match(name) is not None


def step_file_name(step: int, suffix: str) -> str:
    """File name of the checkpoint of an optimizer step, e.g. `step_000500.npz`."""
    return f"step_{step:06d}{suffix}"
