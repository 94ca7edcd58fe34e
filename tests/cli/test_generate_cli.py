"""`generate.py` on real checkpoints: a tiny random model, both formats, every backend that runs here.

Run: pytest tests/cli/test_generate_cli.py
"""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import backends
import generate
from core.checkpoint import initial_checkpoint
from core.config.schema import RunConfig
from core.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer
from core.machine import remembered
from core.params import param_specs
from tests.helpers import random_params, tiny_config
from tests.reference import model_np

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = [name for name, state in backends.available().items() if state.ok]
VOCAB = ByteTokenizer().vocab_size
CONFIG = tiny_config(model__vocab_size=VOCAB, model__max_seq_len=24)


def write_checkpoint(
    path: Path, *, seed: int = 0, step: int = 5, config: RunConfig = CONFIG, tokenizer=None
) -> Path:
    """A checkpoint of random weights, as a run would leave it."""
    tokenizer = tokenizer or ByteTokenizer()
    identity = {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    specs = param_specs(config.model)
    meta = initial_checkpoint(config, specs, tokenizer=identity).meta
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = random_params(specs, seed=seed)
    backends.checkpoint_format(path.suffix).write(path, replace(meta, step=step), tensors.items())
    return path


def make_run(folder: Path, *names: str) -> Path:
    """A run folder with a tokenizer; each checkpoint has other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        write_checkpoint(folder / name, seed=seed, step=5 + seed)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_json(capsys, *args: str) -> list[dict]:
    code = generate.main([*args, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return [json.loads(line) for line in captured.out.splitlines()]


def run_error(capsys, *args: str) -> str:
    assert generate.main(["--backend", "cpu", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def greedy_by_hand(prompt: str, count: int, *, seed: int = 0) -> list[int]:
    """Greedy tokens by the float64 reference, without a cache."""
    params = {
        k: v.astype(np.float64)
        for k, v in random_params(param_specs(CONFIG.model), seed=seed).items()
    }
    ids = [256, *prompt.encode()]
    for _ in range(count):
        logits = model_np.logits(params, np.array([ids], np.int32), CONFIG.model)
        ids.append(int(logits[0, -1].argmax()))
    written = ids[-count:]
    return written[: written.index(256)] if 256 in written else written


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_a_run_name_suffices_and_greedy_equals_the_reference(here, capsys, backend, suffix):
    make_run(here / "checkpoints" / "a", f"best{suffix}")
    args = ["--model_name", "a", "--prompt", "It was", "--temperature", "0"]
    (found,) = run_json(capsys, *args, "--max_new_tokens=9", "--backend", backend)
    expected = greedy_by_hand("It was", 9)
    assert found["tokens"] == expected and len(expected) == 9
    assert found["prompt"] == "It was" and found["prompt_tokens"] == [256, *b"It was"]
    assert found["text"] == bytes(t for t in found["tokens"] if t < 256).decode(errors="replace")
    assert found["stop_reason"] == "length" and found["backend"] == backend
    assert found["checkpoint"] == str(Path("checkpoints") / "a" / f"best{suffix}")
    assert found["step"] == 5
    assert found["tokens_per_second"] == pytest.approx(9 / found["seconds"])


def test_sampled_texts_are_equal_on_every_backend(here, capsys):
    make_run(here / "checkpoints" / "a", "best.npz")
    args = ["a", "--prompt", "It", "--num-samples", "3", "--max-new-tokens", "12", "--top-p", "0.9"]
    texts = [
        [found["tokens"] for found in run_json(capsys, *args, "--backend", name)]
        for name in BACKENDS
    ]
    assert len(texts[0]) == 3 and len({tuple(t) for t in texts[0]}) == 3
    assert all(other == texts[0] for other in texts[1:])


def test_the_best_is_preferred_then_the_newest_step(here, capsys):
    run = make_run(here / "checkpoints" / "a", "step_000006.npz", "step_000010.pt", "best.npz")
    short = ["a", "--max-new-tokens", "1", "--backend", "cpu"]
    assert Path(run_json(capsys, *short)[0]["checkpoint"]).name == "best.npz"
    (run / "best.npz").unlink()
    assert Path(run_json(capsys, *short)[0]["checkpoint"]).name == "step_000010.pt"


@pytest.mark.parametrize("names", [("best.pt", "best.npz"), ("best.npz", "best.pt")])
def test_of_two_bests_the_later_step_counts_and_no_time_of_a_file(here, capsys, names):
    run = make_run(here / "checkpoints" / "a", *names)
    os.utime(run / names[0], (2e9, 2e9))
    (found,) = run_json(capsys, "a", "--max-new-tokens", "1", "--backend", "cpu")
    assert (Path(found["checkpoint"]).name, found["step"]) == (names[1], 6)


def test_a_damaged_checkpoint_is_passed_over_with_a_note(here, capsys):
    run = make_run(here / "checkpoints" / "a", "step_000006.npz", "best.npz")
    data = bytearray((run / "best.npz").read_bytes())
    data[len(data) // 2] ^= 4
    (run / "best.npz").write_bytes(data)
    code = generate.main(["a", "--backend", "cpu", "--json", "--max-new-tokens", "1"])
    captured = capsys.readouterr()
    assert code == 0 and json.loads(captured.out)["checkpoint"].endswith("step_000006.npz")
    assert "best.npz was passed over: P303" in captured.err
    assert "P303" in run_error(capsys, str(run / "best.npz"))


def test_a_checkpoint_that_was_moved_finds_its_tokenizer_in_the_runs(here, capsys):
    make_run(here / "checkpoints" / "other", "best.npz")
    CharTokenizer("abc").save(make_run(here / "checkpoints" / "wrong"))
    moved = write_checkpoint(here / "somewhere" / "model.pt")
    (found,) = run_json(capsys, str(moved), "--max-new-tokens", "2", "--backend", "cpu")
    assert found["checkpoint"] == str(moved)
    shutil.rmtree(here / "checkpoints")
    assert "P301" in run_error(capsys, "--checkpoint", str(moved))
    ByteTokenizer().save(here)
    given = [str(moved), "--tokenizer", ".", "--max-new-tokens", "2", "--backend", "cpu"]
    assert run_json(capsys, *given)[0]["tokens"] == found["tokens"]


def test_another_tokenizer_is_refused(here, capsys):
    run = make_run(here / "checkpoints" / "a", "best.npz")
    (run / "tokenizer.pippin.json").unlink()
    other = CharTokenizer("abc")
    other.save(run)
    message = run_error(capsys, "a")
    assert message.startswith("P301")
    assert ByteTokenizer().fingerprint[:12] in message and other.fingerprint[:12] in message


def test_an_unknown_run_lists_those_that_exist(here, capsys):
    make_run(here / "checkpoints" / "stories-1", "best.npz")
    write_checkpoint(here / "checkpoints" / "stories-2" / "step_000001.npz")
    message = run_error(capsys, "--model-name", "stori")
    assert "'stori'" in message and "stories-2" in message


def test_a_run_without_a_checkpoint_says_so(here, capsys):
    make_run(here / "checkpoints" / "a")
    assert "holds no checkpoint yet" in run_error(capsys, "a")


def test_no_run_at_all_says_how_to_make_one(here, capsys):
    assert "train.py" in run_error(capsys)


def test_without_a_name_the_newest_run_is_used_and_named(here, capsys):
    make_run(here / "checkpoints" / "a", "step_000002.npz")
    assert generate.main(["--backend", "cpu", "--max-new-tokens", "1"]) == 0
    assert "[newest run: a]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature", "-1"], ["P601", "temperature is -1.0"]),
        (["--top-p", "0", "--top_k", "-2"], ["P601", "top_p", "top_k"]),
        (["--prompt", "x" * 25], ["P601", "25 tokens", "24"]),
        (["--max-new-tokens", "0"], ["P601", "max_new_tokens is 0"]),
        (["--num-samples", "0"], ["P601", "num_samples is 0"]),
        (["--temp", "1"], ["P012", "--temp"]),
        (["--seed", "x"], ["P012", "--seed"]),
        (["--checkpoint", "b"], ["P012", "2 models"]),
        (["--precision", "float8"], ["P012", "float8"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_message(here, capsys, args, words):
    make_run(here / "checkpoints" / "a", "best.npz")
    message = run_error(capsys, "a", *args)
    assert all(word in message for word in words)


def test_a_backend_that_is_missing_is_an_error(here, capsys):
    make_run(here / "checkpoints" / "a", "best.npz")
    missing = next(name for name in backends.MODULES if name not in BACKENDS)
    assert generate.main(["a", "--backend", missing]) == 2
    assert capsys.readouterr().err.startswith("P50")


def test_debug_shows_the_traceback(here, capsys):
    assert generate.main(["nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_text_is_streamed_to_stdout_and_facts_to_stderr(here, capsys):
    make_run(here / "checkpoints" / "a", "best.npz")
    args = ["a", "--prompt", "Once", "--backend", "cpu", "--max-new-tokens", "15"]
    (found,) = run_json(capsys, *args)
    assert generate.main(args) == 0
    captured = capsys.readouterr()
    assert captured.out == "Once" + found["text"] + "\n"
    assert "15 tokens" in captured.err and "best.npz (step 5, cpu)" in captured.err
    assert generate.main([*args, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_prompt_can_come_from_stdin(here, capsys, monkeypatch):
    make_run(here / "checkpoints" / "a", "best.npz")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\nupon"))
    (found,) = run_json(capsys, "a", "--prompt", "-", "--backend", "cpu", "--max-new-tokens", "1")
    assert found["prompt"] == "Once\nupon"


def test_a_prompt_on_stdin_that_is_not_utf_8_is_told_so(here, capsys, monkeypatch):
    make_run(here / "checkpoints" / "a", "best.npz")
    latin = io.TextIOWrapper(io.BytesIO("Un caf\u00e9".encode("latin-1")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", latin)
    err = run_error(capsys, "a", "--prompt", "-", "--backend", "cpu")
    assert err.startswith("P202") and "0xe9" in err and "iconv" in err


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + b"x" * 500])
def test_a_best_that_is_no_checkpoint_gives_way_to_the_newest_step(here, capsys, content):
    run = make_run(here / "checkpoints" / "a", "step_000005.npz")
    (run / "best.npz").write_bytes(content)
    args = ["a", "--prompt", "Once", "--backend", "cpu", "--max-new-tokens", "1"]
    assert generate.main(args) == 0
    err = capsys.readouterr().err
    assert "best.npz was passed over: P30" in err and "step_000005.npz" in err


def test_a_terminal_never_gets_a_control_code(here, monkeypatch):
    """A prompt with escapes, and random bytes from the model, to something that is a terminal."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    make_run(here / "checkpoints" / "a", "best.npz")
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    args = ["a", "--prompt", "\x1b[2Jhi\u202e", "--backend", "cpu", "--temperature", "3", "--quiet"]
    assert generate.main(args) == 0
    assert out.getvalue().startswith("\u241b[2Jhi")
    assert all(c >= " " or c in "\n\t" for c in out.getvalue())
    assert not any("\x7f" <= c < "\xa0" or c == "\u202e" for c in out.getvalue())


def test_ctrl_c_ends_the_text_and_exits_130(here, capsys, monkeypatch):
    make_run(here / "checkpoints" / "a", "best.npz")
    from core.inference.terminal import _Stream

    feed, seen = _Stream.token, []

    def interrupted(self, row, token):
        feed(self, row, token)
        seen.append(token)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Stream, "token", interrupted)
    args = ["a", "--prompt", "Once", "--backend", "cpu"]
    assert generate.main(args) == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("Once") and captured.out.endswith("\n")
    assert "Traceback" not in captured.err


