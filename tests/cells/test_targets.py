"""Every cell on Variables and on PyTorch's tensors, where a program differentiates what it records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

import fusedrnn
import sequences
from fusedrnn import functions as F
from fusedrnn.cells import cell, exp, sigmoid, softplus, tanh
from fusedrnn.cells.evaluation import Evaluation
from fusedrnn.unfused import UnfusedStep
from published import CELLS
from test_random_cells import made, sources


@cell
def saturated(p, x, h):
    """Operations far from 0, where a careless form of them overflows."""
    a = p.dense("a", x, h)
    return tanh(softplus(1000 * a) / 1000 + sigmoid(-2000 * a) * exp(-abs(a)))


def arguments_of(cell):
    """-> weights, x, states before, row scalars of one step; what the loss weighs the new states with"""
    arguments, _, dlast = sequences.draw(cell, np.float64, seed=3)
    scalars = {name: value[0] for name, value in arguments["scalars"].items()}
    return arguments["weights"], arguments["x"]["x"][0], arguments["states"], scalars, [*dlast.values()]


def expected(cell):
    """The new states, and the gradients of weights and states as they are derived."""
    weights, x, states, scalars, upstream = arguments_of(cell)
    step = Evaluation(cell, weights, x, [*states.values()], scalars)
    new, dstates = step.after, step.backward(upstream)
    dweights = {name: np.zeros_like(w) for name, w in weights.items()}
    step.add_weight_gradients(dweights)
    return new, dstates, dweights


def on_variables(cell):
    weights, x, states, scalars, upstream = arguments_of(cell)
    parameters = {name: fusedrnn.Variable(w) for name, w in weights.items()}
    before = {name: fusedrnn.Variable(s) for name, s in states.items()}
    given = {name: p if p.ndim == 1 else p.T for name, p in parameters.items()}
    new = UnfusedStep(cell, given, fusedrnn.Variable(x), [*before.values()], scalars).after
    total = sum((F.sum(y * d) for y, d in zip(new, upstream, strict=True)), start=0.0)
    total.backward()
    grads = [{n: None if v.grad is None else v.grad.data for n, v in d.items()} for d in (before, parameters)]
    return [y.data for y in new], grads


def on_tensors(cell):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from fusedrnn.torch.differentiable import TorchStep

    weights, x, states, scalars, upstream = arguments_of(cell)
    parameters, before = (
        {name: torch.from_numpy(a).requires_grad_() for name, a in group.items()}
        for group in (weights, states)
    )
    rows = {name: torch.from_numpy(a) for name, a in scalars.items()}
    new = TorchStep(cell, parameters, torch.from_numpy(x), [*before.values()], rows).after
    sum((y * torch.from_numpy(d)).sum() for y, d in zip(new, upstream, strict=True)).backward()
    grads = [
        {n: None if v.grad is None else v.grad.numpy() for n, v in d.items()} for d in (before, parameters)
    ]
    return [y.detach().numpy() for y in new], grads


ON = pytest.mark.parametrize("on", [on_variables, on_tensors])


def check(on, cell, rtol, atol):
    new, dstates, dweights = expected(cell)
    got, (got_states, got_weights) = on(cell)
    for a, b in zip(got, new, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    derived = {**dict(zip(cell.trace.states, dstates, strict=True)), **dweights}
    for name, d in {**got_states, **got_weights}.items():
        np.testing.assert_allclose(
            0 if d is None else d, derived[name], rtol=10 * rtol, atol=10 * atol, err_msg=name
        )


@pytest.mark.quick
@pytest.mark.parametrize("cell", [*CELLS, saturated], ids=repr)
@ON
def test_values_and_gradients_of_a_step(on, cell):
    check(on, cell, 1e-13, 1e-14)


@pytest.mark.quick
@ON
@settings(max_examples=10)
@given(sources())
def test_values_and_gradients_of_random_cells(on, source):
    check(on, made(source), 1e-12, 1e-12)


@pytest.mark.slow
@ON
@settings(max_examples=300)
@given(sources())
def test_many_random_cells(on, source):
    check(on, made(source), 1e-12, 1e-12)
