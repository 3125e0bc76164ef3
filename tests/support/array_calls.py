"""Calls of the compiled module into arrays of the caller's, as ``fusedrnn.torch`` makes them."""

from __future__ import annotations

import numpy as np

from fusedrnn.backends.cpu import WEIGHTS, CpuBackend

CPU = CpuBackend()


class Arrays:
    """A problem whose results and tape are arrays of the caller's."""

    def __init__(self, p, recompute):
        self.p, self.recompute = p, recompute
        self.options = (p.lengths, p.reset, p.reverse, recompute, p.detach_every or 0, p.regularization)
        self.states = (*(p.state0 or ()), None, None)[:2]
        self.weights = tuple(map(p.weights.get, WEIGHTS))

    def forward(self, weights=None):
        p, cell = self.p, self.p.cell
        *time, batch, _ = p.x.shape
        units = len(p.weights["weight_ih"]) // cell.blocks["weight_ih"]
        width = p.weights["weight_hh"].shape[1]
        two, steps = "c" in cell.states, time[0] if time else 1

        def new(*shape, there=True):
            return np.full(shape, np.nan, p.x.dtype) if there else None

        sizes = (steps, batch, p.x.shape[-1], units, width)
        regularized = self.options[-1] is not None
        shape = CPU.tape_shape(
            cell, sizes, recompute=self.recompute, regularized=regularized, float64=p.x.dtype == np.float64
        )
        lengths = self.options[0]
        rows = shape[0] if lengths is None or self.recompute else int(lengths.sum())
        out = {
            "y": new(steps, batch, width, there=bool(time)),
            "hT": new(batch, width),
            "cT": new(batch, units, there=two),
            "h_states": new(steps, batch, width, there=p.return_states),
            "c_states": new(steps, batch, units, there=p.return_states and two),
            "tape": new(rows, shape[1]),
        }
        given = self.weights if weights is None else weights
        CPU.run_forward(cell, given, p.x, *self.states, *self.options, *out.values())
        return out

    def backward(self, y, tape):
        p, cell = self.p, self.p.cell
        names = ["dx", *[f"d{name}" for name in WEIGHTS], "dh0", "dc0"]
        like = [p.x, *self.weights, *(*(p.state0 or p.dstateT), None)[:2]]
        found = {name: None if a is None else np.empty_like(a) for name, a in zip(names, like, strict=True)}
        upstream = [p.dy, *(*(p.dstateT or ()), None, None)[:2], *(*(p.dstates or ()), None, None)[:2]]
        out = list(found.values())
        CPU.run_backward(cell, self.weights, p.x, *self.states, *self.options, y, tape, *upstream, out)
        return {name: a for name, a in found.items() if a is not None}
