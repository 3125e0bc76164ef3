"""``fusedrnn bench --device cuda`` without a GPU: counts, the loop on the emulated device, goals, reports."""

from __future__ import annotations

import json
import os
import shutil
import timeit
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import test_torch_gpu  # noqa: E402
from fusedrnn import bench, cli, problems  # noqa: E402
from fusedrnn.backends.cuda import PRECISION  # noqa: E402
from fusedrnn.bench import cuda, peer_torch  # noqa: E402
from fusedrnn.bench.cuda import runs, tables  # noqa: E402
from fusedrnn.bench.peer_torch import Place, Torch  # noqa: E402
from fusedrnn.bench.runner import FULL, OURS  # noqa: E402
from fusedrnn.cells import gru, lstm  # noqa: E402
from fusedrnn.problems import Case, Shape  # noqa: E402

emulated = test_torch_gpu.device


def test_the_suite_has_what_the_goals_speak_of_and_a_pytorch_variant_for_each():
    rows = cuda.expected(problems.SUITES["gpu"], list(cuda.MODES))
    for goal in tables.GOALS[:-1]:
        chosen = [row for row in rows if tables.concerns(goal, row)]
        assert chosen, goal.name
        if goal.figure == "torch":
            assert {row["shape"][3] for row in chosen} >= {256, 1024}
            assert {row["shape"][1] for row in chosen} >= set(goal.rows["B"]) & {1, 16, 64}
            assert {row["kind"] for row in chosen} == {"forward", "training"}
        if "resets" in goal.name:
            assert len(chosen) == sum(row["resets"] > 0 for row in rows)
    for case in (*problems.SUITES["gpu"], *problems.SUITES["rl"], *problems.SUITES["deepbench"]):
        first = "torch-packed" if case.ragged else "torch-masked" if case.resets else "torch"
        more = ["torch-cell"] * (case.shape.T == 1) + ["torch-segments"] * (case.resets > 0)
        assert runs.peers(case) == [first, *more], case


def test_the_bound_by_hand():
    """LSTM, T = 5, B = 2, I = 3, H = 4: x 30, y 40, weights 16 * 3 + 16 * 4 + 16 = 128 numbers."""
    case = Case(lstm, Shape(5, 2, 3, 4), "forward")
    assert runs.moved_bytes(case, 4) == 4 * (30 + 40 + 128)
    assert runs.moved_bytes(replace(case, kind="training"), 2) == 2 * 3 * (30 + 40 + 128)
    # Two layers, both directions: the second's input is the first's output, 8 wide.
    weights = 2 * (16 * 3 + 16 * 4 + 16) + 2 * (16 * 8 + 16 * 4 + 16)
    stack = replace(case, layers=2, bidirectional=True)
    assert runs.moved_bytes(stack, 4) == 4 * (10 * (3 + 8) + 10 * (8 + 8) + weights)

    def found(case, *rates):
        return runs.bound(case, "fp32", runs.Rates({"fp32": rates[0]}, *rates[1:]))

    both = replace(case, kind="training")
    parts = {
        "operations": 3 * 2 * 5 * 2 * 16 * (3 + 4),
        "bytes": 4 * 3 * 198,
        "steps": 9,
    }  # 5 forward, 5 back
    assert found(both, 1.0, 1.0, 1.0) == {"parts": parts, "by": "operations", "seconds": 6720}
    assert found(both, 1e9, 1.0, 1.0)["by"] == "bytes"
    assert found(both, 1e9, 1e9, 1.0)["by"] == "steps"
    assert found(both, 1.0, 1.0, 0.0)["parts"].keys() == {"operations", "bytes"}
    assert found(stack, 1.0, 1.0, 2.0)["parts"]["steps"] == 9 / 2


def test_rounds_take_turns_and_who_fails_is_named():
    calls = []

    def timer(run, count):  # a call takes the seconds that it returns
        calls.append((run(), count))
        return calls[-1][0] * count

    left = iter([0.5, 0.5, 0.5])
    wanted = {"a": lambda: 0.5, "none": lambda: int("x"), "b": lambda: 2.0, "breaks": lambda: next(left)}
    samples, failed = runs.rounds(wanted, runs.Bench(None, timer, 4, 2.0))
    assert samples == {"a": [0.5] * 4, "b": [2.0] * 4}
    assert failed == {"none": "invalid literal for int() with base 10: 'x'", "breaks": "StopIteration"}
    a, b = (0.5, 4), (2.0, 1)  # so many calls fill two seconds
    assert calls[-6:] == [b, a, a, b, b, a]


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


BENCH = runs.Bench(Place("cpu"), lambda run, count: timeit.timeit(run, number=count), 3, 0.001)


@pytest.fixture
def run(modules, monkeypatch):
    """The benchmark with PyTorch on the CPU, without the rates, which take long."""
    rates = runs.Rates(dict.fromkeys(cuda.MODES, 1e12), 1e11, 1e6)
    monkeypatch.setattr(runs, "measure", lambda bench: rates)
    return lambda cases, **options: cuda.run(cases, bench=BENCH, **{"modes": ["fp32"]} | options)


