"""The command line: output, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from fusedrnn import backends, cli, terminal


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fusedrnn", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


# --- usage ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("command", [[], ["info"], ["gradcheck"], ["bench"], ["train"]], ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fusedrnn")


def test_without_a_command_it_is_help(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: fusedrnn")
    for command in cli.COMMANDS:
        assert f"\n    {command} " in out


def test_no_epochs_train_nothing(capsys):
    assert cli.main(["train", "sine", "--epochs", "0", "--cell", "gru", "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "GRU" in out
    assert "loss" not in out


def actions(parser: argparse.ArgumentParser, path: str = "fusedrnn"):
    for action in parser._actions:
        yield path, action
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from actions(below, f"{path} {name}")


def test_every_option_has_a_help_text():
    silent = [
        (path, a.dest)
        for path, a in actions(cli.parser())
        if not a.help and a.metavar not in ("COMMAND", "NAME")
    ]
    assert not silent


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["bench", "--cell", "transformer"],
        ["bench", "--shape", "1,2,3"],
        ["bench", "--shape", "1,2,3,0"],
        ["bench", "--shape", "1,2,3,x"],
        ["bench", "--threads", "0"],
        ["bench", "--threads", "two"],
        ["bench", "--peers", "cudnn"],
        ["bench", "--suite", "everything"],
        ["bench", "--suite", "rl", "--shape", "1,2,3,4"],
        ["train"],
        ["train", "nothing"],
        ["train", "sine", "--epochs", "-1"],
        ["train", "sine", "--epochs", "1.5"],
        ["train", "pollution", "--epochs", "-3"],
        ["train", "airline", "--seed", "-1"],
        ["gradcheck", "--seed", "-1"],
        ["gradcheck", "--option", "everything"],
        ["gradcheck", "--verbose", "--tensors"],
        ["info", "--colour"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("fusedrnn")
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.quick
def test_an_error_is_one_line(monkeypatch, capsys):
    def fail(args):
        raise error

    for error, code in (
        (ValueError("x: expected\ntwo lines"), 2),
        (FileNotFoundError(2, "No such file", "data.csv"), 2),
        (ImportError("matplotlib is missing"), 2),
        (RuntimeError("broke off"), 1),
        (cli.Failed("a gradient is wrong"), 1),
        (MemoryError(), 1),
    ):
        monkeypatch.setattr(cli, "COMMANDS", {"info": ("", cli.add_info, fail)})
        assert cli.main(["info"]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("fusedrnn info: ")
        assert err.count("\n") == 1
        with pytest.raises(type(error)):
            cli.main(["--traceback", "info"])


def test_ctrl_c_is_exit_code_130():
    """Sent at work, which is when the second case begins: the first has imported everything. CPython may lose
    an interrupt that comes during an import, as it does in every finalizer.
    """
    code = """
import signal, sys
from fusedrnn import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a process started in the background
cli.note = lambda text: print(text, flush=True)  # how far it is, which only a terminal would be told
sys.exit(cli.main(["bench", "--quick", "--shape", "2,1,1,1", "9000,64,64,64", "--peers", "reference"]))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any(line.startswith("2 of 3: ") for line in process.stdout), process.stderr.read()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == "interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "fusedrnn", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0


# --- info -------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    for word in ("version", "compiler", "instruction sets built", "instruction set in use", "threads"):
        assert word in done.stdout
    for name in backends.NAMES:
        assert f"backend {name}" in done.stdout


def test_info_json():
    found = json.loads(run("info", "--json").stdout)
    assert set(found["backends"]) == set(backends.NAMES)
    assert found["backends"][found["backend"]] is None
    assert found["isa"] is None or (found["isa"] in found["built"] and found["isa"] in found["detected"])
    assert found["threads"] >= 1


def test_info_follows_the_environment():
    assert json.loads(run("info", "--json", FUSEDRNN_BACKEND="reference").stdout)["backend"] == "reference"


def test_a_wrong_environment_is_one_line():
    done = run("info", FUSEDRNN_BACKEND="abacus")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "FUSEDRNN_BACKEND" in done.stderr


def test_info_says_why_a_backend_is_absent(monkeypatch, capsys):
    class Absent:
        name = "numba"

        def unavailable(self):
            return "Numba is not installed: pip install 'fusedrnn[numba]'"

    get = backends.get
    monkeypatch.setattr(backends, "get", lambda name=None: Absent() if name == "numba" else get(name))
    assert cli.main(["info"]) == 0
    assert "absent: Numba is not installed: pip install 'fusedrnn[numba]'" in capsys.readouterr().out


# --- gradcheck --------------------------------------------------------------------------------------------

FEW = ("gradcheck", "--quick", "--cell", "gru", "--option", "plain", "lengths")


def test_choices_of_gradcheck_need_no_quotes():
    for _, action in actions(cli.parser()):
        if action.dest in ("option", "cell", "backend", "dtype"):
            for choice in action.choices:
                assert re.fullmatch(r"[a-z0-9-]+", choice), choice


@pytest.mark.quick
@pytest.mark.parametrize(("more", "lines"), [((), 6), (("--verbose",), 12), (("--tensors",), None)], ids=str)
def test_gradcheck(more, lines, capsys):
    assert cli.main([*FEW, "--backend", "oracle", "reference", *more]) == 0
    out = capsys.readouterr().out
    assert "gru reset_after=False" in out or "--tensors" in more
    if lines is not None:  # of each form the oracle, and the reference in two dtypes
        assert len([line for line in out.splitlines() if line.startswith("gru")]) == lines
        assert ("2 of 2" in out) == (not more)
    # two forms and two options: four proofs of the oracle, and the reference in two dtypes
    assert out.splitlines()[-1] == "12 passed, 0 failed, 0 not run"


def test_gradcheck_fails_on_a_wrong_gradient(monkeypatch, capsys):
    right = backends.get("reference")
    wrong_backward = right.backward

    def backward(tape, *arguments, **options):
        gradients = wrong_backward(tape, *arguments, **options)
        return gradients._replace(dx=gradients.dx * (1 + 1e-4)) if gradients.dx.dtype == "f4" else gradients

    monkeypatch.setattr(right, "backward", backward, raising=True)
    assert cli.main([*FEW, "--backend", "reference", "--dtype", "float32"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("fusedrnn gradcheck: gru reference float32 plain: ")
    assert err.count("\n") == 1
    assert out.splitlines()[-1] == "0 passed, 4 failed, 0 not run"


# --- tables -----------------------------------------------------------------------------------------------


def test_plain_table():
    text = terminal.plain_table("title", ["name", "ms"], [["a", "1.5"], ["long", "12"]])
    assert text.splitlines() == ["title", "name   ms", "a     1.5", "long   12"]


def test_the_table_says_the_same_with_and_without_rich(capsys, monkeypatch):
    arguments = ("title", ["name", "ms"], [["[bold]", "1.5"], ["long", "12"]])
    monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal.table(*arguments)
    plain = capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("rich", reason="rich is not installed")
    terminal.table(*arguments)
    assert capsys.readouterr().out.split() == plain.split()
