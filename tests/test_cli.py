"""The command line: output, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fusedrnn import backends, bench, cli, problems, terminal
from fusedrnn.cells import CELLS, GRU, LSTM, RNN
from fusedrnn.problems import Shape


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fusedrnn", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


# --- usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["info"], ["gradcheck"], ["bench"], ["train"]], ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fusedrnn")


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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["bench", "--cell", "transformer"],
        ["bench", "--shape", "1,2,3"],
        ["bench", "--shape", "1,2,3,0"],
        ["bench", "--shape", "1,2,3,x"],
        ["bench", "--threads", "0"],
        ["bench", "--threads", "two"],
        ["bench", "--peers", "cudnn"],
        ["train"],
        ["train", "nothing"],
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
    code = """
import signal, sys
from fusedrnn import bench, cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a process started in the background
print("ready", flush=True)
sys.exit(cli.main(["bench", "--shape", "2000,64,64,64", "--peers", "reference"]))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.strip() == "interrupted"


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "fusedrnn", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0


# --- info -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("more", [(), ("--tensors",)], ids=["rows", "tensors"])
def test_gradcheck(more, capsys):
    assert cli.main([*FEW, "--backend", "oracle", "reference", *more]) == 0
    out = capsys.readouterr().out
    assert "gru reset_after=False" in out or more
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


# --- bench ------------------------------------------------------------------------------------------------


def test_bench(tmp_path):
    file = tmp_path / "result.json"
    done = run(
        "bench", "--quick", "--shape", "5,3,2,17", "7,1,1,8", "--peers", "reference", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    assert "5,3,2,17" in done.stdout
    report = json.loads(file.read_text())
    assert [row["shape"] for row in report["rows"]] == [[5, 3, 2, 17], [7, 1, 1, 8]]
    for row in report["rows"]:
        assert set(row["participants"]) == {"fusedrnn", "reference"}
        for each in row["participants"].values():
            assert each["ms"] > 0
            assert each["gflops"] > 0
            assert 0 <= each["error"] < bench.TOLERANCE["float32"]
    ratios = [row["participants"]["reference"]["ratio"] for row in report["rows"]]
    assert report["geometric_mean"]["reference"] == pytest.approx(np.sqrt(np.prod(ratios)))
    for key in ("date", "machine", "numpy", "compiler", "isa", "commit", "version"):
        assert key in report["environment"]


def test_bench_refuses_a_file_that_cannot_be_written_before_it_measures(tmp_path):
    start = time.perf_counter()
    done = run("bench", "--json", str(tmp_path / "missing" / "result.json"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fusedrnn bench: ")
    assert time.perf_counter() - start < 20


def test_a_missing_peer_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["bench", "--quick", "--peers", "torch"]) == 1
    assert "pip install 'fusedrnn[torch]'" in capsys.readouterr().err


@pytest.mark.parametrize("cell", [LSTM(), GRU(), RNN(), RNN(relu=True)], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_peers_compute_the_same_problem(cell, dtype):
    """PyTorch's layer, set up by the benchmark, agrees with the reference in every result."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    data = problems.make(cell, Shape(6, 5, 3, 17), dtype)
    exact = bench.Native(problems.astype(data, np.float64), "reference").results()
    assert bench.check("torch", bench.Torch(data).results(), exact, bench.TOLERANCE[dtype]) > 0
    assert set(exact) >= {"y", "h", "dx", "dweight_ih", "dweight_hh", "dbias_ih"}


@pytest.mark.parametrize("spoil", ["nan", "shape", "one element", "missing", "extra"])
def test_the_check_before_the_timing_fails_when_it_must(spoil):
    data = problems.make(LSTM(), Shape(4, 3, 2, 7), "float64")
    exact = bench.Native(data, "reference").results()
    got = {key: value.copy() for key, value in exact.items()}
    assert bench.check("same", got, exact, 1e-15) == 0
    if spoil == "nan":
        got["dx"][1, 2, 0] = np.nan
    elif spoil == "shape":
        got["dx"] = got["dx"][:1]
    elif spoil == "one element":
        got["dweight_hh"][3, 2] *= 1 + 1e-6
    elif spoil == "missing":
        del got["c"]
    else:
        got["more"] = got["c"]
    with pytest.raises(RuntimeError, match="spoiled"):
        bench.check("spoiled", got, exact, 1e-9)


def test_blocks_are_paired_and_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or time.sleep(0.002) for name in ("a", "b")}
    samples = bench.time_blocks(runs, blocks=4, seconds=0.004, limit=10)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    order = [name for k, name in enumerate(calls) if k == 0 or calls[k - 1] != name]
    assert order[:2] == ["a", "b"]  # warm-up
    assert "".join(order[2:]) == "ababa"  # a b, b a, a b, b a; equal neighbours are one
    assert all(0.002 <= value < 0.02 for value in samples["a"] + samples["b"])


def test_a_slow_participant_takes_part_in_fewer_blocks():
    samples = bench.time_blocks({"a": lambda: time.sleep(0.01)}, blocks=9, seconds=0.01, limit=0.05)
    assert 3 <= len(samples["a"]) < 9


def test_shapes_are_the_ones_of_the_documents():
    assert len(problems.SPEED) == 11
    assert problems.flops(LSTM(), Shape(30, 30, 1, 100)) == 3 * 2 * 30 * 30 * 400 * 101
    assert set(problems.QUICK) <= set(problems.SPEED)


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_a_seed_is_the_same_problem_in_every_dtype(cell):
    shape = Shape(3, 2, 5, 7)
    single, double = (problems.make(cell(), shape, dtype, seed=4) for dtype in ("float32", "float64"))
    np.testing.assert_array_equal(single.x, double.x.astype("float32"))
    np.testing.assert_array_equal(single.weights.weight_hh, double.weights.weight_hh.astype("float32"))
    assert not np.array_equal(double.x, problems.make(cell(), shape, "float64", seed=5).x)


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
