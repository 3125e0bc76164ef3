"""Layers of cells of one's own, for the tests of ``fusedrnn.torch.Recurrent`` and ``RecurrentCell``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fusedrnn.torch as ft
from fusedrnn.cells import cell, relu, sigmoid, tanh
from fusedrnn.torch import differentiable
from published import everything, gru_d, mgu


@cell
def ind_rnn(p, x, h):
    """Li et al. 2018; it has no weight_hh."""
    return relu(p.dense("a", x) + p.vector("u", init=(0.0, 1.0)) * h)


@cell
def three(p, x, h, c, n=1):
    """Three states, one of which starts from 1; two operands beside x; a vector from a function."""
    i, f, o = p.dense("i f o", x, h)
    f, n = sigmoid(f + p.vector("decay", init=np.ones) * c), sigmoid(f) * n + sigmoid(i)
    c = f * c + tanh(i) + tanh(p.dense("q", c / n))
    return sigmoid(o) * tanh(c / n), c, n


@cell
def large(p, x, h):
    return tanh(sum(p.dense(" ".join(f"g{k}" for k in range(65)), x, h)) / 8)


T, B, I, H = 6, 3, 4, 5
LENGTHS = [6, 2, 4]
RESET = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]])
OWN = [mgu, ind_rnn, three, gru_d, everything]
own = pytest.mark.parametrize("cell", OWN, ids=lambda c: c.name)
without_scalars = pytest.mark.parametrize("cell", OWN[:3], ids=lambda c: c.name)


def made(cell, *sizes, dtype=torch.float64, **options):
    """A layer with parameters that are not small, and its input, of sizes I and H or others."""
    options = {"proj_size": 3 * cell.projects} | options
    layer = ft.Recurrent(cell, *(sizes or (I, H)), dtype=dtype, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) / 2)
    return layer, torch.randn(T, B, layer.input_size, dtype=dtype, requires_grad=True)


def scalars(cell, shape=(T, B)):
    return {name: torch.rand(shape, dtype=torch.float64).requires_grad_() for name in cell.scalars}


def states(layer, rows=(B,)):
    sizes = [(len(layer._all_weights), *rows, width) for width in layer._widths()]
    return [torch.rand(size, dtype=torch.float64).requires_grad_() for size in sizes]


def hx_of(state):
    return tuple(state) if len(state) > 1 else state[0]


def flat(results):
    return [t for r in results for t in (r if isinstance(r, tuple) else (r,))]


def by_steps(layer, x, state0, scalars, masks=None, **options):
    """What a layer returns, as a list, from ``differentiable.recurrence``."""
    D, ends = 1 + layer.bidirectional, []
    for k in range(layer.num_layers):
        halves = []
        for d in range(D):
            j, suffix = k * D + d, f"_l{k}{'_reverse' if d else ''}"
            weights = {name: getattr(layer, name + suffix, None) for name in layer.cell.blocks}
            weights = {name: w for name, w in weights.items() if w is not None}
            begin = None if state0 is None else [s[j] for s in state0]
            r = None if masks is None else masks._replace(stream=j)
            y, final, every = differentiable.recurrence(
                layer.cell, x, weights, begin, scalars=scalars, reverse=bool(d), regularization=r, **options
            )
            halves.append(y)
            ends.append([*final, *(every or [])])
        x = torch.cat(halves, 2)
    return [x, *(torch.stack(each) for each in zip(*ends, strict=True))]


def assert_same(found, expected, leaves, tolerance=1e-12):
    """Values, and gradients of a random sum of them."""
    weighs = [torch.randn_like(t) for t in expected]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=tolerance)
    how = {"allow_unused": True, "retain_graph": True}
    pairs = [torch.autograd.grad(r, leaves, weighs, **how) for r in (found, expected)]
    for f, e in zip(*pairs, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=tolerance)
