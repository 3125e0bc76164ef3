"""The loops that people write, which the benchmark writes for a user's cell: right, and as good as theirs."""

from __future__ import annotations

import re
import shutil
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings

import published
import test_random_cells
from fusedrnn import cli, problems
from fusedrnn.bench import JaxScan, TorchLoop, libraries, registry, runner
from fusedrnn.bench.peer_loops import LoopInJax, LoopInTorch, LoopInTorchScript
from fusedrnn.bench.timing import same_threads
from fusedrnn.cells import builtin, cell, exp, maximum, sigmoid, tanh, where
from fusedrnn.problems import Case, Shape
from fusedrnn.threads import get_num_threads


@cell
def awkward(p, x, h, x_, n=1):
    """Two states change places, names clash, a gate without a bias, rows that are not beside each other."""
    a, b = p.dense("a b", x, h, bias=False)
    q, r = p.dense("q lambda", x, x_)
    s = tanh(p.dense("s", x))
    t = p.dense("a", s)
    e = p.dense("b", n, a)
    y, z = p.rms_norm("y", q, s, bias=True)
    grown = maximum(h - (a - (b - r)), 0.5) * (t / exp(-p.vector("c", init=1)))
    return x_, grown + z + p.dense("q", h), y * e - h


@cell
def two_operands(p, x, h, g):
    """Gates of one operand, of which some have x."""
    a, b = p.dense("a b", x, h)
    c, d = p.dense("c d", x, g)
    e = p.dense("e", g)
    return g + tanh(a) * sigmoid(e), h * sigmoid(b) + tanh(c) * sigmoid(d)


@cell
def late(p, x, h):
    """Gates of h and of what x alone decides, one of them after another that has h."""
    z = tanh(p.dense("z", x))
    first = p.dense("a", h)
    u = sigmoid(p.dense("u", h, z) + first)
    return z + u * (h - z)


@cell
def masked(p, x, h, *, dt, ys, now):
    """Numbers of each row, one of which only a condition reads; a selection between two numbers."""
    a, b = p.dense("a b", x, h)
    rate = where(a > b, 0.1, 0.3) * p.vector("rate", init=1) * dt
    return where(now > 0.4, h + rate * (tanh(a) - h), h * ys)


@cell
def awkwardly_projected(p, x, h, w_hr, *, dt):
    """Gates in halves, which need H, names that clash, a norm of what is projected."""
    a, b = p.dense("a b", x, h)
    w = p.dense("w", x) + p.dense("hr", h)
    kept = p.layer_norm("kept", tanh(a) * w_hr)
    return p.project(kept - dt * b), sigmoid(w) * w_hr


@cell
def projected_input(p, x, h, c):
    """What is projected is computed of x alone, for all steps at once."""
    return p.project(tanh(p.dense("a", x))), sigmoid(p.dense("b", x, h)) * c


XLA_THREADS = get_num_threads()  # as in the other tests of this process: XLA's pool keeps them