def test_flags_take_dashes_or_underscores(here):
    left = generate.parse_args(["--max_new_tokens=3", "--top_k", "4", "--model_name", "a_b"])
    right = generate.parse_args(["--max-new-tokens", "3", "--top-k", "4", "--model-name", "a_b"])
    assert vars(left) == vars(right) and left.model == "a_b"
    assert generate.parse_args(["--seed", "1", "--seed", "2"]).seed == 2


def test_it_runs_as_a_program(here):
    """From another folder, in a pipe, with an encoding that lacks most characters."""
    make_run(here / "checkpoints" / "a", "best.npz")
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), "a", "--backend", "cpu", "--prompt", "Once"],
        capture_output=True,
        cwd=here,
        env={"PATH": "", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert done.stdout.startswith(b"Once") and done.stdout.isascii()


def test_auto_is_the_backend_that_was_measured_as_in_training(here, capsys, monkeypatch):
    make_run(here / "checkpoints" / "a", "best.npz")
    monkeypatch.setattr(
        remembered, "fastest", lambda available: (("mlx", "measured"), "of other versions")
    )
    (found,) = run_json(capsys, "a", "--max-new-tokens", "1")
    assert found["backend"] == "mlx"
    monkeypatch.setattr(remembered, "fastest", lambda available: (None, ""))
    (found,) = run_json(capsys, "a", "--max-new-tokens", "1")
    assert found["backend"] != "mlx"
