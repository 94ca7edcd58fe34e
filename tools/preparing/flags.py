"""Keys of a configuration as the flags of a tool: what helps with train.py is spelled otherwise here."""

import re
from collections.abc import Callable, Mapping

from core.errors import PippinError

KEYS: Mapping[str, str] = {
    "data.on_bad_line": "--on-bad-line",
    "data.seed": "--seed",
    "data.test_fraction": "--test-fraction",
    "data.text_field": "--text-field",
    "data.tokenizer": "--tokenizer",
    "data.val_fraction": "--val-fraction",
    "model.vocab_size": "--vocab-size",
}


def in_flags(run: Callable[[], int], keys: Mapping[str, str] = KEYS) -> int:
    """Run a command; where it fails, keys in the remedy become the command's flags.

    Args:
        run: The command, which returns its exit code.
        keys: Flag of each key.

    Raises:
        PippinError: The command's, "--text-field body" for "data.text_field=body" in its remedy.
    """
    try:
        return run()
    except PippinError as error:
        for key, flag in keys.items():
            error.remedy = re.sub(rf"\b{re.escape(key)}=", f"{flag} ", error.remedy)
        raise
