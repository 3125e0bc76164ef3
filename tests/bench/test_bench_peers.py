"""Who takes part in the benchmark: every peer computes the same problem, and who does not is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fusedrnn import bench, cli, problems
from fusedrnn.bench import libraries, peer_torch, registry, runner, timing
from fusedrnn.cells import gru, lstm, rnn
from fusedrnn.problems import Case, Shape
from fusedrnn.threads import get_num_threads

SMALL = Case(lstm, Shape(6, 5, 3, 17))
OUTSIDE = [name for name in bench.PEERS if name not in bench.OWN]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """The matrix product beside the timing is small, and no other process makes it: test_bench.py has it."""

    def gemm(dtype, threads, sizes):
        made = timing.Gemm(dtype, threads, (64,))
        made.told = False
        return made

    monkeypatch.setattr(runner, "Gemm", gemm)


def truth(case: Case, dtype: str) -> libraries.Results:
    return runner.truth(case, dtype, get_num_threads())


# --- the check before the timing --------------------------------------------------------------------------

VARIANTS = {
    "training": {},
    "forward": {"kind": "forward"},
    "step": {"kind": "step", "shape": Shape(1, 5, 3, 17)},
    "stack": {"layers": 2, "bidirectional": True},
    "ragged": {"ragged": True},
    "ragged forward": {"ragged": True, "kind": "forward", "layers": 2, "bidirectional": True},
    "resets": {"resets": 0.3},
    "update": {"kind": "update", "layers": 2, "bidirectional": True},
    "update with resets": {"kind": "update", "resets": 0.3, "encoder": True},
}
EXPECTED = {"training": {"y", "h", "dx"}, "forward": {"y", "h"}, "step": {"y", "h"}}
EXPECTED["update"] = {"losses", "gradient 0", "gradient 3"}


# Every variant of the LSTM; of the others what libraries do in another way for them, since JAX compiles each.
CASES = [
    dataclasses.replace(SMALL, cell=cell, **VARIANTS[name])
    for cell, names in (
        (lstm, VARIANTS),
        (gru, ("training", "step", "stack", "ragged forward", "resets", "update")),
        (rnn, ("training", "ragged", "update with resets")),
        (rnn.with_options(relu=True), ("training", "step", "stack")),
    )
    for name in names
]


def dtypes_of(peer: str, case: Case) -> list[str]:
    dtypes = ("float32", "float64") if case.kind == "training" and case.layers == 1 else ("float32",)
    return [dtype for dtype in dtypes if registry.PEERS[peer].refuses(case, dtype) is None]


@pytest.mark.parametrize(
    ("peer", "case"),
    [
        pytest.param(peer, case, id=f"{peer} {case.cell!r} {case}")
        for peer in OUTSIDE
        for case in CASES
        if dtypes_of(peer, case)
    ],
)
def test_the_peers_compute_the_same_problem(peer, case):
    """Each peer, set up by the benchmark, agrees with the reference in every result."""
    if (why := registry.PEERS[peer].missing()) is not None:
        pytest.skip(why)
    for dtype in dtypes_of(peer, case):
        exact = truth(case, dtype)
        found = registry.PEERS[peer](problems.make(case, dtype), get_num_threads()).results()
        assert libraries.check(peer, found, exact, libraries.TOLERANCE[dtype]) > 0
        assert set(exact) >= EXPECTED[case.kind]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.cell!r} {case}")
@pytest.mark.parametrize("api", registry.APIS)
def test_our_pytorch_modules_compute_the_same_problem(api, case):
    """As what is measured; the path says that our kernels ran."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    if api == "cell" and registry.APIS[api].refuses(case, "float32") is not None:
        return  # as PyTorch's cells
    case = dataclasses.replace(case, api=api)
    ours = registry.ours(problems.make(case, "float32"), "cpu", get_num_threads())
    exact = truth(case, "float32")
    assert libraries.check(api, ours.results(), exact, libraries.TOLERANCE["float32"]) > 0
    assert ours.path == "fused"


