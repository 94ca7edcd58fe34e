"""convert.py: any checkpoint to any other, bit by bit, and clear refusals.

Run: python -m pytest tests/cli/test_convert.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

import convert
import generate
from core.checkpoint import Checkpoint
from tests.checkpoint_helpers import OPEN, SUFFIXES, contents, tiny_tensors, write_tiny
from tests.cli.runs import start, train_here

ROOT = Path(__file__).resolve().parents[2]

# Runs convert.py as if neither torch nor MLX were installed.
WITHOUT_FRAMEWORKS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "mlx"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n in ("torch", "mlx") else real(n, p)
import convert
code = convert.main(sys.argv[1:])
sys.exit("a framework was imported" if {"torch", "mlx"} & set(sys.modules) else code)
"""


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert a.meta == b.meta
    for (name, x), (other, y) in zip(contents(a), contents(b)):
        assert (name, x.dtype, x.shape) == (other, y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("source", SUFFIXES)
@pytest.mark.parametrize("target", SUFFIXES)
def test_every_pair_of_suffixes_is_bit_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, target: str
) -> None:
    src, dst = write_tiny(tmp_path / f"a{source}"), tmp_path / "new" / f"b{target}"
    assert convert.main([str(src), str(dst)]) == 0
    assert_same(OPEN[source](src), OPEN[target](dst))
    out = capsys.readouterr().out
    assert "step 500" in out and "170 parameters" in out
    assert f"{dst.stat().st_size:,} bytes" in out
    assert "largest difference 0" in out
    assert f"python train.py --resume {dst}" in out


def test_weights_only_leaves_state_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = write_tiny(tmp_path / "a.npz"), tmp_path / "b.pt"
    assert convert.main([str(src), str(dst), "--weights_only"]) == 0
    ckpt = OPEN[".pt"](dst)
    assert ckpt.names == tuple(n for n in tiny_tensors() if not n.startswith(("optim/", "ema/")))
    assert ckpt.meta.kind == "weights"
    out = capsys.readouterr().out
    assert "--resume" not in out and "generate.py" in out


def test_the_command_that_follows_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run lies outside ./checkpoints, so its tokenizer is named; a finished run is made longer."""
    monkeypatch.chdir(tmp_path)
    assert train_here(*start(tmp_path, "--save-dir", "elsewhere/r")) == 0
    capsys.readouterr()
    assert convert.main(["elsewhere/r", "w.npz", "--weights-only"]) == 0
    assert convert.main(["elsewhere/r", "whole.npz"]) == 0
    assert convert.main(["elsewhere/r/step_000004.pt", "four.npz"]) == 0
    out = capsys.readouterr().out
    lines = [line.split()[2:] for line in out.splitlines() if line.startswith("next")]
    assert [line[0] for line in lines] == ["generate.py", "train.py", "train.py"]
    assert lines[1][-1] == "train.total_steps=12" and "total_steps" not in lines[2][-1]
    assert generate.main([*lines[0][1:], "--max-new-tokens", "2", "--backend", "cpu"]) == 0
    for command in lines[1:]:
        assert train_here(*command[1:]) == 0


def test_a_copy_that_differs_is_not_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    src = write_tiny(tmp_path / "a.npz", seed=1)
    dst = write_tiny(tmp_path / "b.pt", seed=2)
    before = dst.read_bytes()
    monkeypatch.setattr(convert, "largest_difference", lambda a, b: 0.5)
    assert convert.main([str(src), str(dst), "--overwrite"]) == 2
    assert "differs from it by 0.5" in capsys.readouterr().err
    assert dst.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.pt"]


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_tiny(tmp_path / "a.npz", seed=1)
    dst = write_tiny(tmp_path / "b.pt", seed=2)
    before = dst.read_bytes()
    assert convert.main([str(src), str(dst)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert dst.read_bytes() == before
    assert convert.main([str(src), str(dst), "--overwrite"]) == 0
    assert_same(OPEN[".npz"](src), OPEN[".pt"](dst))
    assert convert.main([str(src), str(src), "--overwrite"]) == 2
    assert convert.main([str(src), str(tmp_path / "a.npz" / "x.pt")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_folder_or_name_means_its_newest_intact_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "checkpoints" / "stories-1"
    run.mkdir(parents=True)
    for step in (100, 200):
        write_tiny(run / f"step_{step:06d}.npz", step=step, seed=step)
    write_tiny(run / "step_000300.npz", step=300).write_bytes(b"PK\x03\x04 cut short")
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate((str(run), "stories-1")):
        assert convert.main([name, f"out{i}.pt"]) == 0
        captured = capsys.readouterr()
        assert "step 200" in captured.out
        assert "step_000300.npz was skipped" in captured.err
    assert convert.main(["storys-1", "x.pt"]) == 2
    assert "available: stories-1" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert convert.main(["empty", "x.pt"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.npz", "b.safetensors"], "P306 no checkpoint format has the suffix '.safetensors'"),
        (["a.npz", "b"], "P306"),
        (["a.npz"], "P012"),
        (["a.npz", "b.pt", "--weights"], "P012"),
        (["missing.npz", "b.pt"], "P302"),
        (["damaged.npz", "b.pt"], "P303"),
        (["a.npz", "folder.pt"], "is a folder"),
    ],
)
def test_mistakes_are_clear_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = write_tiny(tmp_path / "a.npz").read_bytes()
    (tmp_path / "damaged.npz").write_bytes(whole[:-1])
    (tmp_path / "folder.pt").mkdir()
    assert convert.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert not (tmp_path / "b.pt").exists()
    assert convert.main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_npz_needs_no_framework_and_pt_names_the_install_line(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "a.npz")

    def run(dst: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_FRAMEWORKS, str(src), str(tmp_path / dst)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = run("b.npz")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.npz").read_bytes() == src.read_bytes()
    refused = run("b.pt")
    assert refused.returncode == 2, refused.stderr
    assert "pip install torch" in refused.stderr


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "a.pt")
    command = [sys.executable, str(ROOT / "convert.py"), str(src), "b.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(OPEN[".pt"](src), OPEN[".npz"](tmp_path / "b.npz"))
