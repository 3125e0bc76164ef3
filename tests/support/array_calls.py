"""Calls of the compiled module into arrays of the caller's, as ``fusedrnn.torch`` makes them."""

from __future__ import annotations

import numpy as np

from fusedrnn.backends.cpu import CpuBackend, names
from fusedrnn.backends.protocol import Forward
from problems import named

CPU = CpuBackend()


class Arrays:
    """A problem whose results and tape are arrays of the caller's."""

    def __init__(self, p, recompute):
        self.p, self.recompute = p, recompute
        self.options = (p.lengths, p.reset, p.reverse, p.detach_every or 0, p.regularization, recompute)
        self.inputs = (p.x, p.state0 or (), tuple(p.scalars.values()))
        self.weights = tuple(map(p.weights.get, names(p.cell)))

    def empty(self):
        """What forward writes to: y, stateT, states and the tape."""
        p, cell = self.p, self.p.cell
        *time, batch, features = p.x.shape
        units = len(p.weights["weight_ih"]) // cell.blocks["weight_ih"]
        hidden = p.weights.get("weight_hh")
        width = units if hidden is None else hidden.shape[1]
        steps = time[0] if time else 1

        def new(*shape):
            return np.full(shape, np.nan, p.x.dtype)

        sizes = (steps, batch, features, units, width)
        options = {"regularization": p.regularization, "float64": p.x.dtype == np.float64}
        shape = CPU.tape_shape(cell, sizes, recompute=self.recompute, **options)
        ragged = p.lengths is not None and not self.recompute and cell.is_builtin
        widths = cell.widths(units, width)
        return {
            "y": new(steps, batch, width) if time else None,
            "stateT": [new(batch, n) for n in widths],
            "states": [new(steps, batch, n) for n in widths if p.return_states],
            "tape": new(int(p.lengths.sum()) if ragged else shape[0], shape[1]),
        }

    def forward(self, weights=None, out=None):
        out = self.empty() if out is None else out
        given = self.weights if weights is None else weights
        CPU.run_forward(self.p.cell, given, *self.inputs, *self.options, *out.values())
        return out

    def backward(self, y, tape, weights=None):
        p, cell = self.p, self.p.cell

        def new(arrays):
            return [None if a is None else np.empty_like(a) for a in arrays]

        dx = np.empty_like(p.x)
        dweights, dstate0, dscalars = map(new, (self.weights, p.state0 or p.dstateT, p.scalars.values()))
        given = self.weights if weights is None else weights
        upstream = p.dy, p.dstateT or (), p.dstates or ()
        out = dx, dweights, dstate0, dscalars
        CPU.run_backward(cell, given, *self.inputs, *self.options, y, tape, *upstream, *out)
        found = {"dx": dx} | {f"d{s}0": d for s, d in zip(cell.states, dstate0, strict=True)}
        found |= {f"d{n}": d for n, d in zip(names(cell), dweights, strict=True) if d is not None}
        return found | {f"d{n}": d for n, d in zip(p.scalars, dscalars, strict=True)}

    def named(self, out):
        """The results of forward by name."""
        forward = Forward(out["y"], tuple(out["stateT"]), tuple(out["states"]) or None, None)
        return named(self.p.cell, forward, None)
