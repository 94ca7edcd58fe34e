"""What a machine is, and what is decided for it: facts, memory, speed, sizes.

`from core.machine import auto_configure` decides everything at once, `print_system_info` and
`SYSTEM_CONFIG` say what there is; the rest is imported by module. The package itself stays light:
nothing is loaded before it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.machine.configurator import AutoConfigurator as AutoConfigurator
    from core.machine.configurator import auto_configure as auto_configure
    from core.machine.info import SYSTEM_CONFIG as SYSTEM_CONFIG
    from core.machine.info import print_system_info as print_system_info

__all__ = ["SYSTEM_CONFIG", "AutoConfigurator", "auto_configure", "print_system_info"]


def __getattr__(name: str) -> Any:
    """Load a name when it is asked for."""
    if name in ("SYSTEM_CONFIG", "print_system_info"):
        from core.machine import info

        return getattr(info, name)
    if name in __all__:
        from core.machine import configurator

        return getattr(configurator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