def twice(library):
    return {name: 2 * a for name, a in Torch.results(library).items()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
class TestRun:
    def test_rows(self, run, emulated):
        seen = []
        step = replace(STEP, shape=Shape(1, 3, 2, 9))
        cases = (SMALL, replace(SMALL, resets=0.5), replace(SMALL, ragged=True), step)
        found = run(cases, each=seen.append)
        rows = found["rows"]
        assert emulated.launches
        assert seen == rows
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
            plans = row["libraries"][OURS]["plans"]
            assert len(plans) == (2 if row["kind"] == "training" else 1)
            assert all(plan.startswith(("cluster", "grid", "steps")) for plan in plans)
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
        found = run([SMALL], modes=["bf16"], forward=True)
        (row,) = found["rows"]
        assert row["failed"].keys() == {OURS}
        assert why in row["failed"][OURS]
        assert row["libraries"].keys() == {"torch"}
        assert "ratio" not in row["libraries"]["torch"]

    def test_no_row_begins_when_the_time_is_over(self, run):
        found = run([SMALL], limit=-1.0)
        assert found["rows"] == []
        assert found["skipped"] == ["lstm 4,3,2,9 forward: no time left", "lstm 4,3,2,9: no time left"]

    def test_rates(self, modules):
        rates = runs.measure(BENCH, size=16, megabytes=1, steps=3)
        assert rates.operations.keys() == cuda.MODES.keys()
        assert all(rate > 0 for rate in (*rates.operations.values(), rates.bytes, rates.steps))
        assert modules.launches


def row(case, mode="fp32", failed=None, **us):
    """A row as ``run_row`` makes it, of microseconds a step by library."""
    libraries = {}
    for name, value in us.items():
        entry = {"us_per_step": value, "spread": 0.02, "of_bound": 0.5 / value}
        more = {"plans": ["cluster, 8x2", "steps"]} if name == OURS else {"ratio": value / us.get(OURS, 1)}
        libraries[name.replace("_", "-")] = entry | more
    found = problems.describe(case) | {"mode": mode, "valid": problems.valid(case), "bound": {"by": "steps"}}
    return found | {"libraries": libraries, "failed": failed or {}}


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
REPORT = {"suite": "gpu", "modes": ["fp32", "fp16"], "gpu": {"name": "a GPU", "cuDNN": 91000}, "rows": ROWS}
REPORT |= {"rates": {"operations": {"fp32": 5e13}, "bytes": 4e12, "steps": 8e5}, "skipped": ["lstm: no time"]}
REPORT |= {"environment": {"date": "2026-01-01"}}


def test_goals():
    found = cuda.judge(ROWS, [], epoch=25.0)
    figures = [each["figure"] and round(each["figure"], 6) for each in found]
    assert figures == [2.5, None, 1.9, 1.3, 1.5, 6.0, 1.1, None, 2.0, 25.0]
    assert [each["rows"] for each in found] == [1, 1, 1, 1, 1, 1, 2, 0, 1, 1]
    assert [each["held"] for each in found] == [1, 0, 0, 1, 1, 0, 1, 0, 1, 1]
    holds = [each["holds"] for each in found]
    assert holds == [True, False, False, True, True, False, False, None, True, True]
    assert found[1]["failed"] == ["gru 256,64,256,256 bf16: no bfloat16"]
    assert found[6]["row"] == "lstm 128,8,64,256 resets fp32"
    assert [found[k]["ratio"] for k in (0, 4, 6)] == pytest.approx([1.25, 1.96 / 1.5, 1.05 / 1.1])


def test_a_goal_holds_only_where_all_of_it_was_measured():
    first, second = (row(WIDE, mode, fusedrnn=1.0, torch=3.0) for mode in ("tf32", "bf16"))
    slow, no_peer = row(WIDE, "bf16", fusedrnn=1.0, torch=1.9), row(WIDE, "bf16", fusedrnn=1.0)
    expected = cuda.expected([WIDE], ["tf32", "bf16"])[2:]

    def of(*rows):
        found = cuda.judge(rows, expected)[0]
        return tuple(found[key] for key in ("held", "rows", "not_measured", "holds"))

    assert of(first, second) == (2, 2, 0, True)
    assert of(first) == of(first, no_peer) == (1, 2, 1, None)
    assert of(first, slow) == (1, 2, 0, False)
    assert of(slow) == (0, 2, 1, False)


def test_tables_and_lines():
    _, header, cells = cuda.table(REPORT)
    assert header[6:] == ["torch", "ratio", "torch-cell", "ratio", "against full", "ours ran"]
    assert cells[0][1:8] == ["fp16", "1.50", "2%", "33%", "steps", "2.00", "1.33"]
    assert cells[0][-1] == "cluster / steps"
    assert cells[5][2:] == ["failed", "–", "–", "steps", "–", "–", "–", "–", "–", "–"]
    assert cells[8][header.index("against full")] == "+2%"
    _, header, cells = cuda.goal_table(cuda.judge(ROWS, [], 1.0))
    assert all(len(line) == len(header) for line in cells)
    assert {line[-1] for line in cells} == {"yes", "no", "not all measured"}
    lines = cuda.summary(REPORT)
    assert "fp16, torch: geometric mean of 2 ratios 1.67" in lines  # 4/3, 2.1
    assert "from one step to the next: 1.25 us (RNN of one row)" in lines
    assert "failed: fusedrnn, gru 256,64,256,256, bf16: no bfloat16" in lines
    assert lines[-2:] == ["left out: lstm: no time", "a GPU, cuDNN 91000, 2026-01-01"]


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
    assert "cluster / steps" in out
    assert "times LSTMCell" in out
    goals = cuda.judge(ROWS, cuda.expected(chosen, ["fp16", "tf32"]))
    assert bench.load(str(file)) == json.loads(json.dumps(REPORT | {"goals": goals}))
    assert cli.main(["bench", "--device", "cuda", "--shape", "5,3,2,17", "--forward"]) == 0
    assert asked["cases"] == (Case(lstm, Shape(5, 3, 2, 17), "forward"),)
    assert (asked["modes"], asked["suite"]) == (list(cuda.MODES), None)
