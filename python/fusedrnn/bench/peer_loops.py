"""The loop over time that people write for a cell of their own: in PyTorch, by two compilers, as JAX's scan.

``loops`` writes its text, which ``fusedrnn bench FILE.py:NAME --show-loop`` prints.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from fusedrnn.bench.libraries import Results, named, not_installed
from fusedrnn.bench.loops import Loop
from fusedrnn.bench.loops_jax import JaxScan
from fusedrnn.bench.loops_torch import TorchLoop
from fusedrnn.bench.peer_jax import Jax
from fusedrnn.problems import Case, Data

WARM = 3  # calls until TorchScript has optimised both directions


def refuses(case: Case) -> str | None:
    """None where the loop can take part."""
    if case.cell.is_builtin:
        return "the loops are for cells of one's own"
    if case.kind not in ("training", "forward") or case.layers > 1 or case.bidirectional:
        return "a loop serves one layer and direction"
    return "a loop knows no lengths and no resets" if case.ragged or case.resets else None


class LoopInTorch:
    """A Python loop of PyTorch's operations."""

    path: str | None = None

    def __init__(self, data: Data, threads: int) -> None:
        import torch

        self.torch, self.data = torch, data
        case, (weights,) = data.case, data.weights
        loop = TorchLoop(case.cell)
        self.function = self.prepared(loop)
        self.training = case.kind == "training"
        self.names = [*loop.parameters]
        given = data.x, *(weights[name] for name in self.names), *data.scalars.values()
        self.inputs = [torch.from_numpy(a) for a in given]
        for tensor in self.inputs:
            tensor.requires_grad_(self.training)
        x, begin = self.inputs[0], case.cell.trace.start.values()
        # A state that no weight reaches has a gradient too.
        self.state0 = [
            x.new_full((case.shape.B, width), start, requires_grad=self.training)
            for width, start in zip(case.widths, begin, strict=True)
        ]
        self.upstream = [torch.from_numpy(d) for d in (data.dy, *(d[0] for d in data.dstateT))]

    def prepared(self, loop: Loop) -> Any:
        """The function that is timed."""
        return loop.function()

    @classmethod
    def missing(cls) -> str | None:
        return not_installed("PyTorch", "torch", extra="torch")

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        return refuses(case)

    def __call__(self) -> Any:
        if not self.training:
            with self.torch.no_grad():
                return self.function(*self.inputs, *self.state0), None
        outputs = self.function(*self.inputs, *self.state0)
        # What only conditions read has a gradient, of zeros.
        options = {"materialize_grads": True}
        return outputs, self.torch.autograd.grad(outputs, self.inputs, self.upstream, **options)

    def results(self) -> Results:
        outputs, gradients = self()
        y, *stateT = (o.detach().numpy() for o in outputs)
        if gradients is None:
            return named(self.data, y, stateT)
        dx, *others = (d.numpy() for d in gradients)
        found = dict(zip([*self.names, *self.data.scalars], others, strict=True))
        return named(self.data, y, stateT, dx, [found], found)


class LoopInTorchScript(LoopInTorch):
    """The same loop, compiled by TorchScript."""

    def prepared(self, loop: Loop) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.torch.jit.script(loop.function())

    def results(self) -> Results:
        for _ in range(WARM):
            self()
        return super().results()


class LoopCompiled(LoopInTorch):
    """The same loop, its steps unrolled, by ``torch.compile``; the path says how long a first call takes."""

    def prepared(self, loop: Loop) -> Any:
        return self.torch.compile(loop.function(), fullgraph=True, dynamic=False)

    def results(self) -> Results:
        start = time.perf_counter()
        self()
        self.path = f"first call {time.perf_counter() - start:.1f} s"
        return super().results()


class LoopInJax(Jax):
    """``jax.lax.scan`` over the steps, jitted."""

    def forward(self) -> Any:
        loop = JaxScan(self.data.case.cell)
        function = loop.function()

        def forward(x: Any, weights: Any, scalars: Any, state0: Any) -> Any:
            # By name: JAX sorts what dictionaries hold.
            given = [weights[0][name] for name in loop.parameters]
            given += [scalars[name] for name in loop.cell.scalars]
            y, *stateT = function(x, *given, *(s[0] for s in state0))
            return y, tuple(s[None] for s in stateT)

        return forward

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        return refuses(case)
