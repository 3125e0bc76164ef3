"""The command line: output, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusedrnn import backends, cli, terminal
from fusedrnn.cells.files import load


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


def test_every_number_has_a_range():
    """What it refuses is in the list below."""
    assert not [(path, a.dest) for path, a in actions(cli.parser()) if a.type in (int, float)]


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
        ["bench", "--threads", "1000000"],
        ["bench", "--shape", "1,2,3,9999999999"],
        ["bench", "--json", "/"],
        ["bench", "--plot", "/"],
        ["bench", "--peers", "cudnn"],
        ["bench", "--suite", "everything"],
        ["bench", "--suite", "rl", "--shape", "1,2,3,4"],
        ["train"],
        ["train", "nothing"],
        ["train", "sine", "--epochs", "-1"],
        ["train", "sine", "--epochs", "1.5"],
        ["train", "pollution", "--epochs", "-3"],
        ["train", "pollution", "--every", "-1"],
        ["train", "pollution", "--every", "nan"],
        ["train", "pollution", "--every", "inf"],
        ["train", "classify", "--size", "3"],
        ["train", "classify", "--size", "9999999999"],
        ["train", "classify", "--patience", "0"],
        ["train", "continual", "--size", "-20"],
        ["train", "runoff", "--catchments", "0"],
        ["train", "sine", "--seed", "4294967296"],
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
sys.exit(cli.main(["bench", "--quick", "--shape", "2,1,1,1", "9000,64,64,64", "--peers", "reference"]))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any(line.startswith("2 of 3: ") for line in process.stderr)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == "interrupted\n"


def test_bench_shows_how_far_it_is_in_a_pipe(capsys):
    """At once what will run, then a line for each case; the table alone is in stdout."""
    command = ["bench", "--quick", "--forward", "--shape", "2,1,1,1", "3,1,1,1", "--threads", "1"]
    assert cli.main([*command, "--peers", "reference", "--backend", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "cases: 2, in float32; libraries: fusedrnn (cpu), reference; threads: 1",
        "1 of 3: lstm 2,1,1,1 forward",
        "2 of 3: lstm 3,1,1,1 forward",
        "3 of 3: matrix product",
    ]
    assert " of 3: " not in out


@pytest.mark.parametrize("command", [["-m", "fusedrnn"], ["fusedrnn"]], ids=" ".join)
def test_ctrl_c_during_the_imports_is_quiet(command, tmp_path):
    """Of which one never ends here: another module in place of NumPy."""
    (tmp_path / "numpy.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "fusedrnn").write_text("from fusedrnn.cli import main\nmain()\n")  # as pip makes it
    package = Path(cli.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, *command, "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"},
    ) as process:
        try:
            assert process.stdout.readline() == "importing\n", process.stderr.read()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "")
        finally:
            process.kill()
    assert process.returncode == 130


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


# --- a cell of the user's own -----------------------------------------------------------------------------

OWN = """\
from fusedrnn.cells import cell, tanh

count = 3


@cell
def simple(p, x, h):
    return tanh(p.dense("a", x, h))


@cell
def twice(p, x, h):
    return tanh(p.dense("b", x, tanh(p.dense("a", x, h))))


@cell
def misspelt(p, x, h):
    return tahn(p.dense("a", x, h))
"""


ASKS = """\
from fusedrnn.cells import cell, tanh


