"""Parts of tools/benchmark.py: measurements with their floors."""
