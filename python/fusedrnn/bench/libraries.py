"""The libraries of a benchmark: their interface, our own backends, and the check of each."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fusedrnn import backends, kernels, multilayer
from fusedrnn.backends.protocol import Array
from fusedrnn.problems import Case, Data

# The check before the timing: everybody computed the same thing. How exact each is, is gradcheck's business,
# so this is ten times what the kernels promise on standard problems.
TOLERANCE = {"float32": 5e-5, "float64": 2e-13, "bfloat16": 5e-2}

Results = dict[str, Array]


class Library(Protocol):
    """One library's way to compute a case. Calling it does the whole of it and returns what it made."""

    @property
    def path(self) -> str | None:
        """Which implementation ran, where there are several."""

    def __call__(self) -> Any:
        """What is timed."""

    def results(self) -> Results:
        """The same as arrays, named by ``named``."""


class Peer(Library, Protocol):
    """A library that we are compared with."""

    def __init__(self, data: Data, threads: int) -> None: ...

    @classmethod
    def missing(cls) -> str | None:
        """None where it is installed, else what to install."""

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        """None where it can take part in this case, else why not."""


def not_installed(what: str, *modules: str, extra: str = "bench") -> str | None:
    """None where all modules can be imported, else a line that says what to install."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return f"{what} is not installed: pip install 'fusedrnn[{extra}]'"
    return None


def named(
    data: Data,
    y: Array,
    stateT: Sequence[Array],
    dx: Array | None = None,
    dweights: Sequence[Mapping[str, Any]] = (),
    dscalars: Mapping[str, Any] | None = None,
) -> Results:
    """What a library computed, under the names and in the shapes in which ``check`` compares it.

    ``dweights`` has an entry per layer and direction, of the weights that the library knows; the gradient of
    a bias that the problem does not have is left out.
    """
    case = data.case
    T, B, *_ = case.shape
    N = case.layers * case.directions
    results = {"y": y.reshape(T, B, case.directions * case.P)}
    names = zip(case.cell.states, case.widths, stateT, strict=True)
    results |= {name: s.reshape(N, B, width) for name, width, s in names}
    if dx is not None:
        results["dx"] = dx
    for n, (weights, gradients) in enumerate(zip(data.weights, dweights, strict=False)):
        for key in [key for key in weights if key in gradients]:
            results[f"d{key}[{n}]" if N > 1 else f"d{key}"] = gradients[key]
    if dscalars is not None:
        results |= {f"d{key}": dscalars[key] for key in data.scalars}
    return results


class Native:
    """A backend of this library."""

    path: str | None = None

    def __init__(self, data: Data, backend: str) -> None:
        self.data = data
        self.backend = backend
        self.weights: Sequence[Any] = data.weights
        if data.case.kind != "training":
            self.weights = [kernels.pack(data.case.cell, w, backend=backend) for w in data.weights]

    def forward(self) -> Any:
        """One layer by itself, or several layers or directions."""
        data, case = self.data, self.data.case
        options: dict[str, Any] = {"lengths": data.lengths, "reset": data.reset}
        if data.scalars:
            options["scalars"] = data.scalars
        options["save"] = "all" if case.kind == "training" else None
        if case.kind == "training":
            options["backend"] = self.backend
        if len(self.weights) > 1:
            options["bidirectional"] = case.bidirectional
            return multilayer.forward_multilayer(case.cell, data.x, self.weights, data.state0, **options)
        state0 = None if data.state0 is None else tuple(s[0] for s in data.state0)
        return kernels.forward(case.cell, data.x, self.weights[0], state0, **options)

    def __call__(self) -> Any:
        out = self.forward()
        if out.tape is None:
            return out, None
        if len(self.weights) > 1:
            return out, multilayer.backward_multilayer(out.tape, self.data.dy, self.data.dstateT)
        return out, kernels.backward(out.tape, self.data.dy, tuple(d[0] for d in self.data.dstateT))

    def results(self) -> Results:
        out, gradients = self()
        if gradients is None:
            return named(self.data, out.y, out.stateT)
        dweights = gradients.dweights if len(self.weights) > 1 else [gradients.dweights]
        return named(self.data, out.y, out.stateT, gradients.dx, dweights, gradients.dscalars)

    def saved(self) -> dict[str, int] | None:
        """Bytes kept for backward: our own, and what we only borrow (outputs; of several layers also
        their inputs). The caller's input and the weights count for nobody. None where a tape tells no size.
        """
        case = self.data.case
        out = self.forward()
        tapes = out.tape.tapes if len(self.weights) > 1 else [out.tape]
        if any(not hasattr(tape.tape, "bytes") for tape in tapes):
            return None
        between = case.layers - 1 if case.bidirectional else 0  # both directions are copied into one input
        layer = case.directions * case.shape.T * case.shape.B * case.P * self.data.x.itemsize
        return {"own": sum(tape.tape.bytes for tape in tapes), "borrowed": (case.layers + between) * layer}


class OwnBackend(Native):
    """A backend of ours as a peer of the one that is measured."""

    backend_name: str

    def __init__(self, data: Data, threads: int) -> None:
        super().__init__(data, self.backend_name)

    @classmethod
    def missing(cls) -> str | None:
        return backends.get(cls.backend_name).unavailable()

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if case.kind == "update":
            return "an update is PyTorch's"
        return None if cls.missing() else backends.refuses(cls.backend_name, case.cell)


class Numba(OwnBackend):
    """The jitted Python cells; of built-in ones the path says how long they take to compile."""

    backend_name = "numba"

    def __init__(self, data: Data, threads: int) -> None:
        super().__init__(data, threads)
        if data.case.cell.is_builtin:
            self.path = numba_start(data.case.cell.name, str(data.x.dtype))


@functools.cache
def numba_start(cell: str, dtype: str) -> str:
    """How long a process waits for the first forward and backward: without Numba's cache, and with it."""
    code = (
        "import sys, time; from fusedrnn import cells, problems;"
        "from fusedrnn.bench.libraries import Native;"
        "case = problems.Case(cells.CELLS[sys.argv[1]], problems.Shape(2, 2, 2, 8));"
        "start = time.perf_counter(); Native(problems.make(case, sys.argv[2]), 'numba')();"
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code, cell, dtype]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        first, second = (
            float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(2)
        )
    return f"first call {first:.1f} s, from Numba's cache {second:.1f} s"


class Reference(OwnBackend):
    """Plain NumPy."""

    backend_name = "reference"


def check(name: str, got: Results, truth: Results, tolerance: float) -> float:
    """The largest error, relative to each tensor's largest entry; ``RuntimeError`` where it is too large."""
    if got.keys() != truth.keys():
        raise RuntimeError(f"{name} returned {sorted(got)}, expected {sorted(truth)}")
    worst = 0.0
    for key, exact in truth.items():
        if got[key].shape != exact.shape:
            raise RuntimeError(f"{name}: {key} has shape {got[key].shape}, expected {exact.shape}")
        largest = np.max(np.abs(exact)) or 1.0  # zeros, where only conditions read something
        error = float(np.max(np.abs(got[key] - exact)) / largest)
        if not error <= tolerance:  # this way round a NaN fails
            raise RuntimeError(
                f"{name}: {key} is off by {error:.1e} of its largest entry, not {tolerance:.0e}"
            )
        worst = max(worst, error)
    return worst


def version(module: str) -> str | None:
    """The version of an installed module; None where there is none."""
    with contextlib.suppress(ImportError, AttributeError):
        return str(importlib.import_module(module).__version__)
    return None
