"""A projected first state, beside what the tests of every cell show of it: what is refused, and sizes."""

from __future__ import annotations

import numpy as np
import pytest

import fusedrnn.layers as L
from fusedrnn import kernels
from fusedrnn.backends import get
from fusedrnn.backends.protocol import Regularization, Unsupported
from fusedrnn.cells import cell, lstm, tanh
from fusedrnn.gradcheck import gradcheck
from problems import PROJECTED, assert_bitwise_equal, assert_standard, problem, run

pytestmark = pytest.mark.quick

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.kernel)]
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("P", [1, 2, 16, 17, 33])
def test_every_projected_size(backend, P):
    """Of one unit to all."""
    p = problem(PROJECTED, 3, 4, 2, 33, P=P, lengths=True, return_states=True)
    assert p.dy.shape == (3, 4, P)
    assert_standard(get(backend), p)


@backends
@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (None, r"weights: expected weight_hr of shape \(P, 7\), P from 1 to 7"),
        ((4, 6), r"weight_hr: expected shape \(4, 7\), got \(4, 6\)"),
        ((8, 7), r"weight_hr: expected shape \(P, 7\), P from 1 to 7, got \(8, 7\)"),
        ((0, 7), r"weight_hr: expected shape \(P, 7\), P from 1 to 7, got \(0, 7\)"),
        ((7,), r"weight_hr: expected shape \(P, 7\), P from 1 to 7, got \(7,\)"),
        ((5, 7), r"weight_hh: expected shape \(28, 5\), got \(28, 4\)"),
    ],
)
def test_a_wrong_shape_is_named(backend, shape, match):
    p = problem(PROJECTED, 2, 3, 2, 7)
    weights = {**p.weights, "weight_hr": None if shape is None else np.zeros(shape)}
    with pytest.raises(ValueError, match=match):
        get(backend).forward(p.cell, p.x, weights)


@backends
def test_states_have_widths_of_their_own(backend):
    p = problem(PROJECTED, 2, 3, 2, 7)
    h, c = p.state0
    with pytest.raises(ValueError, match=r"state0 h: expected shape \(3, 4\), got \(3, 7\)"):
        get(backend).forward(p.cell, p.x, p.weights, (c, c))
    with pytest.raises(ValueError, match=r"state0 c: expected shape \(3, 7\), got \(3, 4\)"):
        get(backend).forward(p.cell, p.x, p.weights, (h, h))
    tape = get(backend).forward(p.cell, p.x, p.weights).tape
    with pytest.raises(ValueError, match=r"dy: expected shape \(2, 3, 4\), got \(2, 3, 7\)"):
        get(backend).backward(tape, np.zeros((2, 3, 7)))


def test_what_has_no_projection_refuses_it_by_name():
    p = problem(PROJECTED, 2, 3, 2, 7)
    other = problem(lstm, 2, 3, 2, 7)
    with pytest.raises(ValueError, match=r"weights: expected names out of .*, got weight_hr"):
        kernels.forward(lstm, p.x, {**other.weights, "weight_hr": p.weights["weight_hr"]})
    numba = get("numba")
    if numba.unavailable() is None:
        with pytest.raises(Unsupported, match="weight_hr: is not supported by the numba backend"):
            numba.forward(p.cell, p.x, p.weights)


@pytest.mark.kernel
def test_the_kernels_refuse_what_they_lack():
    from fusedrnn import _core
    from fusedrnn.backends.cpu import compiled, core_of
    from fusedrnn.backends.cuda.jobs import kernels_of

    with pytest.raises(Unsupported, match="cuda"):
        kernels_of(PROJECTED)
    assert compiled(lstm.with_options(project=True, layer_norm=True)) is None  # it is a program
    for made, P in ((PROJECTED, 8), (PROJECTED, 0), (lstm, 6)):
        with pytest.raises(ValueError, match="expected P"):
            _core.tape_shape(core_of(made), 2, 3, 2, 7, P, False, False, False)


@backends
def test_with_layer_norm(backend):
    """Gradients by a complex step: tests/cells. Here that all of its weights have one."""
    normed = lstm.with_options(project=True, layer_norm=True)
    p = problem(normed, 3, 2, 2, 7, regularization=Regularization(0.25, 0.25, 0.25, 3))
    found = run(get(backend), p)
    assert {f"d{n}" for n in p.weights} < found.keys()
    assert all(found[f"d{n}"].any() for n in p.weights)


@cell
def projected_alone(p, x, h):
    """A cell of a user's with no other state."""
    return p.project(tanh(p.dense("a", x, h)))


@backends
def test_a_cell_of_a_user(backend):
    p = problem(projected_alone, 4, 3, 2, 7, P=3)
    y = run(get(backend), p)["y"]
    h = p.state0[0]
    for t in range(4):
        a = p.x[t] @ p.weights["weight_ih"].T + h @ p.weights["weight_hh"].T + p.weights["bias_ih"]
        h = np.tanh(a) @ p.weights["weight_hr"].T
        np.testing.assert_allclose(y[t], h, atol=1e-14)


# --- native layers ------------------------------------------------------------------------------------------


def test_layers_refuse_a_wrong_size():
    for size in (-1, 8, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="proj_size"):
            L.LSTM(7, 2, proj_size=size)
    with pytest.raises(ValueError, match=r"proj_size: expected 0, as .* does not project .*, got 2"):
        L.Recurrent(lstm, 7, 2, proj_size=2)
    with pytest.raises(ValueError, match=r"proj_size: expected 1 to 7, as .* projects .*, got 0"):
        L.Recurrent(PROJECTED, 7, 2)


def test_a_layer_of_a_user_s_cell():
    layer = L.Recurrent(projected_alone, 5, 4, proj_size=3, num_layers=2, bidirectional=True, dtype="float64")
    assert gradcheck(layer, np.random.default_rng(0).standard_normal((4, 2, 4)))


def test_a_layer_is_saved_and_carries_its_state(tmp_path):
    layer, other = (L.LSTM(7, size, num_layers=2, proj_size=3) for size in (2, None))
    layer.save_weights(tmp_path / "weights.npz")
    other.load_weights(tmp_path / "weights.npz")
    x = np.random.default_rng(0).standard_normal((5, 4, 2)).astype(np.float32)
    y = layer.sequence(x)
    assert y.shape == (5, 4, 3)
    assert [s.shape for s in layer.state] == [(2, 4, 3), (2, 4, 7)]
    steps = [other.step(step).data for step in x]
    np.testing.assert_allclose(y.data, np.stack(steps), atol=1e-6)
    assert {n: p.shape for n, p in layer.named_params()}["weight_hr_l1"] == (3, 7)


def test_one_state_alone_is_completed():
    layer = L.LSTM(7, 2, proj_size=3)
    layer.h = np.ones((4, 3), np.float32)
    assert [s.shape for s in layer.state] == [(4, 3), (4, 7)]
    layer.reset_state()
    layer.c = np.ones((4, 7), np.float32)
    assert [s.shape for s in layer.state] == [(4, 3), (4, 7)]


def test_recompute_gives_the_same_bits():
    p = problem(PROJECTED, 40, 3, 2, 19, lengths=True, return_states=True)
    for name in ("cpu", "reference"):
        if get(name).unavailable() is None:
            assert_bitwise_equal(run(get(name), p, save="boundary_states"), run(get(name), p))
