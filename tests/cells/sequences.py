"""A sequence of steps of any cell in NumPy, forward and backward, and its derivatives by a complex step."""

from __future__ import annotations

import numpy as np

from fusedrnn.cells.evaluation import Evaluation

T, B, I, H, P = 3, 2, 3, 4, 3


def draw(cell, dtype, seed=0):
    """-> weights, x, the states before and row scalars by name; what the loss weighs results with"""
    rng = np.random.default_rng(seed)
    t = cell.trace

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    width = P if cell.projects else H
    shapes, widths = cell.shapes(I, H, width), dict(zip(t.states, cell.widths(H, width), strict=True))
    weights = {n: normal(*shapes[n]) / 2 + (1 if t.begin.get(n) == 1 else 0) for n in t.blocks}
    found = {"weights": weights, "x": {"x": normal(T, B, I)}}
    found["states"] = {
        s: np.abs(normal(B, width)) + 1 / 2 if t.start[s] else normal(B, width) for s, width in widths.items()
    }
    found["scalars"] = {s: np.abs(normal(T, B, 1)) + 1 / 4 for s in t.scalars}
    return found, normal(T, B, width), {s: normal(B, width) for s, width in widths.items()}


class Stacked(Evaluation):
    """A step with many values of one weight, stacked along its last axis and the first of the results."""

    def block(self, parameter, number, of=None):
        found = super().block(parameter, number, of)
        if found is None or found.ndim == 1 or parameter.startswith("weight_"):
            return found
        return found.T[:, None]  # (N, 1, H)


def forward(cell, weights, x, states, scalars, of=Evaluation):
    """-> the values of each step"""
    steps, before = [], list(states.values())
    for k in range(T):
        steps.append(of(cell, weights, x["x"][k], before, {n: v[k] for n, v in scalars.items()}))
        before = list(steps[-1].after)
    return steps


def stacked(arguments, count):
    """x, states and row scalars once for each of so many values of another argument."""

    def rows(a):
        return np.broadcast_to(a[..., None, :, :], (*a.shape[:-2], count, *a.shape[-2:]))

    return {
        group: arrays if group == "weights" else {n: rows(a) for n, a in arrays.items()}
        for group, arrays in arguments.items()
    }


def loss(cell, arguments, dy, dlast):
    """The sum over y of each step and over the last states, weighed, for each of the stacked values."""
    steps = forward(cell, **arguments, of=Stacked)
    last = sum((d * s).sum((-2, -1)) for d, s in zip(dlast.values(), steps[-1].after, strict=True))
    return last + sum((dy[k] * step.after[0]).sum((-2, -1)) for k, step in enumerate(steps))


def gradients(cell, arguments, dy, dlast):
    """The gradients of the loss, shaped like the arguments."""
    found = {group: {n: np.zeros_like(a) for n, a in d.items()} for group, d in arguments.items()}
    steps, chain = forward(cell, **arguments), list(dlast.values())
    for k in reversed(range(T)):
        step = steps[k]
        chain = list(step.backward([chain[0] + dy[k], *chain[1:]]))
        step.add_weight_gradients(found["weights"])
        found["x"]["x"][k] = step.input_gradient()
        for name, d in cell.gradient.scalars.items():
            found["scalars"][name][k] += step.of(d).sum(-1, keepdims=True)
    found["states"] = dict(zip(arguments["states"], chain, strict=True))
    return found


def worst_error(cell, dtype, seed=0):
    """The largest difference of any derivative from that by a complex step, relative to 1 + its size."""
    arguments, dy, dlast = draw(cell, dtype, seed)
    found = gradients(cell, arguments, dy, dlast)
    step = dtype(1e-30)
    worst = 0.0
    for group, arrays in arguments.items():
        for name, array in arrays.items():
            each = np.eye(array.size, dtype=bool).reshape(*array.shape, array.size)
            moved = np.where(each, array[..., None] + 1j * step, array[..., None])
            if group != "weights":
                moved = np.moveaxis(moved, -1, -3)
            all_moved = stacked(arguments, array.size)
            all_moved[group] = all_moved[group] | {name: moved}
            exact = loss(cell, all_moved, dy, dlast).imag / step
            error = abs(exact - found[group][name].ravel()) / (1 + abs(exact))
            worst = max(worst, float(error.max())) if np.isfinite(error).all() else np.inf
    return worst