@cell
def asks(p, x, h):
    if h > 0:
        return h
    return tanh(p.dense("a", x, h))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of cells in the current folder; another one that fails."""
    (tmp_path / "own_cells.py").write_text(OWN)
    (tmp_path / "own_asks.py").write_text(ASKS)
    (tmp_path / "own_fails.py").write_text("import os\n\nos.environ['nobody sets this']\n")
    (tmp_path / "own_exits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "own_syntax.py").write_text("def f(:\n")
    (tmp_path / "queue.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("own_cells", "own_asks", "own_fails", "own_exits", "own_syntax", "file_queue"):
        sys.modules.pop(name, None)


@pytest.mark.quick
def test_info_of_a_cell(own, monkeypatch, capsys):
    assert cli.main(["info", "own_cells.py:twice"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("twice(p, x, h)\n")
    assert "(round 2)" in out.partition("saved")[0]
    assert "operations\n  forward: 4\n" in out
    assert "  reference: runs it\n" in out
    monkeypatch.setattr(backends, "refuses", lambda name, cell: f"{name} has no {cell.name}")
    assert cli.main(["info", "own_cells:simple"]) == 0  # by the name of its module
    assert "  cpu: cpu has no simple\n" in capsys.readouterr().out


def test_a_cell_of_a_file_can_be_pickled(own):
    found = load("own_cells.py:simple")
    assert pickle.loads(pickle.dumps(found)) == found
    import queue  # another module of the name of a file

    assert load("queue.py:simple").__module__ == "file_queue"
    assert sys.modules["queue"] is queue


@pytest.mark.quick
def test_gradcheck_of_a_cell(own, capsys):
    command = ["gradcheck", "own_cells.py:simple", "--quick", "--option", "plain", "--dtype", "float64"]
    assert cli.main([*command, "--backend", "oracle", "reference"]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("simple ")]) == 2
    assert out.splitlines()[-1] == "2 passed, 0 failed, 0 not run"


def test_gradcheck_that_checks_nothing_fails(own, capsys):
    pytest.importorskip("numba", reason="numba is not installed")
    text = '@cell\ndef simple(p, x, h):\n    return p.project(p.dense("a", x, h))\n'
    Path("own_projected.py").write_text(f"from fusedrnn.cells import cell\n\n\n{text}")
    assert cli.main(["gradcheck", "own_projected.py:simple", "--quick", "--backend", "numba"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("0 passed, 0 failed, ")
    assert err == "fusedrnn gradcheck: nothing was checked\n"


def test_bench_of_a_cell_in_bfloat16_is_refused(own, capsys):
    assert cli.main(["bench", "own_cells.py:simple", "--dtype", "bfloat16"]) == 2
    assert "--dtype bfloat16: expected float32 or float64 with own_cells.py:simple" in capsys.readouterr().err


@pytest.mark.quick
def test_bench_shows_the_loops_of_a_cell(own, capsys):
    assert cli.main(["bench", "own_cells.py:simple", "--show-loop"]) == 0
    out = capsys.readouterr().out
    assert "for a_x in a_x_all.unbind(0):" in out
    assert "jax.lax.scan(step, (h,), (a_x_all,))" in out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("info own_cells.py", "expected a cell as FILE.py:NAME, such as cells.py:mgu, got 'own_cells.py'"),
        ("info nowhere.py:mgu", "nowhere.py: no such file"),
        ("info nowhere:mgu", "there is no module nowhere; write a file with .py"),
        (
            "info own_cells.py:mgu",
            "own_cells.py has no mgu; its cells: simple, twice, misspelt",
        ),
        ("info own_cells.py:count", "own_cells.py: expected count to be a cell, made by @cell, got int"),
        ("info own_asks.py:asks", "own_asks.py:6: if h > 0: whether a condition holds is known only"),
        (
            "info own_cells.py:misspelt",
            "own_cells.py:18: return tahn(p.dense(\"a\", x, h)) NameError: name 'tahn' is not defined",
        ),
        (
            "info own_fails.py:a",
            "own_fails.py:3: os.environ['nobody sets this'] KeyError: 'nobody sets this'",
        ),
        ("info own_exits.py:a", "own_exits.py:1: raise SystemExit(0) SystemExit: 0"),
        ("info own_syntax.py:a", "own_syntax.py:1: def f(: SyntaxError: invalid syntax"),
        ("info own_cells.py:simple --json", "--json: not with own_cells.py:simple"),
        ("gradcheck own_cells.py:simple --cell lstm", "--cell: not with own_cells.py:simple"),
        ("gradcheck own_cells.py:simple --levels", "--levels: not with own_cells.py:simple"),
        ("bench own_cells.py:simple --suite core", "--suite: not with own_cells.py:simple"),
        ("bench own_cells.py:simple --memory", "--memory: not with own_cells.py:simple"),
        ("bench own_cells.py:simple --device cuda", "--device cuda: not with own_cells.py:simple"),
        ("bench own_cells.py:simple --peers torch", "--peers torch: it takes part in none of these cases"),
        ("bench --show-loop", "--show-loop: expected FILE.py:NAME, got none"),
        ("bench own_cells.py:simple --show-loop --json a.json", "--json: not with --show-loop, which times"),
        (
            "gradcheck own_cells.py:simple --option layer-norm",
            "options: none of layer-norm applies to simple",
        ),
        ("gradcheck --levels --backend numba", "--levels: expected cpu among --backend, got numba"),
    ],
)
def test_what_is_wrong_with_a_cell_is_one_line(own, arguments, message, capsys):
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


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
