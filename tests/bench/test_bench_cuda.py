"""``fusedrnn bench --device cuda`` without a GPU: bounds, the loop on the emulated device, goals, reports."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import test_torch_gpu  # noqa: E402
from fusedrnn import bench, cli, problems, system  # noqa: E402
from fusedrnn.backends.cuda import PRECISION  # noqa: E402
from fusedrnn.bench import cuda, peer_torch, runner  # noqa: E402
from fusedrnn.bench.cuda import runs, tables  # noqa: E402
from fusedrnn.bench.peer_torch import Place, Torch  # noqa: E402
from fusedrnn.bench.runner import FULL, OURS  # noqa: E402
from fusedrnn.cells import gru, lstm  # noqa: E402
from fusedrnn.problems import Case, Shape  # noqa: E402

emulated = test_torch_gpu.device


def test_the_suite_has_what_the_goals_speak_of_and_a_pytorch_variant_for_each():
    rows = [
        problems.describe(case) | {"mode": mode} for case in problems.SUITES["gpu"] for mode in cuda.MODES
    ]
    for goal in tables.GOALS:
        chosen = [row for row in rows if tables.concerns(goal, row)]
        assert chosen, goal.name
        if goal.against == "torch":
            assert {row["shape"][3] for row in chosen} >= {256, 1024}
            assert {row["shape"][1] for row in chosen} >= set(goal.rows["B"]) & {1, 16, 64}
            assert {row["kind"] for row in chosen} == {"forward", "training"}
        if "resets" in goal.name:
            assert len(chosen) == sum(row["resets"] > 0 for row in rows)
    for case in (*problems.SUITES["gpu"], *problems.SUITES["rl"], *problems.SUITES["deepbench"]):
        first = "torch-packed" if case.ragged else "torch-masked" if case.resets else "torch"
        more = ["torch-cell"] * (case.shape.T == 1) + ["torch-segments"] * (case.resets > 0)
        assert [*runs.peers(case)] == [first, *more], case


def test_the_bound_by_hand():
    """LSTM, T = 5, B = 2, I = 3, H = 4: x 30, y 40, weights 16 * 3 + 16 * 4 + 16 = 128 numbers."""
    case = Case(lstm, Shape(5, 2, 3, 4), "forward")

    def found(case, mode="fp32", **rates):
        rates = {mode: 1.0, "bytes": 1.0, "steps": 1.0} | rates
        return runs.bound(problems.make(case, "float32"), mode, rates)

    assert found(case)["parts"]["bytes"] == 4 * (30 + 40 + 128)
    both = replace(case, kind="training")
    assert found(both, "bf16")["parts"]["bytes"] == 2 * 3 * (30 + 40 + 128)
    # Two layers, both directions: the second's input is the first's output, 8 wide; it need not move.
    weights = 2 * (16 * 3 + 16 * 4 + 16) + 2 * (16 * 8 + 16 * 4 + 16)
    stack = replace(case, layers=2, bidirectional=True)
    assert found(stack)["parts"]["bytes"] == 4 * (30 + 80 + weights)
    parts = {
        "operations": 3 * 2 * 5 * 2 * 16 * (3 + 4),
        "bytes": 4 * 3 * 198,
        "steps": 9,
    }  # 5 forward, 5 back
    assert found(both) == {"parts": parts, "by": "operations", "seconds": 6720}
    assert found(both, fp32=1e9)["by"] == "bytes"
    assert found(both, fp32=1e9, bytes=1e9)["by"] == "steps"
    assert found(stack, steps=2.0)["parts"]["steps"] == 9 / 2


def test_a_mode_is_set_and_taken_back(monkeypatch):
    def switches():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = switches()
    for was in ({}, {PRECISION: "bf16"}):
        monkeypatch.setattr(os, "environ", dict(was))
        for name, mode in cuda.MODES.items():
            with cuda.use(mode):
                assert os.environ == {PRECISION: "tf32" if name == "tf32" else "ieee"}
                assert switches() == (mode.tf32, mode.tf32)
            assert (os.environ, switches()) == (was, before)


SMALL = Case(lstm, Shape(4, 3, 2, 9))
STEP = Case(lstm, Shape(1, 8, 64, 256), "step", api="cell")


@pytest.fixture
def modules(emulated, monkeypatch):
    """Our PyTorch modules of the benchmark run on the emulated device."""
    for ours, base in ((peer_torch.FusedModule, Torch), (peer_torch.FusedCell, peer_torch.TorchCell)):
        build = lambda self, base=base: test_torch_gpu.moved(base.build(self))  # noqa: E731
        monkeypatch.setattr(ours, "build", build, raising=False)
    tensor = lambda self, array: Torch.tensor(self, array).as_subclass(test_torch_gpu.Elsewhere)  # noqa: E731
    monkeypatch.setattr(peer_torch.FusedModule, "tensor", tensor, raising=False)
    return emulated


@pytest.fixture
def here(modules, monkeypatch):
    """PyTorch on the CPU in place of the GPU, and few repetitions."""
    monkeypatch.setattr(runs, "DEVICE", "cpu")
    monkeypatch.setattr(runs, "QUICK", (2, 0.001, 0.1))
    monkeypatch.setattr(runs, "clock", time.perf_counter)
    monkeypatch.setattr(runs, "missing", lambda: None)
    return modules


@pytest.fixture
def run(here, monkeypatch):
    """The benchmark without the rates, which take long."""
    rates = dict.fromkeys(cuda.MODES, 1e12) | {"bytes": 1e11, "steps": 1e6}
    monkeypatch.setattr(runs, "measure", lambda timed: rates)
    runs.drawn.cache_clear()
    return lambda cases, **options: cuda.run(cases, **{"modes": ["fp32"], "quick": True} | options)


def twice(library):
    return {name: 2 * a for name, a in Torch.results(library).items()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
class TestRun:
    def test_rows(self, run, emulated):
        seen = []
        cases = [SMALL, replace(SMALL, resets=0.5), replace(SMALL, ragged=True)]
        cases = [part for case in cases for part in (replace(case, kind="forward"), case)]
        cases.append(replace(STEP, shape=Shape(1, 3, 2, 9)))
        found = run(cases, go_on=lambda report: seen.append(str(report["rows"])) or True)
        rows = found["rows"]
        assert emulated.launches
        assert len(set(seen)) == 1 + len(rows)
        assert [row["kind"] for row in rows] == ["forward", "training"] * 3 + ["step"]
        beside = [
            {"torch"},
            {"torch-masked", "torch-segments", FULL},
            {"torch-packed", FULL},
            {"torch", "torch-cell"},
        ]
        for row, others in zip(rows, [beside[k // 2] for k in range(7)], strict=True):
            assert row["failed"] == {}
            assert row["libraries"].keys() == {OURS} | others
            for name, entry in row["libraries"].items():
                assert entry["us_per_step"] == pytest.approx(1e3 * entry["ms"] / row["shape"][0])
                assert entry["of_bound"] == pytest.approx(1e3 * row["bound"]["seconds"] / entry["ms"])
                assert 0 <= entry["error"] < 1e-5
                assert ("ratio" in entry) == (name != OURS)
            assert row["plan"].startswith(("cluster", "grid", "steps"))
        assert json.loads(json.dumps(found)) == found

    @pytest.mark.parametrize(
        ("target", "new", "why"),
        [
            ("fusedrnn.bench.peer_torch.FusedModule.build", lambda self: int("x"), "invalid literal"),
            ("fusedrnn.torch.paths.unsupported", lambda *_: "the dtype is new", "fallback: the dtype is new"),
            ("fusedrnn.bench.peer_torch.FusedLayer.results", twice, "y is off by 1.0e+00"),
        ],
    )
    def test_ours_that_cannot_is_a_line_and_is_not_timed(self, target, new, why, run, monkeypatch):
        monkeypatch.setattr(target, new, raising=False)
        found = run([SMALL], modes=["bf16"])
        (row,) = found["rows"]
        assert row["failed"].keys() == {OURS}
        assert why in row["failed"][OURS]
        assert row["libraries"] == {}

    def test_a_peer_that_cannot_is_a_line_and_the_others_are_timed(self, run, monkeypatch):
        monkeypatch.setattr("fusedrnn.bench.peer_torch.TorchSegments.spans", lambda self: int("x"))
        (row,) = run([replace(SMALL, resets=0.5)])["rows"]
        assert row["failed"] == {
            "torch-segments": "ValueError(\"invalid literal for int() with base 10: 'x'\")"
        }
        assert row["libraries"].keys() == {OURS, "torch-masked", FULL}

    def test_a_row_that_cannot_be_timed_is_a_line(self, run, monkeypatch):
        monkeypatch.setattr(runs, "time_blocks", lambda *_, **__: int("x"))
        assert [row["failed"].keys() for row in run([SMALL, STEP])["rows"]] == [{OURS}, {OURS}]

    def test_no_row_begins_when_the_time_is_over(self, run):
        (row,) = run([SMALL], go_on=lambda report: False)["rows"]
        assert (row["case"], row["libraries"], row["failed"]) == ("lstm 4,3,2,9 fp32", {}, {})

    def test_rates(self, here):
        found = runs.measure(lambda each: {name: [0.5] for name in each}, size=16, megabytes=1, steps=3)
        assert found == dict.fromkeys(cuda.MODES, 4.0 * 16**3) | {"bytes": 2.0 * 2**21, "steps": 6.0}
        assert here.launches


def test_a_training_step_is_where_its_layer_is():
    case = replace(SMALL, kind="update", api="layer")
    library = Torch(problems.make(case, "float32"), 1, Place("meta", "bfloat16"))
    tensors = library.x, *library.module.parameters(), *library.update.head.parameters()
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}


def row(case, mode="fp32", failed=None, **us):
    """A row as ``run`` makes it, of microseconds a step by library."""
    samples = {name.replace("_", "-"): [1e-6 * value * case.shape.T] * 2 for name, value in us.items()}
    found = runner.row_of(case, samples, dict.fromkeys(samples, 0.0))
    for name, value in us.items():
        more = {"us_per_step": value, "of_bound": 0.5 / value, "of_gemm": 0.25}
        found["libraries"][name.replace("_", "-")] |= more
    found |= {"mode": mode, "case": f"{case} {mode}", "failed": failed or {}}
    return found | ({"plan": "cluster, 8x2 blocks", "bound": {"by": "steps"}} if us else {})


FLASH = Case(lstm, Shape(1024, 16, 768, 768), "forward")
WIDE = Case(lstm, Shape(256, 64, 256, 256))
RESETS = Case(lstm, Shape(128, 8, 64, 256), resets=0.03)
ROWS = [
    row(FLASH, "fp16", fusedrnn=1.5, torch=2.0),
    row(replace(FLASH, kind="training"), "fp16", fusedrnn=6.0, torch=12.6),
    row(WIDE, "bf16", fusedrnn=1.0, torch=2.5),
    row(replace(WIDE, shape=Shape(256, 1, 128, 128)), "bf16", fusedrnn=1.0, torch=0.1),  # H too small
    row(replace(WIDE, shape=Shape(256, 65, 256, 256)), "bf16", fusedrnn=1.0, torch=0.1),  # B too large
    row(replace(WIDE, cell=gru), "bf16", {OURS: "no bfloat16"}),
    row(WIDE, fusedrnn=1.0, torch=1.3),
    row(RESETS, fusedrnn=1.1, **{FULL: 1.0}),
    row(replace(RESETS, kind="forward"), fusedrnn=1.0, **{FULL: 0.98}),
    row(STEP, fusedrnn=30.0, torch=90.0, torch_cell=60.0),
    row(replace(STEP, api="layer"), fusedrnn=99.0, torch=90.0, torch_cell=60.0),
    row(replace(WIDE, shape=Shape(256, 16, 256, 256)), fusedrnn=1.0, torch=1.9),
]
REPORT = {"suite": "gpu", "dtype": "fp32, fp16", "backend": "cuda", "threads": 1, "modes": ["fp32", "fp16"]}
REPORT |= {"peers": ["torch", "torch-cell"], "rates": {"fp32": 5e13, "steps": 8e5}, "rows": ROWS}
REPORT |= {"environment": {"gpu": "a GPU, driver 580", "date": "2026-01-01"}}


def test_goals():
    found = cuda.judge(ROWS)
    figures = [each["figure"] and round(each["figure"], 3) for each in found]
    assert figures == [2.5, None, 1.9, 1.3, 1.307, 0.845, 0.909, None, 2.0]
    held = [
        f"{a} of {b}" for a, b in zip([1, 0, 0, 1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 2, 0, 1], strict=True)
    ]
    assert [each["rows that hold"] for each in found] == held
    yes, no, unknown = "yes", "no", "not all measured"
    assert [each["holds"] for each in found] == [yes, no, no, yes, yes, no, no, unknown, yes]
    assert found[6]["row"] == "lstm 128,8,64,256 resets fp32"


def test_a_goal_holds_only_where_all_of_it_was_measured():
    first, second = (row(WIDE, mode, fusedrnn=1.0, torch=3.0) for mode in ("tf32", "bf16"))
    slow, no_peer, left = (
        row(WIDE, "bf16", fusedrnn=1.0, torch=1.9),
        row(WIDE, "bf16", fusedrnn=1.0),
        row(WIDE, "bf16"),
    )

    def of(*rows):
        found = cuda.judge(rows)[0]
        return found["rows that hold"], found["holds"]

    assert of(first, second) == ("2 of 2", "yes")
    assert of(first, left) == of(first, no_peer) == ("1 of 2", "not all measured")
    assert of(first, slow) == ("1 of 2", "no")
    assert of(slow, left) == ("0 of 2", "no")


def test_tables_and_lines():
    _, header, cells = bench.table(REPORT)
    assert header[5:7] == ["torch", "torch-cell"]
    assert header[-4:] == ["against full", "of bound", "bound by", "ours ran"]
    assert cells[0][:7] == ["lstm 1024,16,768,768 forward fp16", "1.54", "0%", "100663.3", "25%", "1.33", "–"]
    assert cells[0][-3:] == ["33%", "steps", "cluster"]
    assert len(cells) == len(ROWS) - 1  # the one that failed is a line
    assert cells[7][header.index("against full")] == "+2%"
    _, header, cells = cuda.goal_table(cuda.judge(ROWS))
    assert all(len(line) == len(header) for line in cells)
    assert cells[5][1:] == ["lstm 1024,16,768,768 fp16", "1.00", "no", "0.85", "0 of 1"]
    assert cells[1][1:] == ["–", "2.00", "no", "–", "0 of 1"]
    lines = cuda.summary(REPORT)
    assert "fp16, torch: geometric mean 1.67" in lines  # 4/3, 2.1
    assert "steps: 8e+05 a second" in lines
    assert "failed: fusedrnn, gru 256,64,256,256 bf16: no bfloat16" in lines
    assert lines[-1] == "a GPU, driver 580, 2026-01-01"


def test_the_gpu_and_its_driver_are_recorded(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system.gpu() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200, 580.1, 143771 MiB\n")
    tool.chmod(0o700)
    assert system.gpu().startswith("NVIDIA H200, 580.1, 143771 MiB, ")
    assert f"torch {torch.__version__}" in system.gpu().split(", ")


def test_what_cannot_be_measured_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == cli.FAILED
    said = f"fusedrnn bench: --device cuda: PyTorch {torch.__version__} finds no GPU\n"
    assert capsys.readouterr().err == said
    for device, option in (("cuda", "--peers=torch"), ("cpu", "--precision=fp16")):
        assert cli.main(["bench", "--device", device, option]) == cli.USAGE
        assert f"{option.split('=')[0]}: not with --device {device}" in capsys.readouterr().err


def test_the_command(monkeypatch, tmp_path, capsys):
    """What it measures, prints and writes; the measuring itself is above."""
    asked = {}
    monkeypatch.setattr(cuda, "run", lambda cases, **options: asked.update(options, cases=cases) or REPORT)
    file = tmp_path / "gpu.json"
    command = ["bench", "--device", "cuda", "--precision", "fp16,tf32", "--cell", "gru", "--json", str(file)]
    assert cli.main(command) == 0
    chosen = tuple(case for case in problems.SUITES["gpu"] if case.cell == gru)
    assert (asked["modes"], asked["suite"], asked["cases"]) == (["fp16", "tf32"], "gpu", chosen)
    out = capsys.readouterr().out
    assert "ours ran" in out
    assert "times LSTMCell" in out
    assert bench.load(str(file)) == json.loads(json.dumps(REPORT | {"goals": cuda.judge(ROWS)}))
    assert cli.main(["bench", "--device", "cuda", "--shape", "5,3,2,17", "--forward"]) == 0
    assert asked["cases"] == (Case(lstm, Shape(5, 3, 2, 17), "forward"),)
    assert (asked["modes"], asked["suite"]) == (list(cuda.MODES), None)