def test_our_pytorch_modules_are_timed_beside_pytorch(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    cases = [dataclasses.replace(SMALL, kind=kind, api="layer") for kind in ("training", "update")]
    rows = runner.run(cases, peers=["torch"], quick=True)["rows"]
    for row in rows:
        assert row["libraries"][runner.OURS]["path"] == "fused"
        assert row["libraries"]["torch"]["ratio"] > 0
    with pytest.raises(ValueError, match="backend: our PyTorch modules take the fastest, got reference"):
        runner.run(cases, backend="reference")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match="our PyTorch modules: PyTorch is not installed"):
        runner.run(cases)


def test_every_peer_takes_part_in_something():
    for name in registry.PEERS:
        loop = name in registry.LOOPS  # which test_loops.py tests
        assert any(dtypes_of(name, case) for case in CASES) != loop, name


@pytest.mark.parametrize("spoil", ["nan", "shape", "one element", "missing", "extra"])
def test_the_check_fails_when_it_must(spoil):
    exact = truth(SMALL, "float64")
    got = {key: value.copy() for key, value in exact.items()}
    assert libraries.check("same", got, exact, 1e-15) == 0
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
        libraries.check("spoiled", got, exact, 1e-9)


class Wrong(libraries.Reference):
    """A peer with one wrong gradient."""

    def results(self):
        found = super().results()
        found["dweight_ih"] = found["dweight_ih"] * (1 + 1e-3)
        return found


def test_a_wrong_library_is_refused_and_not_timed(monkeypatch):
    monkeypatch.setitem(registry.PEERS, "wrong", Wrong)
    monkeypatch.setattr(runner, "time_blocks", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match="wrong: dweight_ih is off by 1"):
        runner.run([SMALL], peers=["wrong"], quick=True)


# --- who takes part ---------------------------------------------------------------------------------------


def test_a_missing_peer_is_a_line_unless_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    taken, left_out = registry.choose(None, [SMALL], "float32", "cpu")
    assert "torch" not in taken
    assert "without torch: PyTorch is not installed: pip install 'fusedrnn[torch]'" in left_out
    assert cli.main(["bench", "--quick", "--peers", "torch"]) == 1
    err = capsys.readouterr().err
    assert "pip install 'fusedrnn[torch]'" in err
    assert err.count("\n") == 1


