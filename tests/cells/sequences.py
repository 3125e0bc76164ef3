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


def forward(cell, weights, x, states, scalars):
    """-> the values of each step"""
    steps, before = [], list(states.values())
    for k in range(T):
        steps.append(Evaluation(cell, weights, x["x"][k], before, {n: v[k] for n, v in scalars.items()}))
        before = list(steps[-1].after)
    return steps


def loss(cell, arguments, dy, dlast):
    """The sum over y of each step and over the last states, weighed."""
    steps = forward(cell, **arguments)
    last = sum((d * s).sum() for d, s in zip(dlast.values(), steps[-1].after, strict=True))
    return last + sum((dy[k] * step.after[0]).sum() for k, step in enumerate(steps))


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
            for at in np.ndindex(array.shape):
                moved = array.astype(np.result_type(dtype, np.complex64))
                moved[at] += 1j * step
                lifted = {**arguments, group: {**arrays, name: moved}}
                exact = loss(cell, lifted, dy, dlast).imag / step
                error = abs(exact - found[group][name][at]) / (1 + abs(exact))
                worst = max(worst, float(error)) if np.isfinite(error) else np.inf
    return worst
