"""``fusedrnn bench --device cuda`` without a GPU: counts, the loop on the emulated device, reports."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import test_torch_gpu  # noqa: E402
from emulated import EmulatedDevice  # noqa: E402
from fusedrnn import bench, cli, problems  # noqa: E402
from fusedrnn.backends import cuda_plan  # noqa: E402
from fusedrnn.backends.cuda import PRECISION  # noqa: E402
from fusedrnn.bench import cuda, peer_torch  # noqa: E402
from fusedrnn.bench.cuda import bounds, cudnn, goals, modes, plans, runner, timing  # noqa: E402
from fusedrnn.bench.peer_torch import Place, Torch  # noqa: E402
from fusedrnn.bench.runner import FULL, OURS  # noqa: E402
from fusedrnn.cells import GRU, LSTM, RNN  # noqa: E402
from fusedrnn.problems import Case, Shape  # noqa: E402

RATES = bounds.Rates(dict.fromkeys(modes.MODES, 1e12), 1e11, 1e-6, {})
emulated = test_torch_gpu.device


# --- the list of cases ------------------------------------------------------------------------------------


def test_the_suite_has_what_the_goals_speak_of():
    """Each goal has a row for every size it must be shown at, before anything is measured."""
    rows = runner.expected(problems.SUITES["gpu"], list(modes.MODES))
    for goal in goals.GOALS:
        chosen = [row["shape"] for row in rows if goal.rows(row)]
        assert chosen, goal.name
        if "<= 64" in goal.name:
            assert {B for _, B, _, _ in chosen} >= {1, 16, 64}, goal.name
            assert {H for _, _, _, H in chosen} >= {256, 512, 768, 1024}, goal.name


def test_every_case_has_a_pytorch_variant_beside_it():
    expected = {"ragged": ["torch-packed"], "resets": ["torch-masked"], "plain": ["torch"]}
    for suite in ("gpu", "rl", "deepbench"):
        for case in problems.SUITES[suite]:
            sort = "ragged" if case.ragged else "resets" if case.resets else "plain"
            loop = ["torch-cell"] if case.shape.T == 1 else []
            assert runner.torch_variants(case) == expected[sort] + loop, case


# --- which algorithm --------------------------------------------------------------------------------------

# cell, B, I, H, dtype, forward and back on an H100; from the conditions in PyTorch's RNN.cpp.
ALGORITHMS = [
    (LSTM(), 16, 768, 768, "float16", "PERSIST_STATIC", "PERSIST_STATIC"),
    (LSTM(), 16, 768, 768, "bfloat16", "STANDARD", "STANDARD"),
    (LSTM(), 16, 768, 768, "float32", "STANDARD", "STANDARD"),
    (GRU(), 16, 768, 768, "float16", "STANDARD", "STANDARD"),
    (LSTM(), 12, 768, 768, "float16", "STANDARD", "STANDARD"),
    (LSTM(), 136, 768, 768, "float16", "STANDARD", "STANDARD"),
    (LSTM(), 16, 64, 768, "float16", "STANDARD", "STANDARD"),
    (LSTM(), 16, 768, 700, "float16", "STANDARD", "STANDARD"),
    (LSTM(), 16, 768, 1152, "float16", "STANDARD", "STANDARD"),
    (RNN(), 96, 896, 896, "float16", "STANDARD", "STANDARD"),
    (RNN(), 88, 896, 896, "float16", "PERSIST_STATIC", "PERSIST_STATIC"),
    (LSTM(), 3, 7, 192, "float32", "PERSIST_STATIC_SMALL_H", "STANDARD"),
    (GRU(), 3, 7, 128, "bfloat16", "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
    (RNN(), 3, 7, 384, "float32", "PERSIST_STATIC_SMALL_H", "STANDARD"),
    (RNN(), 3, 7, 256, "float32", "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
    (LSTM(), 3, 7, 128, "float64", "STANDARD", "STANDARD"),
]


@pytest.mark.parametrize(("cell", "B", "I", "H", "dtype", "forward", "back"), ALGORITHMS)
def test_what_pytorch_asks_cudnn_for(cell, B, I, H, dtype, forward, back):
    case = Case(cell, Shape(50, B, I, H))
    h100 = {"capability": (9, 0), "multiprocessors": 132}
    assert cudnn.algorithm(case, dtype, backward=False, **h100) == forward
    assert cudnn.algorithm(case, dtype, backward=True, **h100) == back
    for other in ({"ragged": True}, {"layers": 2}, {"bidirectional": True}):
        if forward == "PERSIST_STATIC" or "ragged" in other:
            changed = dataclasses.replace(case, **other)
            assert cudnn.algorithm(changed, dtype, backward=False, **h100) == "STANDARD"
    if forward == "PERSIST_STATIC":
        for gpu in ({"capability": (8, 6), "multiprocessors": 132}, h100 | {"multiprocessors": 97}):
            assert cudnn.algorithm(case, dtype, backward=False, **gpu) == "STANDARD"


# --- the bound --------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """LSTM, T = 5, B = 2, I = 3, H = 4: x 30, y 40, weights 16 * 3 + 16 * 4 + 16 = 128 numbers."""
    case = Case(LSTM(), Shape(5, 2, 3, 4), "forward")
    assert bounds.moved_bytes(case, 4) == 4 * (30 + 40 + 128)
    assert bounds.moved_bytes(dataclasses.replace(case, kind="training"), 2) == 2 * 3 * (30 + 40 + 128)
    # Two layers, both directions: the second's input is the first's output, 8 wide.
    stack = dataclasses.replace(case, layers=2, bidirectional=True)
    weights = 2 * (16 * 3 + 16 * 4 + 16) + 2 * (16 * 8 + 16 * 4 + 16)
    assert bounds.moved_bytes(stack, 4) == 4 * (10 * (3 + 8) + 10 * (8 + 8) + weights)


def test_the_largest_part_is_the_bound():
    case = Case(LSTM(), Shape(5, 2, 3, 4))
    work = 3 * 2 * 5 * 2 * 16 * (3 + 4)
    moved = 4 * 3 * 198
    mode = modes.MODES["fp32"]

    def found(operations, moving, step):
        rates = bounds.Rates({"fp32": operations}, moving, step, {})
        return bounds.bound(case, "fp32", mode, rates)

    slow = found(1.0, 1.0, 1.0)
    assert slow["parts"] == {"operations": work, "bytes": moved, "steps": 9}  # 5 forward, 5 back
    assert (slow["by"], slow["seconds"]) == ("operations", work)
    assert found(1e9, 1.0, 1.0)["by"] == "bytes"
    assert found(1e9, 1e9, 1.0) == found(1e9, None, 1.0) | {"parts": found(1e9, 1e9, 1.0)["parts"]}
    assert found(None, None, None) == {
        "parts": {"operations": None, "bytes": None, "steps": None}, "by": None, "seconds": None,
    }  # fmt: skip


# --- the loop ---------------------------------------------------------------------------------------------


class Clock:
    """A timer whose calls take the seconds that a run says; it notes who was timed."""

    def __init__(self):
        self.calls = []

    def __call__(self, run, count):
        each = run()
        self.calls.append((each, count))
        return each * count


def test_rounds_take_turns_and_a_share_of_time():
    clock = Clock()
    samples, failed = timing.rounds({"a": lambda: 0.5, "b": lambda: 2.0}, clock, 4, 2.0)
    assert samples == {"a": [0.5] * 4, "b": [2.0] * 4}
    assert failed == {}
    a, b = (0.5, 4), (2.0, 1)  # so many calls fill two seconds
    warm = [(0.5, 2), (0.5, 1), (2.0, 2), (2.0, 1)]
    assert clock.calls == [*warm, a, b, b, a, a, b, b, a]


def test_who_fails_is_named_and_the_others_go_on():
    left = iter([1.0, 1.0, 1.0])

    def breaks():
        try:
            return next(left)
        except StopIteration:
            raise RuntimeError("CUDA error:\nan illegal  access") from None

    def refused():
        raise TypeError("x: of bfloat16")

    samples, failed = timing.rounds({"no": refused, "breaks": breaks, "a": lambda: 1.0}, Clock(), 3, 1.0)
    assert samples == {"a": [1.0] * 3}
    assert failed == {"no": "x: of bfloat16", "breaks": "CUDA error: an illegal access"}


def test_a_mode_is_set_and_taken_back(monkeypatch):
    monkeypatch.delenv(PRECISION, raising=False)
    before = torch.backends.cudnn.allow_tf32
    for was in (None, "bf16"):
        if was is not None:
            monkeypatch.setenv(PRECISION, was)
        for mode in modes.MODES.values():
            with modes.use(mode):
                assert os.environ[PRECISION] == mode.precision
                assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == mode.tf32
            assert os.environ.get(PRECISION) == was
            assert torch.backends.cudnn.allow_tf32 == before


# --- a whole run on the emulated device -------------------------------------------------------------------

SMALL = Case(LSTM(), Shape(4, 3, 2, 9))
SMALL_CASES = (
    SMALL,
    Case(LSTM(), Shape(4, 3, 2, 9), resets=0.5),
    Case(LSTM(), Shape(4, 3, 2, 9), ragged=True),
    Case(LSTM(), Shape(1, 3, 2, 9), "step", api="cell"),
)


@pytest.fixture
def small_bench(emulated, monkeypatch):
    """PyTorch on the CPU; ours on the emulated device, to which its tensors go."""
    FusedModule = peer_torch.FusedModule

    def build(self):
        return test_torch_gpu.moved(Torch.build(self))

    def cell(self):
        return test_torch_gpu.moved(peer_torch.TorchCell.build(self))

    def tensor(self, array):
        return Torch.tensor(self, array).as_subclass(test_torch_gpu.Elsewhere)

    monkeypatch.setattr(FusedModule, "build", build, raising=False)
    monkeypatch.setattr(peer_torch.FusedCell, "build", cell, raising=False)
    monkeypatch.setattr(FusedModule, "tensor", tensor, raising=False)
    return runner.Bench(Place("cpu"), timing.by_clock, rounds=3, seconds=0.001)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
class TestRun:
    def test_rows(self, small_bench, emulated):
        seen = []
        found = runner.run(SMALL_CASES, modes=["fp32"], bench=small_bench, rates=RATES, each=seen.append)
        assert emulated.launches
        rows = found["rows"]
        assert seen == rows
        assert [row["kind"] for row in rows] == ["forward", "training"] * 3 + ["step"]
        others = [{"torch"}] * 2 + [{"torch-masked", FULL}] * 2 + [{"torch-packed", FULL}] * 2
        others.append({"torch", "torch-cell"})
        for row, expected in zip(rows, others, strict=True):
            assert row["failed"] == {}
            assert set(row["libraries"]) == {OURS} | expected
            for name, entry in row["libraries"].items():
                assert entry["us_per_step"] == pytest.approx(1e3 * entry["ms"] / row["shape"][0])
                assert entry["of_bound"] == pytest.approx(1e3 * row["bound"]["seconds"] / entry["ms"])
                assert 0 <= entry["error"] < 1e-5
                assert ("ratio" in entry) == (name != OURS)
            plans = row["libraries"][OURS]["plans"]
            assert len(plans) == (2 if row["kind"] == "training" else 1)
            assert all(plan.startswith(("cluster", "grid", "steps")) for plan in plans)
        assert json.loads(json.dumps(found)) == found

    def test_a_dtype_that_ours_refuses_is_a_line(self, small_bench, monkeypatch):
        build_module = peer_torch.FusedModule.build

        def build(self):
            if self.dtype is torch.bfloat16:
                raise TypeError("x: expected float32 or float64, got bfloat16")
            return build_module(self)

        monkeypatch.setattr(peer_torch.FusedModule, "build", build)
        found = runner.run([SMALL], modes=["bf16"], forward=True, bench=small_bench, rates=RATES)
        (row,) = found["rows"]
        assert row["failed"] == {OURS: "x: expected float32 or float64, got bfloat16"}
        assert set(row["libraries"]) == {"torch", runner.FLOAT32}
        assert not any("ratio" in entry for entry in row["libraries"].values())
        _, header, (cells,) = cuda.table(found)
        assert len(cells) == len(header)
        assert "failed" in cells
        assert any("got bfloat16" in line for line in cuda.summary(found))
        assert "got bfloat16" in cuda.line(row)

    def test_a_wrong_result_is_not_timed(self, small_bench, monkeypatch):
        right = peer_torch.FusedLayer.results

        def wrong(self):
            found = right(self)
            if "dx" in found:
                found["dx"] = found["dx"] * (1 + 2 * modes.MODES["fp32"].tolerance)
            return found

        monkeypatch.setattr(peer_torch.FusedLayer, "results", wrong)
        forward, training = runner.run([SMALL], modes=["fp32"], bench=small_bench, rates=RATES)["rows"]
        assert forward["failed"] == {}
        assert training["failed"][OURS].startswith(f"{OURS}: dx is off by 2.0e-04")
        assert set(training["libraries"]) == {"torch"}

    def test_what_pytorch_itself_runs_is_no_result_of_ours(self, small_bench, monkeypatch):
        from fusedrnn.torch import paths

        monkeypatch.setattr(paths, "unsupported", lambda *arguments: "the dtype is new")
        (row,) = runner.run([SMALL], modes=["fp32"], forward=True, bench=small_bench, rates=RATES)["rows"]
        assert row["failed"] == {OURS: "fallback: the dtype is new"}

    def test_no_row_begins_when_the_time_is_over(self, small_bench):
        found = runner.run([SMALL], modes=["fp32"], limit=-1.0, bench=small_bench, rates=RATES)
        assert found["rows"] == []
        assert found["skipped"] == ["lstm 4,3,2,9 forward: no time left", "lstm 4,3,2,9: no time left"]

    def test_rates(self, small_bench, emulated):
        rates = bounds.measure(
            small_bench.place, small_bench.timer, small_bench.backend, size=16, megabytes=1, steps=3
        )
        assert rates.operations.keys() == modes.MODES.keys()
        assert all(rate > 0 for rate in rates.operations.values())
        assert rates.bytes > 0
        assert rates.steps["grid, H = 8"]["plan"].startswith("grid")
        assert rates.steps["cluster, H = 8"]["plan"].startswith("cluster")
        known = [each["seconds"] for each in rates.steps.values() if "seconds" in each]
        assert rates.step == min(known)


# --- what it reports --------------------------------------------------------------------------------------


def row(case, mode="fp32", failed=None, **us):
    """A row as ``run_row`` makes it, of microseconds a step by library."""
    libraries = {}
    for name, value in us.items():
        name = {"ours": OURS, "full": FULL}.get(name, name.replace("_", "-"))
        entry = {"ms": value * case.shape.T / 1e3, "us_per_step": value, "spread": 0.02, "error": 1e-6}
        entry |= {"of_bound": 0.5 / value, "plans": None}
        if name == OURS:
            entry["plans"] = ["cluster, 8x2 blocks of 32 units", "steps"]
        elif "ours" in us:
            entry["ratio"] = value / us["ours"]
        libraries[name] = entry
    return problems.describe(case) | {
        "mode": mode,
        "dtype": modes.MODES[mode].dtype,
        "valid": problems.valid(case),
        "flops": problems.flops(case),
        "bound": {"parts": {}, "by": "steps", "seconds": 1.0},
        "cudnn": ["PERSIST_STATIC", "STANDARD"],
        "libraries": libraries,
        "failed": failed or {},
    }


FLASH = Case(LSTM(), Shape(1024, 16, 768, 768), "forward")
ROWS = [
    row(FLASH, "fp16", ours=1.5, torch=2.0),
    row(dataclasses.replace(FLASH, kind="training"), "fp16", ours=6.0, torch=12.6),
    row(Case(LSTM(), Shape(256, 1, 256, 256), "forward"), "fp16", ours=1.0, torch=4.0),
    row(Case(LSTM(), Shape(256, 1, 128, 128), "forward"), "fp16", ours=1.0, torch=0.1),  # H too small
    row(Case(LSTM(), Shape(256, 65, 256, 256), "forward"), "fp16", ours=1.0, torch=0.1),  # B too large
    row(Case(GRU(), Shape(256, 1, 256, 256), "forward"), "bf16", {OURS: "no bfloat16"}, torch=4.0),
    row(Case(LSTM(), Shape(128, 8, 64, 256), "forward", resets=0.03), ours=1.0, full=0.98, torch_masked=9.0),
    row(Case(LSTM(), Shape(128, 8, 64, 256), resets=0.03), ours=1.1, full=1.0),
    row(Case(LSTM(), Shape(1, 8, 64, 256), "step", api="cell"), ours=30.0, torch=90.0, torch_cell=60.0),
    row(Case(LSTM(), Shape(1, 8, 64, 256), "step", api="layer"), ours=99.0, torch=90.0, torch_cell=60.0),
]


def test_goals():
    judged = {each["goal"]: each for each in cuda.judge(ROWS, ROWS, epoch=25.0)}
    assert len(judged) == len(goals.GOALS) + 1

    def of(name):
        found = judged[name]
        return found["figure"], found["ratio"], found["held"], found["rows"], found["holds"]

    range_ = "192 < H <= 1024, B <= 64: times cuDNN"
    assert of(f"LSTM fp16, forward, {range_}") == pytest.approx((2.0 / 1.5, 2.0 / 3.0, 1, 2, False))
    assert judged[f"LSTM fp16, forward, {range_}"]["row"] == "lstm 1024,16,768,768 forward fp16"
    assert of(f"LSTM fp16, forward + backward, {range_}") == pytest.approx((2.1, 1.05, 1, 1, True))
    assert of(f"GRU bf16, forward, {range_}") == (None, None, 0, 1, False)
    assert judged[f"GRU bf16, forward, {range_}"]["failed"] == ["gru 256,1,256,256 forward bf16: no bfloat16"]
    assert of(f"GRU tf32, forward, {range_}") == (None, None, 0, 0, None)
    flash = "LSTM fp16, H = 768, B = 16, T = 1024"
    assert of(f"{flash}, forward: us a step") == pytest.approx((1.5, 1.96 / 1.5, 1, 1, True))
    assert of(f"{flash}, forward + backward: us a step") == pytest.approx((6.0, 5.07 / 6.0, 0, 1, False))
    assert of("resets: time / time without") == pytest.approx((1.1, 1.05 / 1.1, 1, 2, False))
    assert of("ragged lengths: time / time of full") == (None, None, 0, 0, None)
    assert of("T = 1, B = 8, H = 256: times LSTMCell") == pytest.approx((2.0, 2.0, 1, 1, True))
    assert of(goals.EPOCH[0]) == pytest.approx((25.0, 1.25, 1, 1, True))
    assert {each["goal"]: each["holds"] for each in cuda.judge(ROWS, ROWS)}[goals.EPOCH[0]] is None


def test_a_goal_holds_only_where_all_of_it_was_measured():
    (goal,) = (each for each in goals.GOALS if each.name.startswith("LSTM fp16, forward + backward, 192"))
    second = row(Case(LSTM(), Shape(256, 1, 256, 256)), "fp16", ours=1.0, torch=4.0)
    no_peer = row(Case(LSTM(), Shape(256, 1, 256, 256)), "fp16", {"torch": "no cuDNN"}, ours=1.0)
    rows = [each for each in ROWS if goal.rows(each)]
    assert len(rows) == 1

    def of(rows, expected):
        (found,) = (each for each in cuda.judge(rows, expected) if each["goal"] == goal.name)
        return found["holds"], found["held"], found["rows"], found["not_measured"]

    assert of([*rows, second], [*rows, second]) == (True, 2, 2, 0)
    assert of(rows, [*rows, second]) == (None, 1, 2, 1)
    assert of([*rows, no_peer], [*rows, second]) == (None, 1, 2, 1)
    slow = row(Case(LSTM(), Shape(256, 2, 256, 256)), "fp16", ours=1.0, torch=1.9)
    assert of([*rows, slow], [*rows, second]) == (False, 1, 3, 1)


REPORT = {
    "suite": "gpu",
    "device": "cuda",
    "modes": ["fp32", "fp16"],
    "gpu": {"name": "a GPU", "cudnn": 91000},
    "environment": {"date": "2026-01-01"},
    "rates": {"operations": {"fp32": 5e13, "tf32": None}, "bytes": 4e12, "step": 1.25e-6, "steps": {}},
    "skipped": ["lstm 9,9,9,9: no time left"],
    "rows": ROWS,
}


def test_table():
    title, header, cells = cuda.table(REPORT)
    assert "gpu on a GPU" in title
    assert [name for name in header if name in runner.TORCH_VARIANTS] == [
        "torch",
        "torch-cell",
        "torch-masked",
    ]
    assert all(len(line) == len(header) for line in cells)
    first = dict(zip(header[:7], cells[0], strict=False))
    assert first == {
        "case": "lstm 1024,16,768,768 forward", "precision": "fp16", "us/step": "1.50", "±": "2%",
        "of bound": "33%", "bound by": "steps", "torch": "2.00",
    }  # fmt: skip
    assert cells[0][7] == "1.33"
    assert cells[0][-2:] == ["PERSIST_STATIC / STANDARD", "cluster / steps"]
    assert cells[5][2:8] == ["failed", "–", "–", "steps", "4.00", "–"]
    assert cells[6][header.index("against full")] == "+2%"
    _, header, cells = cuda.goal_table(cuda.judge(ROWS, ROWS))
    assert all(len(line) == len(header) for line in cells)
    assert {line[-1] for line in cells} == {"yes", "no", "not all measured"}


def test_summary():
    lines = cuda.summary(REPORT)
    assert "fp16, torch: geometric mean of 5 ratios 0.65" in lines  # 4/3, 2.1, 4, 0.1, 0.1
    assert "matrix product, fp32: 50.0 TFLOP/s" in lines
    assert "memory: 4000 GB/s (a copy, read and written)" in lines
    assert "from one step to the next: 1.25 us (RNN of one row)" in lines
    assert "failed: fusedrnn, gru 256,1,256,256 forward, bf16: no bfloat16" in lines
    assert "left out: lstm 9,9,9,9: no time left" in lines
    assert lines[-1] == "a GPU, cuDNN 91000, 2026-01-01"


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu():
    if cuda.missing() is None:
        pytest.skip("there is a GPU")


def test_without_a_gpu_it_is_one_line(no_gpu, capsys):
    assert cli.main(["bench", "--device", "cuda"]) == cli.FAILED
    err = capsys.readouterr().err
    assert err == f"fusedrnn bench: --device cuda: {cuda.missing()}\n"


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.missing() == f"PyTorch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.missing() == "PyTorch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("fusedrnn.torch.gpu.unavailable", lambda: "CuPy is not installed")
    assert cuda.missing() == "CuPy is not installed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda", "--peers", "torch"], "--peers: not with --device cuda"),
        (["--device", "cuda", "--dtype", "float64"], "--dtype: not with --device cuda"),
        (["--device", "cuda", "--memory"], "--memory: not with --device cuda"),
        (["--precision", "fp16"], "--precision: not with --device cpu"),
    ],
)
def test_an_option_of_the_other_device_is_refused(options, message, capsys):
    assert cli.main(["bench", *options]) == cli.USAGE
    assert capsys.readouterr().err.startswith(f"fusedrnn bench: {message}")


def test_the_command(monkeypatch, tmp_path, capsys):
    """What it measures, prints and writes; the measuring itself is above."""
    asked = {}

    def run(cases, **options):
        asked.update(options, cases=cases)
        options["progress"]("the bounds", 1, 2)
        return REPORT

    def judge(rows, expected):
        gru = [case for case in problems.SUITES["gpu"] if case.cell == GRU()]
        if "goals" not in asked:
            assert expected == runner.expected(gru, ["fp16", "tf32"])
            asked["goals"] = goals.judge(rows, expected)
        return asked["goals"]

    monkeypatch.setattr(cuda, "run", run)
    monkeypatch.setattr(cuda, "judge", judge)
    file = tmp_path / "gpu.json"
    command = ["bench", "--device", "cuda", "--precision", "fp16,tf32", "--cell", "gru", "--json", str(file)]
    assert cli.main(command) == 0
    assert asked["modes"] == ["fp16", "tf32"]
    assert asked["suite"] == "gpu"
    assert asked["cases"] == tuple(case for case in problems.SUITES["gpu"] if case.cell == GRU())
    out = capsys.readouterr().out
    assert "PERSIST_STATIC / STANDARD" in out
    assert "times LSTMCell" in out
    assert bench.load(str(file)) == json.loads(json.dumps(REPORT | {"goals": asked["goals"]}))
    assert cli.main(["bench", "--device", "cuda", "--shape", "5,3,2,17", "--forward"]) == 0
    assert asked["cases"] == (Case(LSTM(), Shape(5, 3, 2, 17), "forward"),)
    assert asked["suite"] is None
    assert asked["modes"] == list(modes.MODES)


# --- how the work is tiled ----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_cuts_are_timed_beside_what_was_chosen():
    device = EmulatedDevice(multiprocessors=6)

    def make_backend(kind, precision):
        return kind(device, precision=precision, _tested=True)

    size = plans.Size(LSTM(), "tf32", 3, 4, 9)
    found = plans.measure(size, make_backend, device.asarray, timing.by_clock)
    assert found["size"] == "LSTM(layer_norm=False) tf32 T=3 B=4 H=9"
    for direction in ("forward", "back"):
        rows = found[direction]["candidates"]
        kernels = [row["plan"].split(",")[0] for row in rows]
        assert kernels[0] == "steps"
        assert set(kernels) == set(cuda_plan.KERNELS)
        assert all(row["us_per_step"] > 0 and row["failed"] is None for row in rows)
        assert len({row["plan"] for row in rows}) == len(rows) <= 1 + 5 * plans.EACH
        least = min((row for row in rows[1:] if "streamed" not in row["plan"]), key=lambda row: row["cost"])
        assert found[direction]["chosen"] == least["plan"]
    ran = {"step_forward", "grid_forward", "grid_backward_streamed", "cluster_backward"}
    assert ran <= set(device.launches)


def test_a_cut_that_cannot_run_is_a_line(monkeypatch):
    class Broken(EmulatedDevice):
        def launch(self, cell, dtype, kernel, *args, **options):
            if kernel.startswith("cluster"):
                raise RuntimeError("no clusters today")
            super().launch(cell, dtype, kernel, *args, **options)

    device = Broken(multiprocessors=6)
    size = plans.Size(RNN(), "ieee", 2, 1, 5)
    found = plans.measure(
        size, lambda k, p: k(device, precision=p, _tested=True), device.asarray, timing.by_clock
    )
    failed = {row["plan"].split(",")[0]: row["failed"] for row in found["forward"]["candidates"]}
    assert failed["cluster"] == "no clusters today"
    assert failed["grid"] is None
