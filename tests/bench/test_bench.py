"""The benchmark: its list of cases, the timing, the memory, what it reports."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusedrnn import backends, bench, cli, problems, system
from fusedrnn.bench import libraries, memory, registry, report, runner, timing
from fusedrnn.cells import CELLS, gru, lstm, rnn
from fusedrnn.problems import Case, Shape
from fusedrnn.threads import get_num_threads

pytestmark = pytest.mark.alone
SMALL = Case(lstm, Shape(6, 5, 3, 17))
OUTSIDE = [name for name in bench.PEERS if name not in bench.OWN]


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fusedrnn", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )


# --- the list of cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", problems.SUITES)
def test_cases_are_well_formed_and_unique(suite):
    cases = problems.SUITES[suite]
    assert len({str(case) for case in cases}) == len(set(cases)) == len(cases)
    for case in cases:
        assert case.kind in ("training", "forward", "step", "update")
        assert min(case.shape) >= 1
        assert (case.shape.T == 1) == (case.kind == "step") or suite == "deepbench"
        assert any(registry.PEERS[peer].refuses(case, "float32") is None for peer in OUTSIDE), case
        assert problems.described(json.loads(json.dumps(problems.describe(case)))) == case


def test_the_suites_hold_what_the_documents_say():
    assert [case.shape for case in problems.SUITES["core"]] == list(problems.SPEED)
    assert len(problems.SPEED) == 11
    rl = problems.SUITES["rl"]
    assert sum(case.ragged for case in rl) == 2
    assert {(case.cell.name, case.shape.B) for case in rl if case.resets} == {
        (cell, B) for cell in ("lstm", "gru") for B in (8, 128)
    }
    assert {(case.cell.name, case.shape.B) for case in rl if case.kind == "step"} == {
        (cell, B) for cell in ("lstm", "gru") for B in (1, 8, 64)
    }
    assert sum(case.cell.name == "gru" for case in problems.SUITES["deepbench"]) == 18


def test_a_cell_selects_its_cases_or_takes_their_place():
    rl = problems.SUITES["rl"]
    assert problems.select(rl, gru) == tuple(case for case in rl if case.cell == gru)
    elman = problems.select(rl, rnn)
    assert {case.cell for case in elman} == {rnn}
    assert [case.shape for case in elman] == list(dict.fromkeys(case.shape for case in rl))
    assert {case.kind for case in problems.select(rl, forward=True)} == {"forward", "step"}


@pytest.mark.parametrize("suite", problems.SUITES)
def test_quick_takes_every_kind_and_the_smallest_of_it(suite):
    cases = problems.SUITES[suite]
    few = problems.quick(cases)
    assert set(few) <= set(cases)

    def sort(case):
        return case.kind, case.ragged, bool(case.resets), case.api

    for kind in set(map(sort, cases)):
        alike = [case for case in cases if sort(case) == kind]
        assert min(map(problems.flops, alike)) in [problems.flops(case) for case in few]


def test_operations():
    forward = 2 * 30 * 30 * 400 * 101
    case = Case(lstm, Shape(30, 30, 1, 100))
    assert problems.flops(case) == 3 * forward
    assert problems.flops(dataclasses.replace(case, kind="forward")) == forward
    both = dataclasses.replace(case, layers=2, bidirectional=True, kind="forward")
    assert problems.flops(both) == 2 * 30 * 30 * 400 * (2 * 101 + 2 * 300)
    ragged = dataclasses.replace(case, ragged=True)
    lengths = problems.lengths(ragged)
    assert lengths.min() >= 3
    assert lengths.max() <= 30
    assert problems.flops(ragged) == pytest.approx(3 * forward * lengths.sum() / 900)


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_a_seed_is_the_same_problem_in_every_dtype(cell):
    case = Case(cell, Shape(3, 2, 5, 7), resets=0.5)
    single, double = (problems.make(case, dtype, seed=4) for dtype in ("float32", "float64"))
    np.testing.assert_array_equal(single.x, double.x.astype("float32"))
    (w,), (wide,) = single.weights, double.weights
    np.testing.assert_array_equal(w["weight_hh"], wide["weight_hh"].astype("float32"))
    np.testing.assert_array_equal(single.reset, double.reset)
    assert not np.array_equal(double.x, problems.make(case, "float64", seed=5).x)


# --- timing -----------------------------------------------------------------------------------------------


def test_blocks_are_paired_and_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or time.sleep(0.002) for name in ("a", "b")}
    samples = timing.time_blocks(runs, blocks=4, seconds=0.004, limit=10)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    order = [name for k, name in enumerate(calls) if k == 0 or calls[k - 1] != name]
    assert order[:2] == ["a", "b"]  # warm-up
    assert "".join(order[2:]) == "ababa"  # a b, b a, a b, b a; equal neighbours are one
    assert all(0.002 <= value < 0.02 for value in samples["a"] + samples["b"])


def test_a_slow_library_takes_part_in_fewer_blocks():
    samples = timing.time_blocks({"a": lambda: time.sleep(0.01)}, blocks=9, seconds=0.01, limit=0.05)
    assert 3 <= len(samples["a"]) < 9


def test_everybody_gets_the_same_threads_and_their_own_back():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    before = get_num_threads(), torch.get_num_threads(), timing.blas_threads()
    with timing.same_threads(1) as used:
        assert used == get_num_threads() == torch.get_num_threads() == 1
        pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
        assert timing.blas_threads() == 1
    assert (get_num_threads(), torch.get_num_threads(), timing.blas_threads()) == before


def test_the_matrix_product_is_measured_several_times_and_the_fastest_counts():
    gemm = timing.Gemm("float32", timing.blas_threads(), sizes=(64, 96))
    assert gemm.rate is None
    gemm.measure()
    assert {"NumPy 64", "NumPy 96"} <= set(gemm.best)
    first = dict(gemm.best)
    for _ in range(3):
        gemm.measure()
    assert all(gemm.best[name] >= rate for name, rate in first.items())
    assert gemm.rate == max(gemm.best.values())


@pytest.mark.skipif("avx512" not in system.info()["detected"], reason="the processor has no avx512")
def test_openblas_is_also_told_to_use_avx512():
    gemm = timing.Gemm("float64", 1, sizes=(64,))
    gemm.runs = {}
    gemm.measure()
    assert list(gemm.best) == ["NumPy with OPENBLAS_CORETYPE=SkylakeX 64"]
    assert gemm.rate > 0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_what_others_take_is_seen():
    others = timing.Others()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(0.5)
        busy = others.share()
        process.kill()
    assert 0.3 / os.cpu_count() < busy <= 1  # a child that has not been waited for is somebody else


def test_others_cannot_take_more_than_there_is(monkeypatch):
    # 1.01 seconds of 1.01; in float64 the first difference is the larger one.
    reads = iter([(30000.1, 90000.3), (30001.11, 90001.31)])
    monkeypatch.setattr(timing.Others, "read", staticmethod(lambda: next(reads)))
    assert timing.Others().share() == 1.0


def test_a_line_tells_of_cores_that_were_apart(monkeypatch):
    times = iter([30e-9, 31e-9, 30e-9, 165e-9])
    monkeypatch.setattr(runner, "transfer", lambda threads: next(times))
    cases = [Case(rnn, Shape(2, B, 1, 3)) for B in (1, 2)]
    found = runner.run(cases, peers=["reference"], quick=True)
    assert [row["transfers"] for row in found["rows"]] == [[30e-9, 31e-9], [30e-9, 165e-9]]
    told = f"a cache line took 30 to 165 ns between two threads, most at {cases[1]}"
    assert any(line.startswith(told) for line in report.summary(found))
    found["rows"].pop()
    assert not any("a cache line" in line for line in report.summary(found))


@pytest.mark.kernel
def test_a_cache_line_takes_its_time_between_threads():
    assert timing.transfer(1) is None
    assert 1e-9 < timing.transfer(2) < 1e-3


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_what_we_take_is_not_that_of_others(monkeypatch):
    monkeypatch.setattr(os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    everybody = timing.Others.read()[0]
    monkeypatch.setattr(os, "times", lambda: (40.0, 30.0, 20.0, 10.0, 0.0))
    assert timing.Others.read()[0] == pytest.approx(everybody - 100, abs=10)


# --- memory -----------------------------------------------------------------------------------------------


def test_bytes_saved_count_each_storage_once_without_inputs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from fusedrnn.bench.peer_torch import Torch

    class Squares(Torch):
        def outputs(self):
            once = (self.x * self.x).exp()  # saves x, twice, which does not count, and its result
            y = (once * once).exp()  # saves once, twice, and y
            return [y]

    peer = Squares(problems.make(SMALL, "float32"), 1)
    size = peer.x.numel() * 4
    assert peer.saved() == {"own": size, "borrowed": size}
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("case", [SMALL, dataclasses.replace(SMALL, layers=2, bidirectional=True)], ids=str)
def test_ours_saves_its_tape_and_borrows_its_outputs(case):
    if backends.get().name != "cpu":
        pytest.skip("the compiled module is not built")
    found = libraries.Native(problems.make(case, "float32"), "cpu").saved()
    T, B, _, H = case.shape
    layer = T * B * H * 4 * case.directions
    assert found["borrowed"] == layer * (1 if case.layers == 1 else 3)  # y of both, and the copy between
    assert found["own"] >= 4 * layer * case.layers  # four gates


def test_peak_memory_is_that_of_the_case_and_not_of_the_parent():
    case = Case(lstm, Shape(100, 64, 4, 128))
    ballast = np.ones(200 << 20, np.int8)  # a child's getrusage would begin there
    gates = 100 * 64 * 4 * 128 * 4  # bytes, the least that a tape holds
    found = memory.peak(case, "float32", 1, backends.get().name, None)
    assert ballast[-1] == 1
    assert gates < found < 100 << 20


def test_bfloat16_is_our_pytorch_layers_beside_pytorchs():
    pytest.importorskip("torch")
    taken, _ = registry.choose(None, [SMALL], "bfloat16", "cpu")
    assert all(name.startswith("torch") for name in taken)
    row = runner.run_case(SMALL, "bfloat16", "cpu", ["torch"], get_num_threads(), timing=(2, 1e-3, 0.1))
    for name in (runner.OURS, "torch"):
        assert 1e-4 < row["libraries"][name]["error"] < libraries.TOLERANCE["bfloat16"]
    x = problems.make(SMALL, "bfloat16").x
    assert not x.view(np.uint32).astype(np.uint16).any()
    np.testing.assert_allclose(x, problems.make(SMALL, "float32").x, rtol=2**-8)


# --- what it reports --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    """A run of two tiny cases, once."""
    cases = [SMALL, dataclasses.replace(SMALL, resets=0.3)]
    peers = [name for name in ("torch", "torch-masked") if registry.PEERS[name].missing() is None]
    return runner.run(cases, peers=[*peers, "reference"], quick=True)


def test_rows(result):
    for row in result["rows"]:
        for name, each in row["libraries"].items():
            assert each["ms"] > 0
            assert each["gflops"] > 0
            assert each["of_gemm"] == pytest.approx(each["gflops"] / result["gemm"]["gflops"])
            assert 0 <= each["error"] < libraries.TOLERANCE["float32"]
            assert ("ratio" in each) == (name != runner.OURS)
        if row["best"]:
            assert row["best"]["peer"] not in bench.OWN
    assert runner.FULL in result["rows"][1]["libraries"]
    assert runner.FULL not in result["rows"][0]["libraries"]
    for key in ("date", "machine", "numpy", "compiler", "isa", "commit", "version"):
        assert key in result["environment"]


def test_means():
    def row(best, **ratios):
        peers = {name.replace("_", "-"): {"ratio": ratio} for name, ratio in ratios.items()}
        return {"libraries": peers, "best": {"peer": best, "ratio": peers[best]["ratio"]}}

    rows = [row("torch-cell", torch=4.0, torch_cell=2.0, jax=9.0), row("jax", torch=8.0, jax=0.5)]
    found = runner.means(rows, ["torch", "torch-cell", "jax"])
    assert found["geometric_mean"] == pytest.approx(
        {"torch": math.sqrt(32), "torch-cell": 2.0, "jax": math.sqrt(4.5)}
    )
    assert found["best_of_torch"] == pytest.approx(4.0)
    assert found["best_of_all"] == pytest.approx(1.0)
    assert runner.means(rows[:1], ["numba"])["geometric_mean"] == {"numba": None}


def test_json_round_trip(result, tmp_path):
    file = str(tmp_path / "result.json")
    bench.save(result, file)
    assert bench.load(file) == result


def test_table_and_summary(result):
    title, header, rows = bench.table(result)
    assert "float32" in title
    assert all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows] == [row["case"] for row in result["rows"]]
    assert rows[0][-1] == "–"
    assert rows[1][-1].endswith("%")  # with resets against without
    _, header, rows = bench.memory_table(result)
    assert all(len(row) == len(header) for row in rows)
    assert any(line.startswith("reference: geometric mean") for line in bench.summary(result))
    assert any(line.startswith("matrix product: ") for line in bench.summary(result))


def test_limit_of_the_ratios():
    def row(ratio, rate, kind="training"):
        libraries = {runner.OURS: {"of_gemm": rate}}
        return {"kind": kind, "best": {"peer": "torch", "ratio": ratio}, "libraries": libraries}

    rows = [row(1.5, 0.75), row(2.0, 0.25)]
    assert report.at_product_rate({"rows": rows}) == pytest.approx(4.0)  # of 2 and 8
    assert report.at_product_rate({"rows": [*rows, row(1.0, None)]}) is None
    assert report.at_product_rate({"rows": [*rows, row(1.0, 0.5, "update")]}) is None


def test_a_ragged_case_is_told_per_valid_step():
    row = {"ragged": True, "valid": 0.5, "libraries": {runner.FULL: {"ratio": 2.0}}}
    assert report.against_full(row) == "+0% per valid step"
    row = {"ragged": False, "valid": 1.0, "libraries": {runner.FULL: {"ratio": 0.8}}}
    assert report.against_full(row) == "+25%"


def test_plot(result, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from fusedrnn.bench import plot

    assert set(plot.STYLES) == set(bench.PEERS)
    file = tmp_path / "ratios.png"
    plot.draw(result, str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_takes_too_long_is_left_out_of_a_suite_and_named(monkeypatch):
    monkeypatch.setattr(runner, "LONGEST", 0.0)
    found = runner.run([SMALL], suite="core", peers=["reference"], quick=True)
    assert found["rows"] == []
    assert found["skipped"][0].startswith(str(SMALL))
    assert any(line.startswith(f"left out: {SMALL}") for line in bench.summary(found))
    assert len(runner.run([SMALL], peers=["reference"], quick=True)["rows"]) == 1


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(tmp_path):
    file = tmp_path / "result.json"
    done = run_cli(
        "--quick", "--shape", "5,3,2,17", "7,1,1,8", "--peers", "reference", "--threads", "1", "--memory",
        "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lstm 5,3,2,17" in done.stdout
    assert "peak" in done.stdout
    found = json.loads(file.read_text())
    assert [row["shape"] for row in found["rows"]] == [[5, 3, 2, 17], [7, 1, 1, 8]]
    assert found["threads"] == 1
    for row in found["rows"]:
        assert set(row["libraries"]) == {"fusedrnn", "reference"}
        assert "peak" in row["libraries"]["fusedrnn"]
    ratios = [row["libraries"]["reference"]["ratio"] for row in found["rows"]]
    assert found["geometric_mean"]["reference"] == pytest.approx(np.sqrt(np.prod(ratios)))


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_it_measures(option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *arguments, **options: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["bench", option, str(tmp_path / "file" / "result")])
    assert f"argument {option}: expected a folder to write to" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *arguments, **options: pytest.fail("it measured"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fusedrnn.bench.plot", raising=False)
    monkeypatch.delattr(bench, "plot", raising=False)
    assert cli.main(["bench", "--plot", str(tmp_path / "ratios.png")]) == 2
    assert (
        capsys.readouterr().err == "fusedrnn bench: --plot needs matplotlib: pip install 'fusedrnn[plot]'\n"
    )


@pytest.mark.slow
def test_numba_says_how_long_it_compiles():
    pytest.importorskip("numba", reason="numba is not installed")
    from fusedrnn.bench.libraries import numba_start

    first, cached = map(float, re.findall(r"([\d.]+) s", numba_start("rnn", "float32")))
    assert 0 < cached < first


@pytest.mark.parametrize(
    ("rows", "peer"), [({"ragged": True}, "torch-packed"), ({"resets": 0.2}, "torch-masked")], ids=str
)
def test_training_steps_of_ragged_rows_and_resets(rows, peer):
    """Their losses are compared with those of a variant of PyTorch's that can do the same."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    case = Case(lstm, Shape(6, 5, 3, 17), "update", api="layer", **rows)
    row = runner.run_case(case, "float32", "cpu", [peer], 1, runner.QUICK)
    assert row["libraries"].keys() == {runner.OURS, runner.FULL, peer}