CELLS = [
    builtin.gru,
    builtin.gru.with_options(layer_norm=True),
    builtin.lstm.with_options(layer_norm=True),
    published.mgu,
    published.peephole_lstm,
    published.dreamer_gru,
    published.slstm,
    published.sru,
    published.co_rnn,
    published.everything,
    awkward,
    two_operands,
    late,
    published.gru_d,
    published.ltc,
    masked,
    published.lstmp,
    awkwardly_projected,
    projected_input,
]


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations wait for each other otherwise."""
    with same_threads(1):
        yield


def check(peer, cell, threads=1):
    """Outputs and gradients, in float64, are those of the reference."""
    data = problems.make(Case(cell, Shape(4, 3, 2, 5)), "float64")
    exact = libraries.Native(data, "reference").results()
    assert set(exact) >= {"y", *cell.states, "dx", "dweight_ih", *(f"d{name}" for name in cell.scalars)}
    libraries.check(cell.name, peer(data, threads).results(), exact, libraries.TOLERANCE["float64"])


@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_the_loop_in_pytorch_is_right(cell):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    check(LoopInTorch, cell)


@pytest.mark.slow
@settings(max_examples=300)
@given(test_random_cells.sources())
def test_the_loops_of_random_cells_are_right(source):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    drawn = test_random_cells.made(source)
    data = problems.make(Case(drawn, Shape(3, 2, 2, 3)), "float64")
    exact = libraries.Native(data, "reference").results()
    assume(all(np.isfinite(a).all() and a.any() for a in exact.values()))
    libraries.check(source, LoopInTorch(data, 1).results(), exact, 1e-9)


@pytest.mark.parametrize("cell", [published.mgu, published.everything, masked, awkwardly_projected], ids=repr)
def test_torchscript_compiles_the_loop(cell):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    check(LoopInTorchScript, cell)


@pytest.mark.parametrize(
    "cell",
    [awkward, masked, awkwardly_projected, pytest.param(published.mgu, marks=pytest.mark.slow)],
    ids=repr,
)
def test_the_scan_in_jax_is_right(cell):
    pytest.importorskip("jax", reason="JAX is not installed")
    check(LoopInJax, cell, XLA_THREADS)


def test_the_loop_reads_as_people_write_it():
    assert TorchLoop(published.mgu).source().splitlines() == [
        "import torch",
        "import torch.nn.functional as F",
        "",
        "",
        "def mgu(x, weight_ih, weight_hh, bias_ih, h):",
        "    H = h.shape[1]",
        "    w_f = weight_hh[:H].t()",
        "    w_n = weight_hh[H:].t()",
        "    f_x_all, n_x_all = F.linear(x, weight_ih, bias_ih).chunk(2, -1)",
        "    ys = []",
        "    for f_x, n_x in zip(f_x_all.unbind(0), n_x_all.unbind(0)):",
        "        f = torch.addmm(f_x, h, w_f)",
        "        f = torch.sigmoid(f)",
        "        n = torch.addmm(n_x, f * h, w_n)",
        "        h = h + f * (torch.tanh(n) - h)",
        "        ys.append(h)",
        "    return torch.stack(ys), h",
    ]


def test_a_projection_is_one_product_more():
    lines = TorchLoop(published.lstmp).source().splitlines()
    assert "    w_hr = weight_hr.t()" in lines
    assert "        h = torch.mm(torch.sigmoid(o + po * c) * torch.tanh(c), w_hr)" in lines
    data = problems.make(Case(published.lstmp, Shape(4, 3, 2, 5)), "float32")
    assert (data.dy.shape, *(d.shape for d in data.dstateT)) == ((4, 3, 2), (1, 3, 2), (1, 3, 5))
    assert str(data.case) == "lstmp 4,3,2,5 proj_size 2"


def test_numbers_of_each_row_are_taken_apart_like_x():
    lines = TorchLoop(published.gru_d).source().splitlines()
    assert lines[4].endswith("bias_ih, w, b, dt, h):")
    assert "    dt_all = dt[:, :, None]" in lines
    assert "    v1_all = torch.exp(-torch.relu(w * dt_all + b))" in lines


@pytest.mark.parametrize(
    ("cell", "products", "of_x_alone"),
    [
        (builtin.lstm, 1, ()),
        (builtin.gru, 1, ()),
        (builtin.gru.with_options(reset_after=False), 2, ()),
        (builtin.lstm.with_options(layer_norm=True), 1, ("ifgo_x",)),
        (published.min_gru, 0, ("sigmoid",)),
        (published.co_rnn, 2, ()),
        (published.lstmp, 2, ()),
    ],
    ids=repr,
)
def test_a_step_has_one_product_for_each_operand(cell, products, of_x_alone):
    """And what x alone decides stands before the loop."""
    for loop, product in ((TorchLoop(cell), r"mm\("), (JaxScan(cell), " @ ")):
        body = "\n".join(loop.body())
        assert len(re.findall(product, body)) == products
        assert not any(words in body for words in of_x_alone)


def test_a_wrong_gradient_of_a_row_scalar_is_refused():
    data = problems.make(Case(published.gru_d, Shape(4, 3, 2, 5)), "float64")
    exact = libraries.Native(data, "reference").results()
    with pytest.raises(RuntimeError, match="own: ddt is off by"):
        libraries.check("own", exact | {"ddt": exact["ddt"] * (1 + 1e-6)}, exact, 1e-9)


def test_a_wrong_loop_is_refused_and_not_timed(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(TorchLoop, "operations", {**TorchLoop.operations, "tanh": "torch.sigmoid"})
    monkeypatch.setattr(runner, "time_blocks", lambda *arguments: pytest.fail("it was timed"))
    case = Case(published.mgu, Shape(4, 3, 2, 5))
    with pytest.raises(RuntimeError, match="torch-loop: y is off by"):
        runner.run_case(case, "float32", "reference", ["torch-loop"], 1, runner.QUICK)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_loop_by_pytorchs_compiler_is_right():
    case = Case(published.mgu, Shape(3, 3, 2, 5))
    row = runner.run_case(case, "float32", "reference", ["torch-compile"], 1, runner.QUICK)
    assert re.fullmatch(r"first call \d+\.\d s", row["libraries"]["torch-compile"]["path"])


def test_a_cell_of_ones_own_is_timed_beside_its_loops(monkeypatch):
    case = Case(published.mgu, Shape(4, 3, 2, 5))
    for name in ("torch", "jax"):
        monkeypatch.setitem(sys.modules, name, None)
    taken, left_out = registry.choose(None, [case], "float32", "cpu")
    assert set(taken) <= {"numba"}
    assert [line.split(":")[0] for line in left_out if "numba" not in line] == [
        f"without {name}" for name in registry.LOOPS if name not in registry.ASKED_FOR
    ]
    builtin_case = Case(builtin.lstm, case.shape)
    assert all(registry.refuses(name, builtin_case, "float32") for name in registry.LOOPS)


@pytest.mark.slow
@pytest.mark.alone
def test_the_command_times_a_cell(tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    file = tmp_path / "cell_to_time.py"
    file.write_text(
        "from fusedrnn.cells import cell, tanh\n\n"
        "@cell\ndef simple(p, x, h):\n    return tanh(p.dense('a', x, h))\n"
    )
    peers = "torch-loop,torchscript,reference"
    command = ["bench", f"{file}:simple", "--quick", "--shape", "3,2,1,4", "--threads", "1", "--peers", peers]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "simple 3,2,1,4" in out
    assert "torchscript: geometric mean of the ratios" in out


@pytest.mark.quick
@pytest.mark.parametrize("loop", [TorchLoop, JaxScan])
def test_a_long_expression_is_cut_into_lines(loop):
    """Python's own parser takes no more than 200 parentheses within one another."""

    @cell
    def deep(p, x, h):
        a = p.dense("a", x, h)
        for _ in range(450):
            a = tanh(a) + 1
        return a

    source = loop(deep).source()
    compile(source, "deep", "exec")
    assert source.count("tanh(") == 450
    assert max(map(len, source.splitlines())) < 150
