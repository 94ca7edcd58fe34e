"""The boundary of every command: flags in either spelling, errors in our form, exit codes."""

import pytest

from core.cli import ERROR_LOG, guarded, make_parser
from core.errors import CODES, PippinError


def _raise(error):
    def run():
        raise error

    return run


def test_flags_take_dashes_or_underscores_and_values_stay():
    parser = make_parser("tools/some.py", "First.\n\nSecond.")
    parser.add_argument("--save_dir")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("text", nargs="?")
    args = parser.parse_args(["--save-dir=a_b-c", "--max_steps", "3", "x_y-z"])
    assert (args.save_dir, args.max_steps, args.text) == ("a_b-c", 3, "x_y-z")
    assert parser.description == "First."


def test_flags_of_a_subcommand_too():
    parser = make_parser("tools/some.py", "Doc.")
    sub = parser.add_subparsers(dest="command").add_parser("go")
    sub.add_argument("--dry-run", action="store_true")
    assert parser.parse_args(["go", "--dry_run"]).dry_run


@pytest.mark.parametrize("argv", [["--max-stepz", "3"], ["--max-steps", "three"]])
def test_wrong_flags_name_the_command_that_helps(argv):
    parser = make_parser("tools/some.py", "Doc.")
    parser.add_argument("--max-steps", type=int)
    with pytest.raises(PippinError) as caught:
        parser.parse_args(argv)
    assert caught.value.code == "P012"
    assert "python tools/some.py --help" in caught.value.render()


def test_an_abbreviated_flag_is_refused():
    parser = make_parser("tools/some.py", "Doc.")
    parser.add_argument("--max-steps", type=int)
    with pytest.raises(PippinError):
        parser.parse_args(["--max", "3"])


def test_exit_codes_and_what_is_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guarded(lambda: 7, debug=False) == 7
    assert capsys.readouterr() == ("", "")
    assert guarded(_raise(PippinError("P302", "there is no run x.")), debug=False) == 2
    err = capsys.readouterr().err
    assert "P302" in err and "there is no run x." in err and "Traceback" not in err
    assert guarded(_raise(KeyboardInterrupt()), debug=False, aborted="stopped.") == 130
    assert capsys.readouterr().err == "\nstopped.\n"
    assert not (tmp_path / ERROR_LOG).exists()


def test_a_fault_of_ours_leaves_its_traceback_in_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guarded(_raise(ZeroDivisionError("one by none")), debug=False) == 1
    err = capsys.readouterr().err
    assert "P001" in err and "one by none" in err and ERROR_LOG in err and "Traceback" not in err
    assert "ZeroDivisionError: one by none" in (tmp_path / ERROR_LOG).read_text()


def test_a_fault_where_nothing_can_be_written_asks_for_debug(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ERROR_LOG).mkdir()
    assert guarded(_raise(ZeroDivisionError()), debug=False) == 1
    assert "--debug" in capsys.readouterr().err
    assert guarded(_raise(ZeroDivisionError()), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_the_environment_can_ask_for_tracebacks(capsys, tmp_path, monkeypatch, value, shown):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPPIN_DEBUG", value)
    assert guarded(_raise(PippinError("P302", "there is no run x.")), debug=False) == 2
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_the_fault_log_is_where_its_explanation_says():
    assert ERROR_LOG in CODES["P001"][1]
