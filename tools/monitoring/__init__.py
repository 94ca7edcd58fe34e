"""Parts of tools/memory_monitor.py: the course of memory, what to warn of, how it is shown and kept."""
