"""Numbers of each row and step (``def gru_d(p, x, h, *, dt)``) over whole sequences, on every API."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import direct
import published
from fusedrnn import Variable, gradcheck_suite, kernels, multilayer
from fusedrnn import functions as F
from fusedrnn import layers as L
from fusedrnn.backends import get
from fusedrnn.cells import cell, lstm, tanh, where
from fusedrnn.cells.evaluation import Evaluation
from fusedrnn.cells.symbols import CellError
from fusedrnn.gradcheck import GradcheckError, gradcheck
from problems import assert_bitwise_equal, assert_close, named, problem, run

pytestmark = pytest.mark.quick

REFERENCE = get("reference")
CELLS = [published.gru_d, published.cfc, published.ltc]
cells = pytest.mark.parametrize("cell", CELLS, ids=repr)
OPTIONS = (
    {},
    {"lengths": True, "reset": True, "return_states": True},
    {"lengths": True, "reset": True, "reverse": True, "return_states": True},
    {"detach_every": 2, "lengths": True, "return_states": True},
    {"detach_every": 3, "reset": True, "reverse": True},
)


@cell
def two(p, x, h, c, *, dt, gap):
    """Two of them, one of which only a condition reads."""
    a, b = p.dense("a b", x, h)
    return tanh(a * dt - c), where(gap > 0.5, b / dt, 0.5 * c)


# --- right --------------------------------------------------------------------------------------------------


def loss(p):
    """sum(y*dy) + sum(stateT*dstateT) + sum(states*dstates) at valid steps, row by row."""
    T, B, _ = p.x.shape
    total = p.x.dtype.type(0)
    for b in range(B):
        length = T if p.lengths is None else p.lengths[b]
        state = [s[b : b + 1] for s in p.state0]
        steps = range(length - 1, -1, -1) if p.reverse else range(length)
        for t in steps:
            ran = T - 1 - t if p.reverse else t  # of all rows
            first = t == steps[0]
            if p.detach_every and ran % p.detach_every == 0 and not first:
                state = [s.real.astype(s.dtype) for s in state]
            cut = t + 1 if p.reverse else t
            if p.reset is not None and not (p.reverse and first) and p.reset[cut, b]:
                state = [
                    np.full_like(s, start)
                    for s, start in zip(state, p.cell.trace.start.values(), strict=True)
                ]
            rows = {n: s[t, b] for n, s in p.scalars.items()}
            state = direct.new_states(p.cell, p.weights, p.x[t, b : b + 1], state, rows)
            total += (state[0] * p.dy[t, b]).sum()
            for s, d in zip(state, p.dstates or (), strict=False):
                total += (s * d[t, b]).sum()
        total += sum((s * d[b]).sum() for s, d in zip(state, p.dstateT, strict=True))
    return total


def by_complex_steps(p, gradients):
    """-> of each array, the derivative along a random direction, and the same of the gradients"""
    rng = np.random.default_rng(0)
    lifted = p.astype(np.clongdouble)
    arrays = {"dx": lifted.x} | {f"d{n}": a for n, a in {**lifted.weights, **lifted.scalars}.items()}
    arrays |= {f"d{s}0": a for s, a in zip(p.cell.states, lifted.state0, strict=True)}
    exact, derived = {}, {}
    for key, array in arrays.items():
        direction = rng.choice([-1, 1], array.shape).astype(np.longdouble)
        before = array.copy()
        array += 1e-25j * direction
        exact[key] = np.asarray(loss(lifted).imag / np.longdouble(1e-25))
        array[...] = before
        derived[key] = np.asarray((direction * gradients[key]).sum())
    return exact, derived


@pytest.mark.parametrize("cell", [*CELLS, two], ids=repr)
def test_the_reference_has_the_derivatives_of_the_function(cell):
    for options in OPTIONS:
        p = problem(cell, 5, 3, 2, 4, dtype=np.longdouble, biases="both", **options)
        got = run(REFERENCE, p)
        exact, derived = by_complex_steps(p, got)
        for key, value in exact.items():
            norm = np.sqrt((got[key] ** 2).sum())
            assert abs(value - derived[key]) <= 1e-17 * max(norm, 1), (key, options)
        if p.lengths is not None:
            padding = np.arange(5)[:, None] >= p.lengths
            for n in cell.scalars:
                assert (got[f"d{n}"][padding] == 0).all()
                assert not np.signbit(got[f"d{n}"][padding]).any()


def test_the_suite_proves_them():
    sizes = [gradcheck_suite.Shape(5, 3, 2, 7)]
    asked = ["lengths", "all-together", "2-layers-bidirectional-all"]
    for row in gradcheck_suite.run_suite(
        [published.gru_d], ["oracle", "reference"], ["float64"], asked, sizes=sizes
    ):
        assert row.passed, row
        assert "ddt" in row.errors


# --- kernels and multilayer ---------------------------------------------------------------------------------


def test_packed_rows():
    p = problem(two, 5, 4, 3, 6, lengths=True, reset=True, return_states=True)
    p = replace(p, lengths=np.array([5, 3, 3, 1]))
    p = replace(p, **{n: np.nan_to_num(getattr(p, n)) for n in ("x", "dy")})
    p = replace(
        p, dstates=None, return_states=False, scalars={n: np.nan_to_num(s) for n, s in p.scalars.items()}
    )
    want = run(REFERENCE, p)
    valid = np.arange(5)[:, None] < p.lengths
    out = kernels.forward(
        two,
        p.x[valid],
        p.weights,
        p.state0,
        reset=p.reset[valid],
        batch_sizes=[4, 3, 3, 1, 1],
        scalars={n: s[valid] for n, s in p.scalars.items()},
        backend="reference",
    )
    got = named(two, out, kernels.backward(out.tape, p.dy[valid], p.dstateT))
    of_steps = {"y", "dx", "ddt", "dgap"}
    assert_bitwise_equal(got, {key: a[valid] if key in of_steps else a for key, a in want.items()})


def test_only_what_is_needed():
    p = problem(two, 3, 2, 3, 4)
    tape = kernels.forward(two, p.x, p.weights, scalars=p.scalars, backend="reference").tape
    full = kernels.backward(tape, p.dy)
    some = kernels.backward(tape, p.dy, need=("gap", "dt"))
    assert some.dx is some.dstate0 is None
    for key in p.scalars:
        np.testing.assert_array_equal(some.dscalars[key], full.dscalars[key])
    assert kernels.backward(tape, p.dy, need=("x",)).dscalars == {"dt": None, "gap": None}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@cells
def test_layers(cell, fused):
    """Two layers in both directions: outputs, and gradients with respect to dt too."""
    net = L.Recurrent(cell, 4, 3, num_layers=2, bidirectional=True, dtype="float64", fused=fused)
    rng = np.random.default_rng(0)
    x, dt = rng.standard_normal((4, 3, 3)), rng.uniform(0.25, 2, (4, 3))
    assert gradcheck(net, x, dt=dt, options={"lengths": [4, 1, 3]})


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_steps_and_differences(fused):
    net = L.Recurrent(two if fused else published.gru_d, 4, 3, dtype="float64", fused=fused)
    rng = np.random.default_rng(0)
    x, rows = rng.standard_normal((4, 3, 3)), {n: rng.uniform(0.25, 2, (4, 3)) for n in net.cell.scalars}
    whole = net(x, **rows).data
    net.reset_state()
    each = [net.step(x[t], **{n: s[t] for n, s in rows.items()}).data for t in range(4)]
    np.testing.assert_allclose(each, whole, rtol=1e-13)
    assert gradcheck(net, x[0], **{n: s[0] for n, s in rows.items()})  # from the state that it carries
    assert gradcheck(net, x, **rows, method="central", fast_mode=True)


def test_a_wrong_gradient_is_found(monkeypatch):
    net = L.Recurrent(published.gru_d, 4, 3, dtype="float64", backend="reference")
    x, dt = np.random.default_rng(0).standard_normal((4, 3, 3)), np.full((4, 3), 0.5)
    right = Evaluation.scalar_gradient
    monkeypatch.setattr(Evaluation, "scalar_gradient", lambda self, name: 0.999 * right(self, name))
    with pytest.raises(GradcheckError, match=r"d inputs\[1\]\['dt'\]"):
        gradcheck(net, x, dt=dt, method="central")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_padding_dtypes_and_variables(fused):
    """NaN in the padding, whole numbers and other floats, of variables the gradient in their own dtype."""
    net = L.Recurrent(published.gru_d, 4, 3, fused=fused)
    x, dt = np.ones((4, 3, 3), np.float32), np.random.default_rng(0).integers(1, 5, (4, 3))
    padded = np.where(np.arange(4)[:, None] < [4, 1, 2], dt, np.nan)
    given = Variable(padded)
    y = net(x, lengths=[4, 1, 2], dt=given)
    net.reset_state()
    np.testing.assert_array_equal(y.data, net(x, lengths=[4, 1, 2], dt=dt).data)
    F.sum(y).backward()
    assert given.grad.dtype == np.float64
    assert (given.grad.data[np.isnan(padded)] == 0).all()
    assert (given.grad.data[~np.isnan(padded)] != 0).any()
    for parameter in net.params():
        assert np.isfinite(parameter.grad.data).all()


# --- what is refused ----------------------------------------------------------------------------------------


def test_wrong_scalars():
    p = problem(published.gru_d, 3, 2, 3, 4)
    dt = p.scalars["dt"]

    def forward(scalars, cell=published.gru_d, weights=p.weights):
        return kernels.forward(cell, p.x, weights, scalars=scalars, backend="reference")

    for given in (None, {}, {"dt": None}):
        with pytest.raises(
            ValueError, match=r"scalars: expected dt of shape \(T, B\) for gru_d\(\), got none"
        ):
            forward(given)
    with pytest.raises(ValueError, match=r"scalars: expected names out of dt for gru_d\(\), got gap"):
        forward({"dt": dt, "gap": dt})
    with pytest.raises(TypeError, match="scalars: expected a mapping of names to arrays, got tuple"):
        forward((dt,))
    with pytest.raises(ValueError, match=r"dt: expected shape \(3, 2\), got \(3,\)"):
        forward({"dt": dt[:, 0]})
    with pytest.raises(TypeError, match=r"dt: expected dtype float64 \(that of weight_ih\), got float32"):
        forward({"dt": dt.astype(np.float32)})
    with pytest.raises(TypeError, match="dt: expected a NumPy array, got list"):
        forward({"dt": dt.tolist()})
    plain = problem(lstm, 3, 2, 3, 4).weights
    with pytest.raises(ValueError, match=r"scalars: expected none for lstm\(.*, got dt"):
        forward({"dt": dt}, lstm, plain)
    assert_bitwise_equal({"y": forward({}, lstm, plain).y}, {"y": forward(None, lstm, plain).y})
    with pytest.raises(ValueError, match=r"dt: expected packed rows of shape \(3,\), got \(3, 2\)"):
        kernels.forward(
            published.gru_d, p.x[:, 0], p.weights, batch_sizes=[2, 1], scalars={"dt": dt}, backend="reference"
        )
    with pytest.raises(ValueError, match=r"need: expected names out of x, .*, dt, state0, got 'gap'"):
        kernels.backward(forward({"dt": dt}).tape, p.dy, need=("gap",))


def test_wrong_arguments_of_a_layer():
    net = L.Recurrent(published.gru_d, 4, 3)
    x = np.zeros((5, 2, 3))
    for call in (net, net.sequence):
        with pytest.raises(TypeError, match="dt: expected the row scalars of gru_d"):
            call(x)
    with pytest.raises(TypeError, match=r"^gap: expected .* state, lengths, .*, dt"):
        net(x, dt=np.ones((5, 2)), gap=1)
    with pytest.raises(TypeError, match=r"^dt: expected .* state, lengths, reset, return_states"):
        L.LSTM(4, 3)(x, dt=np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"dt: expected shape \(5, 2\), got \(2, 5\); transpose it"):
        net(x, dt=np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"dt: expected shape \(2,\), got \(5, 2\)"):
        net.step(x[0], dt=np.ones((5, 2)))
    with pytest.raises(TypeError, match="dt: expected real numbers, got complex128"):
        net(x, dt=np.ones((5, 2), complex))
    with pytest.raises(TypeError, match="dt: expected only with a recurrent layer of fusedrnn"):
        gradcheck(F.tanh, Variable(x), dt=np.ones((5, 2)))

    @cell
    def taken(p, x, h, *, lengths):
        return tanh(p.dense("a", x, h)) * lengths

    with pytest.raises(ValueError, match=r"^cell: .*got len"):
        L.Recurrent(taken, 4)


def test_multilayer_sums_over_layers_and_directions():
    p = problem(published.cfc, 4, 2, 3, 5)
    weights = [p.weights, p.weights]
    args = {"scalars": p.scalars, "backend": "reference"}
    out = multilayer.forward_multilayer(p.cell, p.x, weights, bidirectional=True, **args)
    both = np.concatenate([p.dy, p.dy], axis=2)
    got = multilayer.backward_multilayer(out.tape, both)
    want = sum(
        kernels.backward(
            kernels.forward(p.cell, p.x, p.weights, reverse=reverse, **args).tape, p.dy
        ).dscalars["dt"]
        for reverse in (False, True)
    )
    assert_close({"dt": got.dscalars["dt"]}, {"dt": want}, 1e-14)
    assert multilayer.backward_multilayer(out.tape, both, need=("x",)).dscalars == {"dt": None}


def test_names_of_parameters_are_taken():
    def taken(p, x, h, *, u):
        return tanh(p.dense("a", x, h) * p.vector("u")) * u

    def state(p, x, h, *, state0):
        return tanh(p.dense("a", x, h)) * state0

    for wrong, name in ((taken, "u"), (state, "state0")):
        with pytest.raises(CellError, match=f"expected another name than {name} for a row scalar"):
            cell(wrong)
