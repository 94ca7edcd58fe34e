"""Backends under test. A backend that is named and cannot be imported fails its tests; none is skipped.

PIPPIN_TEST_BACKENDS=cpu,mlx is the default; on a Mac add mps, on an NVIDIA machine cuda.
"""

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")
# What this user's machine remembers decides nothing here.
os.environ["PIPPIN_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"pippin-test-{os.getpid()}")
# Both frameworks live in one process here: one thread for the BLAS that MLX loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores

# Printed commands begin with `python` where there is one.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
# A shell's background job starts with Ctrl-C ignored, and what it starts inherits that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

BACKENDS = tuple(os.environ.get("PIPPIN_TEST_BACKENDS", "cpu,mlx").split(","))
