"""setup.sh with stand-ins for uname, uv, sysctl and Python: what it checks, makes and installs.

Run: python -m pytest tests/cli/test_setup.py
"""

import os
import shutil
import subprocess

import pytest

from core.paths import PROJECT_ROOT

PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit {old} ;;
  *platform.machine*) echo {machine} ;;
  *venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/pyvenv.cfg ;;
  *--version*) echo "Python 3.12.1" ;;
  *) echo "python $*" >> calls ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >> calls
if [ "$1" = venv ]; then
  mkdir -p .venv/bin; cp fake/python3 .venv/bin/python; touch .venv/pyvenv.cfg
fi
"""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path):
    """A project with setup.sh, and programs of a Linux machine without uv."""
    for name in ("setup.sh", "pyproject.toml", "constraints-ci.txt"):
        shutil.copy(PROJECT_ROOT / name, tmp_path)
    script(tmp_path / "fake" / "uname", "#!/bin/sh\necho Linux\n")
    script(tmp_path / "fake" / "python3", PYTHON.format(old=0, machine="x86_64"))
    for tool in ("sh", "cat", "cksum", "dirname", "date", "mkdir", "cp", "rm", "touch"):
        (tmp_path / "fake" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def mac(project, machine):
    script(project / "fake" / "uname", "#!/bin/sh\necho Darwin\n")
    script(project / "fake" / "sysctl", "#!/bin/sh\necho 1\n")
    script(project / "fake" / "python3", PYTHON.format(old=0, machine=machine))


def run(project, *args, **env):
    return subprocess.run(
        ["./setup.sh", *args],
        cwd=project,
        env={"PATH": str(project / "fake"), "HOME": os.environ.get("HOME", "/")} | env,
        capture_output=True,
        text=True,
    )


def setup(project, *args):
    """Run it; returns the exit code, stderr, and the installing calls."""
    done = run(project, *args)
    calls = project / "calls"
    return done.returncode, done.stderr, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("with_uv", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_gets_the_range_of_pyproject_and_tests_get_the_pins(project, with_uv, gpu):
    if with_uv:
        script(project / "fake" / "uv", UV)
    if gpu:
        script(project / "fake" / "nvidia-smi", "#!/bin/sh\n")
    code, err, calls = setup(project)
    assert code == 0, err
    assert "install" in calls and ("constraints" not in calls) == gpu
    code, err, calls = setup(project, "dev")
    assert code == 0, err
    assert "-c constraints-ci.txt" in calls and "[dev,mlx-cpu]" in calls


@pytest.mark.parametrize("args", [("usr",), ("",), ("test",), ("dev", "x"), ("user", ""), ("--h",)])
def test_an_unknown_kind_is_refused_before_anything_is_made(project, args):
    done = run(project, *args)
    assert done.returncode == 2 and done.stderr.startswith("P012")
    assert "try: ./setup.sh --help" in done.stderr and done.stdout == ""
    assert not (project / ".venv").exists() and not (project / "calls").exists()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_the_usage_and_makes_nothing(project, flag):
    done = run(project, flag)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: ./setup.sh") and "./setup.sh dev" in done.stdout
    assert not (project / ".venv").exists() and not (project / "calls").exists()


def test_user_is_the_kind_without_a_word(project):
    assert run(project, "user").returncode == 0
    assert run(project).stdout.split() == ["next", ".venv/bin/python", "train.py"]


def test_a_second_call_does_nothing(project):
    assert setup(project)[0] == 0
    before = (project / "calls").read_text()
    assert setup(project) == (0, "", before)


@pytest.mark.parametrize("with_uv", [False, True])
def test_an_old_environment_is_made_anew(project, with_uv):
    if with_uv:
        script(project / "fake" / "uv", UV)
    script(project / ".venv" / "bin" / "python", PYTHON.format(old=1, machine="x86_64"))
    (project / ".venv" / "pyvenv.cfg").touch()
    (project / ".venv" / "stale").touch()
    code, err, _ = setup(project)
    assert code == 0, err
    assert not (project / ".venv" / "stale").exists()
    assert (project / ".venv" / "bin" / "python").read_text() == PYTHON.format(
        old=0, machine="x86_64"
    )


@pytest.mark.parametrize("with_uv", [False, True])
def test_an_intel_python_on_apple_silicon_is_refused(project, with_uv):
    mac(project, "x86_64")
    if with_uv:
        script(project / "fake" / "uv", UV)
    code, err, calls = setup(project)
    assert code == 2 and err.startswith("P502") and "Rosetta" in err and "try: brew" in err
    assert "install" not in calls
    mac(project, "arm64")
    assert setup(project)[0] == 0


def test_it_ends_with_a_test_of_the_accelerator_and_the_next_command(project):
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert (project / "calls").read_text().splitlines()[-1] == (
        "python tools/setup_verification.py --quick"
    )
    assert done.stdout.splitlines()[-1].split() == ["next", ".venv/bin/python", "train.py"]
    assert run(project).stdout == done.stdout.splitlines(keepends=True)[-1]
    assert run(project, MAKELEVEL="1").stdout == ""  # make goes on by itself


def test_tests_and_checks_are_set_up_without_it(project):
    assert setup(project, "dev")[0] == 0
    assert "setup_verification" not in (project / "calls").read_text()


@pytest.mark.parametrize("with_uv", [False, True])
def test_a_self_test_that_fails_is_loud_and_is_run_again(project, with_uv):
    if with_uv:
        script(project / "fake" / "uv", UV)
    broken = PYTHON.replace(
        "  *version_info*)", "  *setup_verification*) exit 1 ;;\n  *version_info*)"
    )
    script(project / "fake" / "python3", broken.format(old=0, machine="x86_64"))
    for _ in range(2):
        code, err, _ = setup(project)
        assert code == 1 and err.startswith("P402") and "tools/setup_verification.py" in err
    script(project / ".venv" / "bin" / "python", PYTHON.format(old=0, machine="x86_64"))
    assert setup(project)[0] == 0


@pytest.mark.parametrize(("step", "code"), [("-m venv", 2), ("pip install", 2)])
def test_a_step_that_fails_ends_it(project, step, code):
    broken = PYTHON.replace("  *version_info*)", f"  *'{step}'*) exit 1 ;;\n  *version_info*)")
    script(project / "fake" / "python3", broken.format(old=0, machine="x86_64"))
    done = run(project)
    assert done.returncode == code and done.stderr.startswith("P502")
    assert "next" not in done.stdout
