"""Operators that torch has no MPS kernel for: the CPU computes them only where a user asked for it.

torch reads `PYTORCH_ENABLE_MPS_FALLBACK` when its library is loaded, so this comes before `import torch`.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

VARIABLE = "PYTORCH_ENABLE_MPS_FALLBACK"
# That the flag was given, for this process and those that it starts.
ASKED = "PIPPIN_ALLOW_CPU_FALLBACK"
FLAG = "--allow-cpu-fallback"
# aten/src/ATen/mps/MPSFallback.mm.
_MOVED = re.compile(
    r"The operator '([^']+)' is not currently supported on the MPS backend and will"
)


def set_cpu_fallback(
    *,
    allowed: bool,
    environ: MutableMapping[str, str] | None = None,
    loaded: Callable[[], bool] = lambda: "torch" in sys.modules,
) -> str | None:
    """Allow or forbid the CPU to compute what MPS cannot, before torch is imported.

    Args:
        allowed: Whether the flag was given.
        environ: The environment, changed in place; by default this process's.
        loaded: Whether torch is imported already, which is too late to change anything.

    Returns:
        What a user should be told, None where there is nothing to tell.
    """
    env = os.environ if environ is None else environ
    before = env.get(VARIABLE, "0")
    if allowed:
        env[VARIABLE] = env[ASKED] = "1"
        if loaded() and before in ("", "0"):
            return f"{FLAG} comes too late: torch is loaded already"
        return None
    env.pop(ASKED, None)
    forbid_unasked(env)
    if before in ("", "0"):
        return None
    return (
        f"{VARIABLE}={before} in the environment is not used: it would move operators to the CPU "
        f"silently; {FLAG} asks for that"
    )


def forbid_unasked(environ: MutableMapping[str, str] | None = None) -> None:
    """Take the variable away where no command was given the flag; before torch is imported."""
    env = os.environ if environ is None else environ
    if env.get(ASKED) != "1":
        env.pop(VARIABLE, None)


def tell_moved_operators(tell: Callable[[str], None]) -> Callable[[], None]:
    """Tell each operator that torch moves to the CPU once, in our words; other warnings stay.

    Args:
        tell: Told of each.

    Returns:
        A function that ends it.
    """
    before = warnings.showwarning
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> Any:
        found = _MOVED.search(str(message))
        if found is None:
            return before(message, category, filename, lineno, file, line)
        if found[1] not in told:
            told.add(found[1])
            tell(f"the operator {found[1]} has no MPS kernel and runs on the CPU ({FLAG})")
        return None

    warnings.showwarning = show

    def end() -> None:
        warnings.showwarning = before

    return end