def test_a_peer_that_takes_part_in_nothing_is_an_error(capsys):
    assert cli.main(["bench", "--quick", "--peers", "onnxruntime"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fusedrnn bench: --peers onnxruntime: it takes part in none of these cases")
    assert err.count("\n") == 1


def test_the_measured_backend_is_no_peer_of_its_own(capsys):
    assert "numba" not in registry.choose(None, [SMALL], "float32", "numba")[0]
    assert cli.main(["bench", "--quick", "--backend", "reference", "--peers", "reference"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fusedrnn bench: --peers reference: it is the backend that is measured")
    assert err.count("\n") == 1


def test_xla_keeps_its_threads():
    pytest.importorskip("jax", reason="JAX is not installed")
    from fusedrnn.bench import peer_jax

    peer_jax.load(get_num_threads())
    with pytest.raises(RuntimeError, match="in this process"):
        peer_jax.load(get_num_threads() + 1)
    assert "NPROC" not in os.environ


# --- a training step in PyTorch ---------------------------------------------------------------------------


@pytest.fixture
def torch_step():
    """bench/torch_step.py as a module."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    path = Path(__file__).parents[2] / "bench" / "torch_step.py"
    spec = importlib.util.spec_from_file_location("torch_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_our_kernels_learn_the_same_inside_a_pytorch_step(torch_step, threads):
    found = torch_step.measure((5, 3, 2, 8), get_num_threads(), blocks=3, seconds=0.001)
    assert set(found) == {"nn.LSTM", "ours, own pool", "ours, OpenMP threads", "ours, one thread"}
    assert found["nn.LSTM"]["ratio"] == 1
    assert all(each["ms"] > 0 for each in found.values())


def test_a_step_that_learns_something_else_is_refused(torch_step, threads, monkeypatch):
    right = torch_step.FusedLayer.outputs
    monkeypatch.setattr(torch_step.FusedLayer, "outputs", lambda self: [-right(self)[0]])
    with pytest.raises(RuntimeError, match="ours, own pool: losses"):
        torch_step.measure((5, 3, 2, 8), 1, blocks=3, seconds=0.001)


def test_an_update_with_other_gradients_is_refused(monkeypatch):
    """With the same losses: the first steps of Adam depend on signs alone."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    right = registry.APIS["layer"].outputs
    monkeypatch.setattr(
        registry.APIS["layer"], "outputs", lambda self: [y + (y - y.detach()) for y in right(self)]
    )
    case = dataclasses.replace(SMALL, kind="update", api="layer", way="torch")
    ours = registry.ours(problems.make(case, "float32"), "cpu", 1)
    with pytest.raises(RuntimeError, match="layer: gradient 0 is off"):
        libraries.check("layer", ours.results(), truth(case, "float32"), libraries.TOLERANCE["float32"])


# --- as libraries run it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        dataclasses.replace(SMALL, kind="update", layers=2, proj_size=4),
        dataclasses.replace(SMALL, kind="update", cell=gru, layers=2, state=True),
    ],
    ids=str,
)
def test_projections_and_given_states_take_part_in_updates(case):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    case = dataclasses.replace(case, api="layer", way="torch")
    plain = dataclasses.replace(case, proj_size=0, state=False)
    ours = registry.ours(problems.make(case, "float32"), "cpu", 1)
    exact = truth(case, "float32")
    assert libraries.check("layer", ours.results(), exact, libraries.TOLERANCE["float32"]) > 0
    assert ours.path == "fused"
    assert not np.allclose(exact["losses"], truth(plain, "float32")["losses"], rtol=1e-3)


def test_a_row_is_split_at_every_reset():
    """The layer gets as many rows as there are segments, and as many calls as a reset begins."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    data = problems.make(dataclasses.replace(SMALL, kind="update", resets=0.3), "float32")
    reset = data.reset.copy()
    reset[0] = True
    for name, shapes in (
        ("torch-split", lambda calls: [x.shape[1] for x in calls] == [reset.sum()]),
        ("torch-segments", lambda calls: len(calls) == reset.any(1).sum()),
    ):
        peer, calls = registry.PEERS[name](data, 1), []
        peer.module.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given[0]))
        peer.outputs()
        assert shapes(calls), name


def test_of_training_steps_in_bfloat16_the_losses_are_compared():
    """Gradients may be off by a fifth there, which users of the setting accept: PyTorch is timed with it."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    data = problems.make(dataclasses.replace(SMALL, kind="update"), "float32")
    library = registry.PEERS["torch"](data, 1)
    assert {"losses", "gradient 0"} <= library.results().keys()
    assert peer_torch.Medium(library).results().keys() == {"losses"}


@pytest.mark.parametrize("gain", [2.0, 1.0])
def test_pytorch_is_timed_in_bfloat16_only_where_that_is_faster(gain, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    seen = set()

    def speedup(plain, other):
        right = plain.outputs

        def outputs():
            seen.add(torch.get_float32_matmul_precision())
            return right()

        monkeypatch.setattr(plain, "outputs", outputs)
        plain()
        other()
        return gain

    monkeypatch.setattr(runner, "speedup", speedup)
    case = dataclasses.replace(SMALL, cell=gru, way="torch")
    found = runner.run([case], suite="programs", peers=["torch"], quick=True)
    assert seen == {"highest", "medium"}
    assert torch.get_float32_matmul_precision() == "highest"
    entry = found["rows"][0]["libraries"]["torch"]
    assert entry.get("tolerance") == (0.1 if gain > 1 else None)
    ratio = f"{entry['ratio']:.2f}" + ("*" if gain > 1 else "")
    assert bench.table(found)[2][0][-2:] == ["torch", ratio]
    lines = bench.summary(found)
    assert any(line.startswith("*: faster with") for line in lines) == (gain > 1)
    assert "goal of the library's own way: 2.5, none below 1.0" in lines
