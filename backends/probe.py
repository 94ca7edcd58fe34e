"""One real training step in a process of its own, to see whether its memory suffices.

    python -m backends.probe < config.json        the configuration as `RunConfig` writes it

What runs out of memory there, or is killed by the system, costs the caller nothing. The caller watches
the process as well, since a Mac would swap for minutes instead of failing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from core.backend import OutOfMemory
from core.config.schema import RunConfig
from core.errors import PippinError
from core.machine.micro_batch import Probed
from core.machine.pressure import shares_memory
from core.machine.system import process_memory
from core.paths import PROJECT_ROOT

COMMAND = (sys.executable, "-m", "backends.probe")
TIMEOUT_S = 300.0
POLL_S = 0.05


def probe_step(
    config: RunConfig,
    limit_bytes: int,
    *,
    command: Sequence[str] = COMMAND,
    timeout_s: float = TIMEOUT_S,
) -> Probed:
    """Take two steps of a configuration in a process of its own.

    Args:
        config: The run; the probe takes no more than two of its micro-batches a step.
        limit_bytes: What its device may use, and its process where both are one; above it is killed.
        command: How the process is started.
        timeout_s: After this it counts as too large: it swaps.
    """
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as failed:
        process = _start(config, command, told, failed)
        peak, why = _wait(
            process, limit_bytes, timeout_s, shared=shares_memory(config.train.backend)
        )
        told.seek(0)
        failed.seek(0)
        lines = failed.read().decode(errors="replace").strip().splitlines()
        return _judge(process.returncode, _answer(told.read()), peak, why, lines, limit_bytes)


def _start(
    config: RunConfig, command: Sequence[str], out: IO[bytes], err: IO[bytes]
) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=env)
    if process.stdin is not None:
        try:
            process.stdin.write(config.model_dump_json().encode())
            process.stdin.close()
        except BrokenPipeError:  # it ended at once; its exit code says how
            pass
    return process


def _wait(
    process: "subprocess.Popen[bytes]", limit_bytes: int, timeout_s: float, *, shared: bool
) -> tuple[int, str]:
    """The most memory it was seen with, and why it was killed, if it was."""
    peak, why, deadline = 0, "", time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            seen = process_memory(process.pid) if shared else None
            peak = max(peak, 0 if seen is None else seen.memory_bytes)
            if peak > limit_bytes:
                why = f"it used more than {limit_bytes / 1e9:.1f} GB"
            elif time.monotonic() > deadline:
                why = f"two steps took more than {timeout_s:.0f} s"
            if why:
                break
            time.sleep(POLL_S)
    finally:  # also where the caller is interrupted
        if process.poll() is None:
            process.kill()
        process.wait()
    return peak, why


def _answer(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text.decode().strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _judge(
    code: int,
    answer: Mapping[str, Any],
    peak: int,
    why: str,
    lines: Sequence[str],
    limit_bytes: int,
) -> Probed:
    peak = max(peak, int(answer.get("peak_bytes") or 0))
    if why:
        return Probed("too large", peak or None, why)
    if answer.get("out_of_memory"):
        return Probed("too large", peak or None, str(answer["out_of_memory"]))
    if code < 0:  # Metal aborts, and a system without memory kills
        return Probed("too large", peak or None, f"it ended by signal {-code}")
    if code != 0 or "peak_bytes" not in answer:
        return Probed("failed", None, lines[-1] if lines else f"exit code {code}")
    if peak > limit_bytes:
        return Probed("too large", peak, f"it used {peak / 1e9:.1f} GB")
    return Probed("fits", peak or None)


def main(load: Callable[[str], Any] | None = None) -> int:
    """The process itself: a configuration on stdin, one JSON object on stdout.

    Args:
        load: Returns `create` of a backend by its name; by default the registry's.
    """
    import backends
    from core.checkpoint import initial_checkpoint
    from core.machine.speed import measure_tokens_per_s
    from core.params import param_specs

    config = RunConfig.model_validate_json(sys.stdin.read())
    parts = min(config.train.grad_accum_steps, 2)
    train = config.train.model_copy(update={"grad_accum_steps": parts})
    config = config.model_copy(update={"train": train})
    specs = param_specs(config.model)
    create = (load or backends.load)(config.train.backend)
    try:
        backend = create(config, specs, mode="train")
        backend.load(initial_checkpoint(config, specs))
        for _ in range(2):  # the second has all of the first's state beside it
            measure_tokens_per_s(backend, config, seconds=0.0)
        device = backend.memory().peak_bytes or 0
    except OutOfMemory as error:
        print(json.dumps({"out_of_memory": error.found or error.what}))
        return 0
    except MemoryError as error:
        print(json.dumps({"out_of_memory": str(error) or "the host's memory"}))
        return 0
    except PippinError as error:
        print(error.what, file=sys.stderr)
        return error.exit_code
    own = process_memory(os.getpid()) if shares_memory(config.train.backend) else None
    print(json.dumps({"peak_bytes": max(device, 0 if own is None else own.memory_bytes)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
