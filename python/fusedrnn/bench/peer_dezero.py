"""DeZero, a framework for teaching: one step at a time, one node per operation."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fusedrnn.bench.libraries import Results, named
from fusedrnn.problems import Case, Data, flops

GATES = {"lstm": "ifuo", "rnn": ("",)}  # its letters in our order of gates
LARGEST = 2e9  # operations; beyond that nobody waits for it


def load() -> Any:
    """The module ``dezero``."""
    if "int" not in vars(np):
        setattr(np, "int", int)  # noqa: B010  its import needs this name, which NumPy 1.24 removed
    return importlib.import_module("dezero")


class DeZero:
    """``dezero.layers.LSTM`` or ``RNN`` over single steps, as it has no sequences; a sum as the loss."""

    path = "one step after another"

    def __init__(self, data: Data, threads: int) -> None:
        self.dezero = load()
        self.data = data
        case = data.case
        self.layer = getattr(self.dezero.layers, case.cell.name.upper())(case.shape.H, case.shape.I)
        weights = data.weights[0]
        for gate, rows in self.gates():
            inputs, hidden = self.linears(gate)
            inputs.W.data = weights["weight_ih"][rows].T.copy()
            inputs.b.data = weights["bias_ih"][rows].copy()
            hidden.W.data = weights["weight_hh"][rows].T.copy()

    @classmethod
    def missing(cls) -> str | None:
        try:
            load()
        except ImportError:
            return "DeZero is not installed: pip install 'fusedrnn[bench]'"
        return None

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if case.cell.name not in GATES or case.cell.options.get("relu"):
            return "it has LSTM and tanh RNN only"
        plain = not (case.bidirectional or case.ragged or case.resets or case.state)
        if case.kind != "training" or case.layers > 1 or not plain:
            return "it takes part in plain training of one layer only"
        return "the case is too large for it" if flops(case) > LARGEST else None

    def gates(self) -> list[tuple[str, slice]]:
        """Its letter of each gate, and that gate's rows in our weights."""
        H = self.data.case.shape.H
        return [(g, slice(k * H, k * H + H)) for k, g in enumerate(GATES[self.data.case.cell.name])]

    def linears(self, gate: str) -> tuple[Any, Any]:
        """The input part and the recurrent part of a gate."""
        kind = gate or "h"
        return getattr(self.layer, f"x2{kind}"), getattr(self.layer, f"h2{kind}")

    def __call__(self) -> Any:
        data, layer = self.data, self.layer
        F, Variable = self.dezero.functions, self.dezero.Variable
        layer.cleargrads()
        layer.reset_state()
        xs = [Variable(x) for x in data.x]
        ys = [layer(x) for x in xs]
        states = [getattr(layer, state) for state in data.case.cell.states]
        pairs = [*zip(ys, data.dy, strict=True), *zip(states, (d[0] for d in data.dstateT), strict=True)]
        loss, *more = [F.sum(value * upstream) for value, upstream in pairs]
        for term in more:
            loss = loss + term
        loss.backward()
        return ys, states, xs

    def results(self) -> Results:
        ys, states, xs = self()
        parts = [self.linears(gate) for gate, _ in self.gates()]
        dweights = {
            "weight_ih": np.concatenate([inputs.W.grad.data.T for inputs, _ in parts]),
            "weight_hh": np.concatenate([hidden.W.grad.data.T for _, hidden in parts]),
            "bias_ih": np.concatenate([inputs.b.grad.data for inputs, _ in parts]),
        }
        y = np.stack([y.data for y in ys])
        dx = np.stack([x.grad.data for x in xs])
        return named(self.data, y, [s.data for s in states], dx, [dweights])
