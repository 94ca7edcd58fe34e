"""`--allow-cpu-fallback`: the only way to let the CPU compute what MPS has no kernel for.

Run: python -m pytest tests/cli/test_cpu_fallback.py
"""

import os
import warnings

import pytest

import generate
from backends.fallback import ASKED, VARIABLE
from tests.cli.runs import start, train_here


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (VARIABLE, ASKED):  # and put back what a test leaves
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    shown = warnings.showwarning
    yield tmp_path
    warnings.showwarning = shown


def test_the_variable_alone_is_taken_away_and_told(here, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "1")
    assert train_here(*start(here), "--dry-run") == 0
    out = capsys.readouterr().out
    assert f" ! {VARIABLE}=1 in the environment is not used" in out and VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, "1")
    assert generate.main(["no-such-run"]) == 2
    assert f"[{VARIABLE}=1 in the environment is not used" in capsys.readouterr().err
    assert VARIABLE not in os.environ


def test_the_flag_sets_it_and_says_so(here, capsys):
    assert train_here(*start(here), "--dry-run", "--allow-cpu-fallback") == 0
    out = capsys.readouterr().out
    assert "operators without an MPS kernel run on the CPU" in out
    assert os.environ[VARIABLE] == "1"


def test_neither_says_nothing(here, capsys):
    assert train_here(*start(here), "--dry-run") == 0
    assert "MPS" not in capsys.readouterr().out


def test_auto_is_a_number_of_rows_and_words_are_not(here, capsys):
    assert train_here(*start(here), "--micro-batch-size", "many") == 2
    assert "many" in capsys.readouterr().err
    args = [a for a in start(here) if a != "train.micro_batch_size=2"]
    assert train_here(*args, "--micro-batch-size", "auto", "--print-config") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "train.micro_batch_size" in x)
    assert " auto " in line and "fits: forecast" in line and "tokens a step" in line
