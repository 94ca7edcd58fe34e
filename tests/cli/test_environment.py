"""Scripts started by a Python without the packages: .venv's goes on, or one line says what to type.

Run: python -m pytest tests/cli/test_environment.py
"""

import ast
import os
import shutil
import signal
import subprocess
import sys

import pytest

from core import environment
from core.errors import PippinError
from core.paths import PROJECT_ROOT

ENTRIES = ("train.py", "convert.py", "generate.py", "auto_config.py")
TOOLS = sorted(
    str(p.relative_to(PROJECT_ROOT))
    for p in (PROJECT_ROOT / "tools").glob("*.py")
    if "__main__" in p.read_text()
)


@pytest.fixture
def clone(tmp_path):
    """The project without a .venv: scripts are copies, so that they find their own root."""
    root = tmp_path / "a clone"
    (root / "core").mkdir(parents=True)
    for name in ("__init__.py", "environment.py"):
        shutil.copy(PROJECT_ROOT / "core" / name, root / "core" / name)
    for name in (*ENTRIES, *TOOLS):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT_ROOT / name, root / name)
    return root


def make_venv(root, script):
    """A .venv whose Python is a shell script."""
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def bare(script, *args, cwd):
    """Run a script with this Python without its site-packages."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-S", "-s", script, *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", [*ENTRIES, *TOOLS])
def test_without_an_environment_one_line_says_what_to_type(clone, script):
    done = bare(script, "--help", cwd=clone)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("P502 numpy, ") and "Traceback" not in done.stderr
    assert "\n  try: ./setup.sh " in done.stderr


def test_the_command_to_type_is_right_from_another_folder(clone):
    done = bare("../train.py", cwd=clone / "core")
    assert done.returncode == 2 and "\n  try: ../setup.sh " in done.stderr


@pytest.mark.parametrize("script", [*ENTRIES, *TOOLS])
def test_the_same_command_goes_on_with_the_environment(clone, script):
    make_venv(clone, 'printf "%s|" "$@"; exit 7')
    done = bare(script, "--prompt", "a b'c", "", cwd=clone)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"{script}|--prompt|a b'c||"


def test_an_environment_without_the_packages_is_no_endless_loop(clone):
    make_venv(clone, f'exec "{sys.executable}" -S -s "$@"')
    done = bare("train.py", cwd=clone)
    assert done.returncode == 2 and done.stderr.count("P502") == 1


def test_an_environment_that_cannot_be_started_is_named(clone):
    make_venv(clone, "")
    (clone / ".venv" / "bin" / "python").write_bytes(b"\x7fELF")
    done = bare("train.py", cwd=clone)
    assert done.returncode == 2 and ".venv/bin/python cannot be started" in done.stderr


def test_a_python_with_the_packages_is_left_alone(clone):
    make_venv(clone, "exit 7")
    code = "from core.environment import use_environment as use; use(); print('went on')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_an_old_python_is_told_so_and_goes_on_with_the_environment(clone):
    path = clone / "core" / "environment.py"
    path.write_text(path.read_text().replace("(3, 10)", "(99, 0)"))
    done = bare("train.py", cwd=clone)
    assert done.returncode == 2
    assert done.stderr.startswith("P502 Pippin needs Python 99.0 or newer; this is 3.")
    make_venv(clone, "exit 7")
    assert bare("train.py", cwd=clone).returncode == 7


@pytest.mark.parametrize("name", ["core/__init__.py", "core/environment.py", *ENTRIES, *TOOLS])
def test_an_old_python_can_read_what_tells_it_so(name):
    ast.parse((PROJECT_ROOT / name).read_text(), feature_version=(3, 8))


def test_commands_are_those_of_a_shell_without_python(monkeypatch):
    """A stock Mac has python3 only; words and paths that are no command stay."""
    environment._has_python.cache_clear()
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    text = "python train.py --resume a\n  try: python tools/prepare_data.py plan   (or python -m pytest)"
    found = environment.as_typed(text)
    assert found.count("python3 ") == 3 and "python train" not in found
    for other in (".venv/bin/python train.py", "python is a language", "mypython train.py"):
        assert environment.as_typed(other) == other
    error = PippinError("P012", "no.", remedy="python train.py --print-config")
    assert "try: python3 train.py --print-config" in error.render()
    monkeypatch.undo()
    environment._has_python.cache_clear()


def test_commands_stay_where_there_is_a_python(monkeypatch):
    environment._has_python.cache_clear()
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/usr/bin/python")
    assert environment.as_typed("python train.py") == "python train.py"
    monkeypatch.undo()
    environment._has_python.cache_clear()


@pytest.mark.parametrize("script", ["train.py", "generate.py", "convert.py"])
def test_ctrl_c_while_it_is_imported_is_no_traceback(clone, script):
    package = clone / "backends" / "__init__.py"
    package.parent.mkdir()
    package.write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_of_a_command_is_its_own(monkeypatch):
    previous = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, environment._leave)
        environment.take_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a background job's, which stays
        environment.take_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
